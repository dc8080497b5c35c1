"""Trials of ``expert_cross_entropy`` with a CPU backend broken in the way that the first argument names."""

import ctypes
import itertools
import json
import os
import signal
import sys

KIND = sys.argv.pop(1)
sys.path[:] = json.loads(sys.argv.pop(1))

import torch  # noqa: E402

from shike_fast.ops._dispatch import OPERATORS  # noqa: E402
from shike_fast.ops._trials import main  # noqa: E402

operator = OPERATORS["expert_cross_entropy"]
good = operator.backends["cpu"].function
calls = itertools.count(1)


def wrong_gradient_of_one_class(logits, *rest):
    first = logits if isinstance(logits, torch.Tensor) else logits[0]
    extra = 0.01 * first[..., 0].sum()
    return good(logits, *rest) + (extra - extra.detach()).to(torch.float32)


def past_the_end(logits, *rest):
    first = logits if isinstance(logits, torch.Tensor) else logits[0]
    memory = first.new_empty(16)
    ctypes.memset(memory.data_ptr() + memory.numel() * memory.element_size(), 0, 4)
    return good(logits, *rest)


def forever(*args):
    while True:
        pass


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def wrong_answer(*args):
    raise ValueError("cannot be\ncomputed")


BROKEN = {
    "good": good,
    "wrong": wrong_gradient_of_one_class,
    "nan": lambda *args: good(*args) * float("nan"),
    "not deterministic": lambda *args: good(*args) * (1 + 1e-6 * next(calls)),
    "past the end": past_the_end,
    "segmentation fault": lambda *args: ctypes.string_at(0),
    "killed": lambda *args: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda *args: os._exit(3),
    "forever": forever,
    "out of memory": out_of_memory,
    "exception": wrong_answer,
}
operator.add("cpu", BROKEN[KIND])

if __name__ == "__main__":
    main()
