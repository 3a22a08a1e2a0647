"""Evaluate a cell, from its activations to its run record: the code that every rank of a job runs."""
