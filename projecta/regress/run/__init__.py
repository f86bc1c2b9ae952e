"""Runs benchmarks: builds of commits, worker processes, outcomes."""
