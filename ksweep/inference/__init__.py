"""Sampling continuations of a prompt with a vector in it, and the memory that takes."""
