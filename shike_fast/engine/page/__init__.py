"""The HTML report of a test: one file, which needs nothing else."""
