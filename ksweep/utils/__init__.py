"""Utilities for every room: errors, files, hashing, the terminal, clocks."""
