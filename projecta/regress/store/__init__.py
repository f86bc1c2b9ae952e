"""Keeps results: the journal, asv's files, the branch of results."""
