"""How the CUDA kernels of the expert losses share out a row over threads and blocks."""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def plan_of(plans, experts, rows, classes, processors, reducing):
    """Threads of a group, rows of a block and blocks of a row."""
    numbers = (ctypes.c_int * 3)()
    plans.loss_plan(experts, rows, classes, processors, reducing, numbers)
    return list(numbers)


@pytest.mark.parametrize("experts", [3, 8])
@pytest.mark.parametrize("group", [8, 64])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_each_class_has_one_thread(plans, experts, group, splits):
    for classes, shift in itertools.product((2, 7, 8, 9, 100, 1001), range(8 if experts == 3 else 4)):
        numbers = np.zeros((classes, 4), np.int32)
        plans.threads_of_classes(
            experts, classes, shift, group, splits, numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_int))
        )
        visits, visitor, servers, server = numbers.T
        assert (visits == 1).all() and (servers == 1).all()
        assert (visitor == server).all()


@settings(max_examples=300)
@given(st.integers(1, 8), st.integers(1, 2**22), st.integers(2, 2**16), st.sampled_from([20, 132, 170]), st.booleans())
def test_plan(plans, experts, rows, classes, processors, reducing):
    group, rows_of_block, splits = plan_of(plans, experts, rows, classes, processors, reducing)
    threads = group * rows_of_block
    assert group & (group - 1) == 0 and 8 <= group <= 256
    assert threads % 32 == 0 and 32 <= threads <= 256
    assert 1 <= splits <= 32 and (splits == 1 or (rows_of_block == 1 and group == 256))
    assert -(-rows // rows_of_block) * splits < 2**31
    chunk = 8 if experts <= 4 else 4
    assert group * splits * chunk <= 4 * max(classes, 16)  # few threads without work


def test_plan_of_known_sizes(plans):
    assert plan_of(plans, 3, 128, 100, 132, True) == [16, 2, 1]  # a class has its own thread; all processors work
    assert plan_of(plans, 3, 4096, 8142, 132, True) == [64, 2, 1]
    assert plan_of(plans, 3, 4, 65536, 132, True)[2] > 1
