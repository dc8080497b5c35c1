"""Triton kernels of the experts' classifiers."""
