"""Exports the model of a checkpoint to a file for other programs."""

import importlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bnres.files import check_out, write_bytes
from bnres.fusion import fold
from bnres.models.trial import try_call
from bnres.train.checkpoint import read_checkpoint
from bnres.train.trained import config_of, load_trained
from bnres.train.weights import as_safetensors

FORMATS = ("pt2", "onnx", "safetensors")


class _FromPixels(nn.Module):
    """Scales uint8 images as in training, and returns the net's logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # torch.export checks that the tensor that `float` converts is uint8. Without `float`, the
        # exported model would accept images that are scaled already, and scale them again.
        return self.net((images.float() / 255 - self.mean) / self.std)


def export_checkpoint(
    path: Path,
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    *,
    folded: bool = True,
    format: str = "pt2",
) -> Path:
    """Exports the model of a checkpoint, and returns the path of the written file.

    The exported model accepts uint8 images (N, channels, height, width) in batches of any size. It
    scales the images as in training, and returns logits (N, classes). Images of another dtype raise
    an error. The exported model contains only torch's own operations. If the run averaged its
    weights, the averages are exported.

    Args:
        path: a checkpoint of ``bnres train``.
        out: the file to write. By default it is ``path`` with the format as its suffix.
        size: height and width of the images. By default they are the same as in training.
        folded: whether to fold batch norms into convolutions. It has no effect on safetensors.
        format: ``"pt2"`` is a torch.export archive, which `torch.export.load` reads without bnres.
            ``"onnx"`` is an ONNX model. ``"safetensors"`` is a file that has only the parameters
            and buffers, with the keys that the model has without fused layers.

    Raises:
        ValueError: if ``path`` is not a checkpoint, if ``out`` is a folder or is in a folder that
            does not exist, if the model does not accept images of ``size``, if the format is
            unknown, or if ``size`` is given for safetensors.
        ModuleNotFoundError: if a package that the format needs is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    out = path.with_suffix(f".{format}") if out is None else out
    check_out(out)
    if format == "safetensors" and size is not None:
        raise ValueError("size: safetensors holds only weights, which do not depend on the size")
    if format == "onnx":
        importlib.import_module("onnxscript")  # torch.onnx needs onnxscript, which needs onnx
    content = read_checkpoint(path)
    config = config_of(
        content, device="cpu", fused=False, sync_bn=False, cuda_graphs=False, channels_last=False
    )
    model = load_trained(path, content, config)
    if format == "safetensors":
        write_bytes(out, as_safetensors(model))
        return out
    channels = content["channels"]
    images = torch.zeros(2, channels, *(size or content["size"]))
    try_call(model, images, "size: the model")
    if folded:
        model = fold(model, images)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    mean, std = [0.0] * channels, [1.0] * channels
    if config.normalize:
        mean, std = content["mean"], content["std"]
    with torch.no_grad():
        program = torch.export.export(
            _FromPixels(model, mean, std),
            (images.to(torch.uint8),),
            dynamic_shapes=shapes,
        )
    written = io.BytesIO()
    if format == "onnx":
        converted = torch.onnx.export(
            program, output_names=["logits"], dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        assert converted is not None
        written.write(converted.model_proto.SerializeToString())
    else:
        torch.export.save(program, written)
    write_bytes(out, written.getbuffer())
    return out
