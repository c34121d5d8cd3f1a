"""Checks before training that a model fits the data."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from bnres.models.trial import shape_text, try_call
from bnres.train.config import TrainConfig


def initialize_lazy_modules(model: nn.Module, name: str, images: tuple[int, int, int]) -> None:
    """Initialises lazy modules, such as `torch.nn.LazyLinear`, of a model on the CPU.

    ``images`` is the channels, height and width of the images.
    """
    if any(map(is_lazy, model.parameters())):
        with torch.compiler.set_stance("force_eager"):
            try_call(model.eval(), torch.zeros(2, *images), f"model {name!r}")


def check_shapes(
    config: TrainConfig, model: nn.Module, name: str, images: tuple[int, int, int], classes: int
) -> None:
    """Checks that a model accepts the images and returns logits of shape (N, classes).

    The model is called on two images of zeros, once in eval mode and once in training mode. Its
    parameters and buffers are not changed. ``images`` is the channels, height and width of the
    images.

    The model is also refused if no parameter requires a gradient, or if bf16 would give wrong
    gradients.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model {name!r} has no parameter that requires a gradient")
    x = torch.zeros(2, *images, device=config.device)

    def in_training(images: Tensor) -> Any:
        tensors = chain(model.named_parameters(), model.named_buffers())
        return functional_call(model, {k: v.clone() for k, v in tensors}, (images,))

    devices = [config.device] if torch.device(config.device).type == "cuda" else []
    # With force_eager, bnres.fuse captures no graphs for these calls, which only check shapes.
    with (
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
        _bf16_checked(config, model, images),
    ):
        for mode, call in (("evaluation", model), ("training", in_training)):
            model.train(mode == "training")
            y = try_call(call, x, f"model {name!r}")
            expected = (2, classes)
            got = shape_text(tuple(y.shape)) if isinstance(y, Tensor) else type(y).__name__
            if not isinstance(y, Tensor) or y.shape != expected:
                raise ValueError(
                    f"model {name!r} must return {shape_text(expected)}, a number for each of "
                    f"{classes} classes, for an input of {shape_text(x.shape)}, but in {mode} it "
                    f"returned {got}"
                )


@contextmanager
def _bf16_checked(
    config: TrainConfig, model: nn.Module, images: tuple[int, int, int]
) -> Iterator[None]:
    """Raises a ValueError on exit if a bug of torch's bf16 convolution makes gradients wrong.

    The bug occurs in torch 2.11 to 2.14 on CPUs with AVX512. It affects convolutions with a filter
    wider than one pixel and a horizontal stride above 1, if their input is one pixel wide. The
    filter's outer columns then overlap only padding, and torch does not initialise their gradient.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    on_cpu = torch.device(config.device).type == "cpu"
    if not on_cpu or config.dtype != "bf16" or not capability.startswith("AVX512"):
        yield
        return
    narrow: list[str] = []
    handles = [
        module.register_forward_pre_hook(
            lambda conv, inputs, name=name: (
                narrow.append(name) if inputs[0].shape[-1] == 1 else None
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride[1] > 1 < module.kernel_size[1]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if narrow:
        raise ValueError(
            "dtype: torch's bf16 convolution on the CPU gives wrong gradients for inputs one pixel "
            f"wide, such as those of {narrow[0]!r} for images of {images[1]}×{images[2]}; use fp32 "
            "or larger images"
        )
