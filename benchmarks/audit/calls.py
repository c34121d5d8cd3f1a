"""Generates function calls that together launch the kernels in many specialisations.

A specialisation is one combination of the dtypes, constants and alignments of a kernel's arguments.
The called functions are those in `bnres.functional`, and `bnres.kernels.augment.augment`.

The parameters are read from the functions' signatures. For any two parameters, the calls cover all
pairs of their values, except values that exclude each other and values in ``OTHERS``.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from bnres import functional, use_backend, use_conv_route
from bnres.augment.compose import OUTPUT_DTYPES
from bnres.functional import BatchNormState
from bnres.kernels.augment import augment
from bnres.kernels.augment_plan import AugmentDraws, AugmentPlan
from bnres.kernels.conv_config import ConvShape
from bnres.kernels.device import ACTIVATIONS
from bnres.kernels.dtypes import SUPPORTED_DTYPES, acc_type
from bnres.operations.conv_route import KERNEL_DTYPES

Options = dict[str, Any]
Axes = dict[str, Sequence[Any]]

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
# Shapes and memory formats. Together they use every kind of tile, both full and partly filled.
INPUTS = {
    "planes": ((2, 8, 8, 16), CONTIGUOUS),
    "odd planes": ((2, 5, 7, 9), CONTIGUOUS),
    "small planes": ((2, 16, 7, 7), CONTIGUOUS),
    "channels_last": ((2, 64, 8, 8), LAST),
    "some channels": ((2, 24, 8, 8), LAST),
    "odd channels": ((2, 5, 7, 9), LAST),
}
# Inputs that need 64-bit offsets. Their memory is never accessed.
HUGE_INPUTS = {
    "huge planes": ((2, 64, 4096, 4104), CONTIGUOUS),
    "huge channels_last": ((2, 64, 4096, 4104), LAST),
}
WINDOW = ("kernel_size", "stride", "padding", "dilation")
# The values of ``WINDOW`` for a ResNet's max-pool. Our kernels support no other pooling.
POOLING = (3, 2, 1, 1)
# For each convolution: the number of output channels, and the values of ``WINDOW``.
CONVOLUTIONS = ((64, (3, 1, 1, 1)), (24, (1, 2, 0, 1)), (5, (3, 2, 2, 2)))
# For each parameter, the values that `pairs` combines.
VALUES: Axes = {
    "input": tuple(INPUTS),
    # One activation for each thing that forward may save for backward if there is a residual: relu
    # saves a bit mask, silu the residual, and identity neither.
    "act": ("relu", "identity", "silu"),
    "dtype": (torch.bfloat16, torch.float32, torch.float64),
    "kernel_size": (POOLING,),
    "conv_weight": CONVOLUTIONS,
    "groups": (1,),  # Our kernels don't support grouped convolutions.
    "memory_format": (CONTIGUOUS, LAST),
    "ceil_mode": (False,),
    "height": (8, 64),  # An 8×8 image needs one program, a 64×64 image several.
}
# Further values. `with_others` uses each of them in only two calls of a function.
OTHERS: Axes = {
    "act": tuple(act for act in ACTIVATIONS if act not in VALUES["act"]),
    "dtype": (torch.float16,),
}
# Names in `bnres.functional` that are not called. batch_norm equals batch_norm_act without residual
# and activation, BatchNormState is a type, and stem_conv2d launches none of our kernels.
NOT_CALLED = {"batch_norm", "BatchNormState", "stem_conv2d"}
PARAMETERS = ("input", "weight", "bias", "input_bias", "residual")
OPTIONAL: tuple[set[Any], ...] = (
    {Tensor, NoneType}, {Tensor, float}, {tuple[float, ...], NoneType}, {BatchNormState, NoneType},
)  # fmt: skip
# The fields of the residual's BatchNormState are varied too. Their names get this prefix.
RESIDUAL = "residual_"
# These names are not varied by themselves. The values of kernel_size and conv_weight include the
# stride, padding and dilation. The width equals the height. ``return`` is the result's annotation.
# No specialisation depends on the other names.
FIXED = {
    "act_kwargs", "eps", "residual_eps", "stride", "padding", "dilation", "width", "return",
    "process_group",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call of a function. If ``options["grad"]`` is ``all``, the call's backward runs too."""

    name: str
    options: Options
    run: Callable[[Options], object]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def __call__(self) -> None:
        with use_backend("triton"), use_conv_route("kernel"):
            self.run(self.options)


