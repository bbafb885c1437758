"""Scores of the parts of each node, by the kernel chosen."""
