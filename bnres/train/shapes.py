"""Refuses a net that does not fit the images and classes, before it is trained."""

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
    """Gives the parameters of `torch.nn.LazyLinear` and the like their sizes, by a call on zeros.

    Args:
        model: the net, on the CPU.
        name: of the net, for errors.
        images: channels, height and width of the images.

    Raises:
        ValueError: if the net takes no such images.
    """
    if any(map(is_lazy, model.parameters())):
        with torch.compiler.set_stance("force_eager"):
            try_call(model.eval(), torch.zeros(2, *images), f"model {name!r}")


def check_shapes(
    config: TrainConfig, model: nn.Module, name: str, images: tuple[int, int, int], classes: int
) -> None:
    """Calls a net on two images, in evaluation and in training; it changes no tensor of the net.

    Args:
        config: the run.
        model: the net, on ``config.device``.
        name: of the net, for errors.
        images: channels, height and width of the images.
        classes: how many there are.

    Raises:
        ValueError: if the net takes no such images, returns no (N, classes) or has no parameter to
            train, or as `_bf16_checked`.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model {name!r} has no parameter that requires a gradient")
    x = torch.zeros(2, *images, device=config.device)

    def in_training(images: Tensor) -> Any:
        tensors = chain(model.named_parameters(), model.named_buffers())
        return functional_call(model, {k: v.clone() for k, v in tensors}, (images,))

    devices = [config.device] if torch.device(config.device).type == "cuda" else []
    # A net that bnres.fuse has fused is not captured for these calls.
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
                    f"model {name!r} must return {shape_text(expected)} for {shape_text(x.shape)}, "
                    f"a number for each of {classes} classes, but in {mode} it returned {got}"
                )


@contextmanager
def _bf16_checked(
    config: TrainConfig, model: nn.Module, images: tuple[int, int, int]
) -> Iterator[None]:
    """Refuses a run whose weights torch's bf16 convolution on the CPU would fill with garbage.

    With AVX512 it leaves the gradient of a filter's outer taps unwritten where a convolution with a
    stride takes images one pixel wide, so that these taps see only padding (torch 2.11 to 2.14).

    Raises:
        ValueError: if the calls inside reach such a convolution.
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
            f"dtype: torch's bf16 convolution on the CPU gives wrong gradients for images one pixel "
            f"wide, which {narrow[0]} gets of images of {images[1]}×{images[2]}: take fp32, or larger "
            "ones"
        )
