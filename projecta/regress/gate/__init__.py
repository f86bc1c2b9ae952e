"""Says whether a change made things slower or hungrier."""
