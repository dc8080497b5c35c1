"""``python -m shike_fast``: says which commands there are."""

import sys

from shike_fast._util.cli import USAGE_ERROR, run_command

COMMANDS = {
    "train": "train a network on a long-tailed data set",
    "evaluate": "test a checkpoint on the test images of its data set",
    "predict": "classify a folder of images with a checkpoint",
    "export": "write a trained network as a program of PyTorch or ONNX, or for the Hugging Face Hub",
    "data": "check, pack or generate a data set",
    "info": "show versions, devices and kernels",
}


def main() -> int:
    """List the commands; the status is that of bad input, as this is none of them."""
    return run_command(_list)


def _list() -> int:
    width = max(map(len, COMMANDS))
    lines = [f"  python -m shike_fast.{name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    print("\n".join(["commands, each with --help:", *lines]))
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
