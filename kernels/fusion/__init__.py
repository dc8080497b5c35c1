"""Triton kernels of depth-wise knowledge fusion."""
