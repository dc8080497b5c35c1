"""Trained networks as programs of ``torch.export`` and ONNX, which need nothing of this package.

A program takes uint8 pixels [B, 3, S, S] and returns probabilities, float32 [B, C]: normalisation and the vote of the
experts are inside. What is not inside, cutting a square of S pixels out of an image, is described by the metadata, a
JSON object with the class names.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shike_fast import ops
from shike_fast._util.optional import optional_library
from shike_fast.data.augment.batched import Normalise
from shike_fast.data.images.prepared import ImageTransform
from shike_fast.engine.classifier import ImageClassifier
from shike_fast.engine.exported import KEY
from shike_fast.errors import CheckpointError

TORCH, ONNX = ".pt2", ".onnx"

_METADATA_FILE = f"{KEY}.json"  # within a program of torch.export


class Deployed(nn.Module):
    """What a program holds: pixels -> normalised images -> logits of the experts -> probabilities.

    Args:
        network: ``network(images, stage=stage)`` -> [K, B, C].
        stage: whose classifiers.
        scores: logits [K, B, C] -> [B, C].
        transform: of the network's images.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, stage: int, scores: Callable[[Tensor], Tensor], transform: ImageTransform
    ) -> None:
        super().__init__()
        self.network = network
        self.stage = stage
        self.scores = scores
        self.with_channels = transform.with_channels
        normalise = Normalise(transform.mean, transform.std)
        self.register_buffer("scale", normalise.scale)
        self.register_buffer("shift", normalise.shift)

    def forward(self, pixels: Tensor) -> Tensor:
        images = self.with_channels(pixels.float() * self.scale + self.shift)
        return self.scores(self.network(images, stage=self.stage).float()).softmax(1)


def make_program(deployed: Deployed, size: int) -> torch.export.ExportedProgram:
    """The program of PyTorch's own operators, for any number of images.

    Args:
        deployed: on the CPU, in eval mode.
        size: S.
    """
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with ops.use_backend("reference"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about itself
        program = torch.export.export(deployed, (pixels,), dynamic_shapes=({0: batch},), strict=False)
        return program.run_decompositions()


def torch_program(program: torch.export.ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """The content of a file that ``torch.export.load`` reads."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={_METADATA_FILE: json.dumps(metadata)})
    return content.getvalue()


def onnx_program(program: torch.export.ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """The content of an ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch and onnxscript, about themselves
        exported: Any = torch.onnx.export(
            program, dynamo=True, input_names=["pixels"], output_names=["probabilities"], verbose=False
        )
    proto = exported.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    proto.metadata_props.add(key=KEY, value=json.dumps(metadata))
    content: bytes = proto.SerializeToString()
    return content


# ---- running them


@dataclass(frozen=True)
class PixelTransform(ImageTransform):
    """Cuts out a square as :class:`ImageTransform` does, and leaves the pixels as they are: uint8 [3, S, S]."""

    def with_channels(self, images: Tensor) -> Tensor:
        return images.round().to(torch.uint8)


class ProgramClassifier(ImageClassifier):
    """An exported program that classifies images on the CPU.

    Attributes:
        metadata: what the file says of its network.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], metadata: dict[str, Any], source: Path) -> None:
        self._run = run
        self.metadata = metadata
        try:
            self.class_names = tuple(metadata["class_names"])
            described = metadata["transform"]
            # x / 255 less 0, over 1/255: as float as normalised pixels are, and the value of the pixel again.
            self.transform = PixelTransform(3, described["size"], (0.0,) * 3, (1 / 255,) * 3, described["margin"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{source}: what it says of its network cannot be read ({error!r})") from error

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def probabilities(self, images: Tensor) -> Tensor:
        return self._run(images)


def load_program(source: Path) -> ProgramClassifier:
    """Read a program that ``shike_fast.export`` wrote; its ending says of which kind it is.

    Raises:
        CheckpointError: it cannot be read, or another program wrote it.
        ConfigError: onnxruntime is not installed.
    """
    if not source.is_file():
        raise CheckpointError(f"checkpoint {source} does not exist")
    run, described = (_torch if source.suffix == TORCH else _onnx)(source)
    if not described:
        raise CheckpointError(f"{source}: was not written by shike_fast.export, it names no classes")
    try:
        metadata = json.loads(described)
    except ValueError as error:
        raise CheckpointError(f"{source}: what it says of its network cannot be read ({error})") from error
    return ProgramClassifier(run, metadata, source)


def _torch(source: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    files = {_METADATA_FILE: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about itself
            program: Any = torch.export.load(source, extra_files=files).module()
    except Exception as error:  # on damaged bytes the reader raises a dozen unrelated types
        raise CheckpointError(f"{source}: cannot be read as a program ({_first_line(error)})") from error
    described: str | bytes = files[_METADATA_FILE]
    return program, described.decode() if isinstance(described, bytes) else described


def _onnx(source: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    runtime = optional_library("onnxruntime", f"{source} is an ONNX file, and running it")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # on damaged bytes the reader raises a dozen unrelated types
        raise CheckpointError(f"{source}: cannot be read as an ONNX file ({_first_line(error)})") from error

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])

    return run, session.get_modelmeta().custom_metadata_map.get(KEY, "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
