"""Running benchmarks and judging their results; works on any asv project and never imports torch.

store reads asv's results · runner has asv measure commits · report writes tables and plots · cli is the
`projecta` command.
"""
