"""How the CUDA kernels of the expert losses share out a row over threads and blocks."""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def plan_of(plans, experts, four_bytes, rows, classes, processors, reducing):
    """Threads of a group, rows of a block and blocks of a row."""
    numbers = (ctypes.c_int * 3)()
    plans.loss_plan(experts, four_bytes, rows, classes, processors, reducing, numbers)
    return list(numbers)


@pytest.mark.parametrize("chunk", [4, 8])
@pytest.mark.parametrize("group", [8, 64])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_each_class_has_one_thread(plans, chunk, group, splits):
    for classes, shift in itertools.product((2, 7, 8, 9, 100, 1001), range(16)):
        numbers = np.zeros((classes, 4), np.int32)
        plans.threads_of_classes(
            chunk, classes, shift, group, splits, numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_int))
        )
        visits, visitor, servers, server = numbers.T
        assert (visits == 1).all() and (servers == 1).all()
        assert (visitor == server).all()


PROCESSORS = st.sampled_from([20, 132, 170])


@settings(max_examples=300)
@given(st.integers(1, 8), st.booleans(), st.integers(1, 2**22), st.integers(2, 2**16), PROCESSORS, st.booleans())
def test_plan(plans, experts, four_bytes, rows, classes, processors, reducing):
    group, rows_of_block, splits = plan_of(plans, experts, four_bytes, rows, classes, processors, reducing)
    threads = group * rows_of_block
    assert group & (group - 1) == 0 and 8 <= group <= 256
    assert threads % 32 == 0 and 32 <= threads <= 256
    assert 1 <= splits <= 32 and (splits == 1 or (rows_of_block == 1 and group == 256))
    assert -(-rows // rows_of_block) * splits < 2**31
    chunk = 8 if experts <= 4 and not four_bytes else 4
    assert group * splits * chunk <= 4 * max(classes, 16)  # few threads without work
    assert splits == 1 or classes // (group * splits) >= (32 if reducing else 8)  # and none with hardly any


def test_plan_of_known_sizes(plans):
    assert plan_of(plans, 3, False, 128, 100, 132, True) == [16, 2, 1]  # all processors work
    assert plan_of(plans, 3, False, 4096, 8142, 132, True) == [64, 2, 1]
    assert plan_of(plans, 3, False, 4, 65536, 132, True)[2] > 1


# ---- rows in shared memory


def resident_plan_of(plans, experts, four_bytes, rows, classes, processors=132, of_processor=228, of_block=227):
    """Threads of a group, rows of a block, bytes of shared memory (0: not so), chunks of a thread; limits in KiB."""
    numbers = (ctypes.c_int * 4)()
    limits = of_processor << 10, of_block << 10
    plans.resident_plan(experts, four_bytes, rows, classes, processors, *limits, numbers)
    return list(numbers)


# Of 9.0, 8.0 and 8.6 or 8.9.
LIMITS = st.sampled_from([(228, 227), (164, 163), (100, 99)])


@settings(max_examples=300)
@given(st.integers(1, 4), st.booleans(), st.integers(1, 2**16), st.integers(2, 2**16), PROCESSORS, LIMITS)
def test_rows_in_shared_memory(plans, experts, four_bytes, rows, classes, processors, limits):
    of_processor, of_block = limits
    group, rows_of_block, bytes_, chunks = resident_plan_of(
        plans, experts, four_bytes, rows, classes, processors, of_processor, of_block
    )
    if bytes_ == 0:
        return
    threads = group * rows_of_block
    assert group & (group - 1) == 0 and 8 <= group <= 256 and threads % 32 == 0 and threads <= 256
    assert bytes_ + 1024 <= of_block << 10
    assert 2 * (bytes_ + 2048) <= of_processor << 10  # one block reads while the other works
    chunk = 4 if four_bytes else 8
    assert bytes_ == threads * chunks * chunk * experts * (4 if four_bytes else 2)
    assert group * chunks * chunk >= classes + 15  # every class has its place, whatever the row's alignment


def test_rows_that_are_kept(plans):
    for classes in (1000, 8142, 18000):
        assert resident_plan_of(plans, 3, False, 4096, classes)[2] > 0
    for classes in (1000, 8142, 9000):
        assert resident_plan_of(plans, 3, True, 4096, classes)[2] > 0
    for four_bytes, classes in ((False, 20000), (True, 10000)):
        assert resident_plan_of(plans, 3, four_bytes, 4096, classes)[2] == 0
    assert resident_plan_of(plans, 3, False, 2, 18000, processors=2000)[2] == 0  # several blocks share a row
