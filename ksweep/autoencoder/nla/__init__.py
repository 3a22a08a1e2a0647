"""Pairs of an activation verbalizer and an activation reconstructor in the NLA layouts."""
