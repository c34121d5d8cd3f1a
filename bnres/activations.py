"""The activations a fused layer can end in: names, torch classes, and their formulas in torch."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_SLOPE = 0.01

# Formula of each activation; the second argument is leaky_relu's slope, unused by the others.
FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, p: z,
    "relu": lambda z, p: F.relu(z),
    "relu6": lambda z, p: F.relu6(z),
    "leaky_relu": lambda z, p: F.leaky_relu(z, p),
    "hardswish": lambda z, p: F.hardswish(z),
    "sigmoid": lambda z, p: z.sigmoid(),
    "silu": lambda z, p: F.silu(z),
    "gelu": lambda z, p: F.gelu(z),
    "gelu_tanh": lambda z, p: F.gelu(z, approximate="tanh"),
}

CLASSES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}


def resolve(act: str | type[nn.Module] | None, kwargs: dict[str, Any] | None) -> tuple[str, float]:
    """The kernel's name and parameter of an activation.

    Args:
        act: a name, a torch class or None for no activation.
        kwargs: the activation's options: ``negative_slope`` of leaky_relu, ``approximate`` of
            gelu; ``inplace`` is accepted and means nothing here.

    Raises:
        ValueError: for an unknown activation or option.
    """
    if isinstance(act, type):
        name = CLASSES.get(act, act.__name__)
    else:
        name = "identity" if act is None else act
    if name not in FORMULAS:
        raise ValueError(f"act must be one of {', '.join(FORMULAS)} or None, got {act!r}")
    options = dict(kwargs or {})
    options.pop("inplace", None)
    param = 0.0
    if name == "leaky_relu":
        param = float(options.pop("negative_slope", DEFAULT_SLOPE))
    if name == "gelu":
        approximate = options.pop("approximate", "none")
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate of gelu must be 'none' or 'tanh', got {approximate!r}")
        name = "gelu_tanh" if approximate == "tanh" else "gelu"
    if options:
        raise ValueError(f"act_kwargs of {name} do not include {', '.join(map(repr, options))}")
    return name, param
