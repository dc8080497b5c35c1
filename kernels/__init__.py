"""Triton kernels, one file an operator; installed as the package ``shike_fast.kernels``."""
