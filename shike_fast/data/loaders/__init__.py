"""Batches of an epoch, from this process, worker processes or the GPU."""
