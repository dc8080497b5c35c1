"""Triton kernels, one folder a feature and one file an operator; installed as the package ``shike_fast.kernels``."""
