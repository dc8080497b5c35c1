"""Training engine behind ``python -m shike_fast.train`` and ``python -m shike_fast.evaluate``."""
