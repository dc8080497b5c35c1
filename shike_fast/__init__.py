"""Fast, tested multi-expert long-tail training (SHIKE, CVPR 2023).

``shike_fast.ops`` holds the loss and fusion operators, ``shike_fast.nn`` the modules built on them,
``shike_fast.models`` the networks. ``shike_fast.data`` and ``shike_fast.engine`` load long-tailed data sets and train;
the commands are ``python -m shike_fast.train``, ``python -m shike_fast.evaluate`` and ``python -m shike_fast.info``.
"""

from shike_fast import models, nn, ops
from shike_fast._version import __version__

__all__ = ["__version__", "models", "nn", "ops"]
