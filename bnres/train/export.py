"""Nets out of checkpoints, as files for other programs."""

import importlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnres.files import check_out, write_bytes
from bnres.fusion import fold
from bnres.models.trial import try_call
from bnres.train.checkpoint import read_checkpoint
from bnres.train.trained import config_of, load_trained
from bnres.train.weights import as_safetensors

FORMATS = ("pt2", "onnx", "safetensors")


class _OneInput(nn.Module):
    """A net with a forward of one named input, which is what export asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def export_checkpoint(
    path: Path,
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    *,
    folded: bool = True,
    format: str = "pt2",
) -> Path:
    """Writes a checkpoint's net, of torch's own operations, for batches of any size; returns the file.

    Args:
        path: a checkpoint of ``bnres train``.
        out: the file; by default the checkpoint's name with the ending of the format.
        size: height and width of the images; by default those it was trained on.
        folded: batch norms folded into the convolutions; not in safetensors.
        format: ``"pt2"`` is a torch.export archive, which `torch.export.load` reads without bnres.
            ``"safetensors"`` has the weights only, with a stock model's keys, averaged if the run
            averaged them.

    Raises:
        ValueError: if it is not a checkpoint, the net does not take such images, or for an unknown
            format.
        ModuleNotFoundError: if a package is missing that the format needs.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    out = path.with_suffix(f".{format}") if out is None else out
    check_out(out)
    if format == "safetensors" and size is not None:
        raise ValueError("size: a file of safetensors has weights only, which fit any size")
    if format == "onnx":
        importlib.import_module("onnxscript")  # it needs onnx
    content = read_checkpoint(path)
    config = config_of(
        content, device="cpu", fused=False, sync_bn=False, cuda_graphs=False, channels_last=False
    )
    model = load_trained(path, content, config)
    if format == "safetensors":
        write_bytes(out, as_safetensors(model))
        return out
    example = torch.zeros(2, content["channels"], *(size or content["size"]))
    try_call(model, example, "size: the net")
    if folded:
        model = fold(model, example)
    with torch.no_grad():
        program = torch.export.export(
            _OneInput(model), (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    write_bytes(out, as_onnx(program) if format == "onnx" else as_pt2(program))
    return out


def as_pt2(program: torch.export.ExportedProgram) -> Any:
    """An exported program as the content of an archive."""
    written = io.BytesIO()
    torch.export.save(program, written)
    return written.getbuffer()


def as_onnx(program: torch.export.ExportedProgram) -> bytes:
    """An exported program as the content of an ONNX file."""
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    return converted.model_proto.SerializeToString()
