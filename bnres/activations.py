"""The names, torch classes and options of the activations that can be fused."""

from typing import Any

from torch import nn

from bnres.kernels.reference import ACTIVATION_FORMULAS

DEFAULT_SLOPE = 0.01

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

_NAMES: dict[Any, str] = {None: "identity", **CLASSES, **{n: n for n in ACTIVATION_FORMULAS}}


def resolve(act: str | type[nn.Module] | None, kwargs: dict[str, Any] | None) -> tuple[str, float]:
    """Returns the kernels' name for an activation, and the activation's parameter.

    The parameter is the negative slope of leaky_relu. It is 0 for all other activations.

    Args:
        act: a name or a torch class; None means no activation.
        kwargs: the activation's options, or None. leaky_relu has the option ``negative_slope``,
            and gelu has ``approximate``. The option ``inplace`` is ignored.

    Raises:
        ValueError: for an unknown activation or option, or an unknown value of ``approximate``.
    """
    if act not in _NAMES:
        raise ValueError(
            f"act must be one of {', '.join(ACTIVATION_FORMULAS)} or None, got {act!r}"
        )
    name = _NAMES[act]
    param = DEFAULT_SLOPE if name == "leaky_relu" else 0.0
    if not kwargs:
        return name, param
    options = {option: value for option, value in kwargs.items() if option != "inplace"}
    if name == "leaky_relu":
        param = float(options.pop("negative_slope", param))
    if name == "gelu":
        approximate = options.pop("approximate", "none")
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate of gelu must be 'none' or 'tanh', got {approximate!r}")
        name = "gelu_tanh" if approximate == "tanh" else "gelu"
    if options:
        raise ValueError(f"act_kwargs of {name} do not include {', '.join(map(repr, options))}")
    return name, param


def as_module(act: str | None) -> nn.Module:
    """Returns a torch module that applies the activation named ``act``; None means no activation.

    Raises:
        ValueError: for an unknown activation.
    """
    name, _ = resolve(act, None)
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return {name: cls for cls, name in CLASSES.items()}[name]()