def pairs(axes: Axes) -> Iterator[Options]:
    """Yields dictionaries with one value for each axis.

    For any two axes, every pair of their values occurs at least once.
    """
    names = list(axes)
    left = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    while left:
        chosen = dict(min(sorted(pair) for pair in left))
        for name in names:
            if name not in chosen:
                gains = [
                    sum(frozenset(((name, i), item)) in left for item in chosen.items())
                    for i in range(len(axes[name]))
                ]
                chosen[name] = gains.index(max(gains))
        left -= {frozenset(items) for items in itertools.combinations(chosen.items(), 2)}
        yield {name: axes[name][chosen[name]] for name in names}


def parameters_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of a function's parameters, by name.

    The fields of a `BatchNormState` are added, with the prefix ``RESIDUAL``.
    """
    found = {}
    for name, hint in get_type_hints(function).items():
        found[name] = hint
        if BatchNormState in get_args(hint):
            fields = get_type_hints(BatchNormState).items()
            found |= {f"{RESIDUAL}{field}": of_field for field, of_field in fields}
    return found


def axes_of(function: Callable[..., Any]) -> Axes:
    """Returns the values to try for each parameter of ``function``, and the dtypes to try.

    Raises:
        ValueError: if neither ``VALUES`` nor the annotation tells the values of a parameter.
    """
    found: Axes = {"dtype": VALUES["dtype"]}
    for name, hint in parameters_of(function).items():
        if name in FIXED:
            continue
        kinds = set(get_args(hint))
        if name in VALUES:
            found[name] = VALUES[name]
        elif hint is bool:
            found[name] = (True, False)
        elif hint is Tensor:
            found[name] = (True,)
        elif kinds in OPTIONAL:
            found[name] = (True, False)
        else:
            raise ValueError(
                f"parameter {name} of {function.__name__} must have values in VALUES, or be a bool "
                f"or a tensor, got {hint}"
            )
    return found


def all_calls() -> list[Call]:
    """Lists calls of each function in `bnres.functional` and of the augmentation kernels."""
    names = sorted(set(functional.__all__) - NOT_CALLED)
    return [*itertools.chain(*map(functional_calls, names)), *augment_calls()]


def functional_calls(name: str) -> Iterator[Call]:
    """Yields calls of a function in `bnres.functional`."""
    function = getattr(functional, name)
    axes = axes_of(function) | {"same_dtype": (True, False)}
    others = {name: values for name, values in OTHERS.items() if name in axes}
    modes = [(True, "all"), (False, "all"), (False, "none")]
    if "kernel_size" in axes or "conv_weight" in axes:
        # These kernels treat all sizes of contiguous inputs alike, so the keys "odd planes" and
        # "small planes" of INPUTS are left out.
        axes["input"] = tuple(name for name in INPUTS if not name.endswith(" planes"))
    if "kernel_size" in axes:
        # In fp64 the function calls torch's pooling.
        axes["dtype"] = tuple(dtype for dtype in axes["dtype"] if dtype != torch.float64)
    if "conv_weight" in axes:
        others["input"] = tuple(HUGE_INPUTS)
        # In training, with gradients or in fp64, the function calls torch's convolution.
        modes = [(False, "none")]
        axes["dtype"] = tuple(dtype for dtype in axes["dtype"] if dtype in KERNEL_DTYPES)
    if "process_group" in parameters_of(function):
        modes = [(True, "all"), (True, "none")]
        axes["residual_input_bias"] = (False,)
    for training, grad in modes:
        mode = {"training": (training,), "grad": (grad,)}
        for options in with_others(axes | mode, others):
            yield Call(name, _consistent(options), partial(_run_functional, function))
        others = {}  # Only the first mode uses ``others``.


def with_others(axes: Axes, others: Axes) -> Iterator[Options]:
    """Yields the `pairs` of ``axes``, then two more dictionaries for each value in ``others``.

    One of the two has the first value of every other axis. The second has the last value of every
    other axis.
    """
    yield from pairs(axes)
    for name, values in others.items():
        for value, end in itertools.product(values, (0, -1)):
            options = {axis: known[end] for axis, known in axes.items()} | {name: value}
            if "fork" in options:
                options["fork"] = False  # fork=True is tried only with the values in VALUES
            yield options


def _consistent(options: Options) -> Options:
    """Returns a copy of the options in which values that exclude each other are replaced."""
    fixed = dict(options)
    if fixed.get("residual_norm"):
        fixed["residual"] = True
    for of in ("", "residual_"):
        if f"{of}running_mean" in fixed:
            # Evaluation needs a running mean and variance. Training needs both or neither.
            fixed[f"{of}running_mean"] |= not fixed["training"]
            fixed[f"{of}running_var"] = fixed[f"{of}running_mean"]
    if fixed["input"] in HUGE_INPUTS:
        fixed["dtype"] = torch.bfloat16
        if "conv_weight" in fixed:
            # A contiguous input would be copied, but the memory of huge inputs must not be read.
            fixed["input"], fixed["conv_weight"] = "huge channels_last", CONVOLUTIONS[0]
    return fixed


def _run_functional(function: Callable[..., Any], options: Options) -> None:
    if "process_group" in parameters_of(function) and not dist.is_initialized():
        # A group of two processes, of which only this one exists. Nothing is sent.
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    shape, memory_format = (INPUTS | HUGE_INPUTS)[options["input"]]
    dtype = options["dtype"]
    parameter_dtype = dtype if options["same_dtype"] else acc_type(torch.empty(0, dtype=dtype))
    channels = shape[1]
    arguments: Options = {}
    output = shape
    if "kernel_size" in options:
        arguments = dict(zip(WINDOW, options["kernel_size"], strict=True))
    if "conv_weight" in options:
        channels, (kernel, *window) = options["conv_weight"]
        arguments = dict(zip(WINDOW[1:], window, strict=True))
        output = (
            shape[0],
            channels,
            *ConvShape(kernel, kernel, *_twice(window)).output_size(*shape[2:]),
        )
        size = (channels, shape[1], kernel, kernel)
        arguments["conv_weight"] = torch.empty(size, dtype=dtype, memory_format=LAST)

    def tensor(name: str) -> Tensor:
        if name == "input":
            return torch.empty(shape, dtype=dtype, memory_format=memory_format)
        if name == "residual":
            return torch.empty(output, dtype=dtype, memory_format=memory_format)
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        if name.endswith("momentum"):
            return torch.tensor(0.1)
        return torch.empty(channels, dtype=dtype if name == "conv_bias" else parameter_dtype)

    for name, hint in parameters_of(function).items():
        if name in arguments or name in FIXED or name in ("kernel_size", "groups", "residual_norm"):
            continue
        is_tensor = hint is Tensor or Tensor in get_args(hint)
        value = options.get(name, True)
        if is_tensor:
            arguments[name] = tensor(name) if value else 0.1 if float in get_args(hint) else None
        else:
            arguments[name] = value
    state = {
        field: arguments.pop(RESIDUAL + field)
        for field in BatchNormState._fields
        if RESIDUAL + field in arguments
    }
    if options.get("residual_norm"):
        arguments["residual_norm"] = BatchNormState(**state)
    wanted = PARAMETERS if options["grad"] == "all" else ()
    leaves = [t for name in wanted if (t := arguments.get(name)) is not None]
    if options["grad"] == "all" and options.get("residual_norm"):
        leaves += [t for name in ("weight", "bias", "input_bias") if (t := state[name]) is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y = function(**arguments)
    outputs = [y] if isinstance(y, Tensor) else list(dict.fromkeys(y))
    if leaves:
        torch.autograd.grad(outputs, leaves, [torch.empty_like(t) for t in outputs])


def _twice(values: Sequence[int]) -> Iterator[int]:
    """Yields each value twice, once for the height and once for the width."""
    return (value for value in values for _ in range(2))


def augment_calls() -> Iterator[Call]:
    """Yields calls of the augmentation kernels."""
    axes: Axes = axes_of(AugmentPlan)
    axes |= {"channels": (3, 1), "source": (torch.uint8, torch.float32)}
    axes["dtype"] = OUTPUT_DTYPES
    others: Axes = {"source": SUPPORTED_DTYPES}
    # For large images, a separate kernel computes the contrast.
    for mode in ({}, {"has_contrast": (True,), "height": (64,)}):
        for options in with_others(axes | mode, others):
            yield Call("augment", options, _run_augment)


def _run_augment(options: Options) -> None:
    plan = {name: value for name, value in options.items() if name not in ("channels", "source")}
    channels, size = options["channels"], options["height"]
    for name in ("mean", "std"):
        plan[name] = (0.5,) * channels if options["mean"] else None
    images = torch.empty((2, channels, size, size), dtype=options["source"])
    draws = AugmentDraws(
        torch.empty((2, 6), dtype=torch.int32), torch.empty((2, 2), dtype=torch.int32),
        torch.empty((2, 4)),
    )  # fmt: skip
    augment(images, draws, AugmentPlan(**plan, width=size))
