"""Triton kernels of the expert losses, one file an operator."""
