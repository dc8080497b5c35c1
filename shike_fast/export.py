"""Write a trained network for others: ``python -m shike_fast.export --checkpoint FILE --format onnx model.onnx``.

``torch`` (.pt2, for ``torch.export.load``) and ``onnx`` are programs that need nothing of this package: uint8 pixels
[B, 3, S, S] in, probabilities [B, C] out, for any B. ``safetensors`` is a folder for the Hugging Face Hub, with
weights, ``config.json`` and a model card, or, if its name ends so, the file of weights alone; this package reads both.
Every format holds the class names and the transform of the images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shike_fast._util.cli import ArgumentParser, run_command
from shike_fast._util.files import atomic_write, check_output_file, naming
from shike_fast._util.optional import optional_library
from shike_fast._util.plugins import add_plugin_option, parse_with_plugins
from shike_fast.engine.classifier import Classifier
from shike_fast.engine.exported import KEY, SUFFIX, WEIGHTS, metadata_of, weights_of
from shike_fast.engine.foreign import ForeignData
from shike_fast.engine.inference import read_state, trained_from
from shike_fast.engine.model_card import CARD, CONFIG, is_card, model_card
from shike_fast.engine.programs import (
    ONNX,
    TORCH,
    Deployed,
    load_program,
    make_program,
    onnx_program,
    torch_program,
)
from shike_fast.engine.state import with_average
from shike_fast.errors import ConfigError, RunError

_SUFFIXES = {"torch": TORCH, "onnx": ONNX}
_BATCHES = (1, 2, 7)  # of the check
_CLOSE = 1e-4  # of a probability
_MOST_ONNX = 2**31 - 2**20  # bytes of weights; the rest is for the graph


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.export``."""
    parser = ArgumentParser(prog="python -m shike_fast.export", description=__doc__)
    add = parser.add_argument
    add("output", type=Path, metavar="OUT", help="file to write; with safetensors a folder")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="best.pt or last.pt of a run directory")
    add("--format", required=True, choices=("torch", "onnx", "safetensors"), help="what to write")
    add("--stage", type=int, metavar="N", help="of the method, from 1; default the one the checkpoint was training")
    ForeignData.add_options(parser)
    add_plugin_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(lambda: _export(parse_with_plugins(make_parser, argv)))


def _export(arguments: dict[str, Any]) -> int:
    output, kind, source = arguments["output"], arguments["format"], arguments["checkpoint"]
    _check_output(output, kind)
    if kind == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            optional_library(module, "--format onnx")
    state = read_state(source, ForeignData.of(arguments).load())
    trained = trained_from(state, source, arguments["stage"], {"device": "cpu", "amp": "off"})
    if trained.config.ema:
        state = with_average(state, source)
    classifier = Classifier(trained, source)
    if kind == "onnx":
        _check_size(classifier)
    metadata = metadata_of(state, classifier.transform, trained.stage)
    if kind == "safetensors":
        _write_weights(output, weights_of(state, metadata), metadata)
    else:
        _write_program(output, kind, classifier, metadata)
    print(f"{output}: {trained.config.model}, {len(classifier.class_names)} classes, as {kind}")
    return 0


def _check_output(output: Path, kind: str) -> None:
    """Refuse, before the work, what cannot be written, or would replace what no export wrote.

    Raises:
        ConfigError: saying so.
    """
    suffix = _SUFFIXES.get(kind)
    if suffix is not None and output.suffix != suffix:
        raise ConfigError(f"OUT: a file of --format {kind} must end with {suffix}, got {output}")
    if suffix is not None or output.suffix == SUFFIX:
        check_output_file("OUT", output, lambda path: KEY.encode() in path.read_bytes(), "is no export")
    elif output.exists() and not output.is_dir():
        raise ConfigError(f"OUT: {output} is a file; name a folder, or a file that ends with {SUFFIX}")
    elif output.exists():
        check_output_file("OUT", output / CARD, is_card, "was not written by this command")
        visible = {path.name for path in output.iterdir() if not path.name.startswith(".")}
        if visible and CARD not in visible:
            raise ConfigError(
                f"OUT: {output} holds other files than an export, such as {min(visible)}; name a new folder"
            )
    else:
        check_output_file("OUT", output, lambda path: True, "")


def _check_size(classifier: Classifier) -> None:
    size = sum(tensor.nbytes for tensor in classifier.network.state_dict().values())
    if size > _MOST_ONNX:
        raise ConfigError(
            f"--format onnx: the network has {size / 2**30:.1f} GiB, more than the 2 that one such file holds; "
            "use --format torch"
        )


def _write_weights(output: Path, content: bytes, metadata: dict[str, Any]) -> None:
    if output.suffix == SUFFIX:
        atomic_write(output, content)
        return
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / WEIGHTS, content)
    atomic_write(output / CONFIG, (json.dumps(metadata, indent=2) + "\n").encode())
    atomic_write(output / CARD, model_card(metadata).encode())


def _write_program(output: Path, kind: str, classifier: Classifier, metadata: dict[str, Any]) -> None:
    """Write a program, read it again, and compare its probabilities with those of the network.

    Raises:
        RunError: they differ; the file is not kept.
    """
    trained, size = classifier.trained, classifier.transform.size
    classifier.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    deployed = Deployed(classifier.network, trained.classifiers, trained.scores, classifier.transform).eval()
    program = make_program(deployed, size)
    atomic_write(output, (torch_program if kind == "torch" else onnx_program)(program, metadata))
    written = load_program(output)
    random = torch.Generator().manual_seed(0)
    for batch in _BATCHES:
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=random)
        with torch.inference_mode():
            difference = (written.probabilities(pixels) - deployed(pixels)).abs().max().item()
        if not difference <= _CLOSE:
            output.unlink()
            raise RunError(
                f"{output}: its probabilities differ from the network's by {difference:.2g} for {batch} images, more "
                f"than {_CLOSE:g}; the file was removed"
            )


if __name__ == "__main__":
    sys.exit(main())
