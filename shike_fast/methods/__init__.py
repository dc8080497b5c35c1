"""Training methods by name: what a run learns by, and in which stages.

``create_method("shike", class_counts=counts)`` makes one, ``list_methods()`` names them, ``register_method`` adds one.
"""

from shike_fast._util.options import Check, at_least, at_most, not_negative, option, positive
from shike_fast.methods import shike  # noqa: F401  (registers it: the default comes first)

# isort: split
from shike_fast.methods import cross_entropy  # noqa: F401

# isort: split
from shike_fast.methods import (  # noqa: F401
    balanced_softmax,
    balpoe,
    cb,
    crt,
    focal,
    la,
    ldam_drw,
    los,
    lws,
    mdcs,
    ncl,
    ncl_plus,
    ncm,
    reslt,
    ride,
    sade,
    tau_norm,
    tcl,
)
from shike_fast.methods.base import Method, Stage, all_but_second_classifiers, second_classifiers
from shike_fast.methods.registry import create_method, find_method, list_methods, register_method

__all__ = [
    "Check",
    "Method",
    "Stage",
    "all_but_second_classifiers",
    "at_least",
    "at_most",
    "create_method",
    "find_method",
    "list_methods",
    "not_negative",
    "option",
    "positive",
    "register_method",
    "second_classifiers",
]
