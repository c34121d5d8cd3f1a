"""Makes the inputs of the timed operations, and computes the expected results with torch."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sites import ConvSite, Site

EPS = 1e-5
MOMENTUM = 0.1
POOL = (3, 2, 1)  # The stem's max-pool has this window, stride and padding.
DIRECTIONS = ("forward", "backward", "eval")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Norm:
    """Parameters and running statistics of a batch norm, each of shape (C,) in fp32."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var


@dataclass
class Inputs:
    """Inputs of an operation, and the gradients of its outputs.

    Attributes:
        x: input of shape (N, C, H, W).
        norm: batch norm of ``x``, or of the convolution's output.
        residual: residual of the output's shape, if the operation adds one.
        residual_norm: batch norm of the residual, if the operation has one.
        filter: weight of shape (K, C, R, S), if the operation has a convolution.
        gradients: gradients of the outputs. It is empty if the direction is not ``backward``.
    """

    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    filter: Tensor | None
    gradients: tuple[Tensor, ...]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients backward computes, in the order of the gradients."""
        found = [self.x, self.norm.weight, self.norm.bias, self.residual]
        if self.residual_norm is not None:
            found += [self.residual_norm.weight, self.residual_norm.bias]
        return [t for t in found if t is not None]

    @property
    def buffers(self) -> list[Tensor]:
        """The running statistics. A forward in training updates them."""
        others = () if self.residual_norm is None else self.residual_norm.buffers
        return [*self.norm.buffers, *others]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Returns a copy with all tensors in ``dtype``."""

        def copy(value: object) -> object:
            if isinstance(value, Tensor):
                # copy=True also copies a tensor that already has this dtype.
                return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
            if isinstance(value, tuple):
                return tuple(copy(v) for v in value)
            if isinstance(value, Norm):
                return Norm(*(copy(getattr(value, f.name)) for f in fields(Norm)))  # type: ignore[arg-type]
            return value

        return Inputs(*(copy(getattr(self, f.name)) for f in fields(Inputs)))  # type: ignore[arg-type]


def smaller(site: Site | ConvSite) -> Site | ConvSite:
    """Returns a site with the same operation on 8 channels of 8×8 elements, for use on a CPU."""
    if isinstance(site, ConvSite):
        return replace(site, channels=8, size=8, out_channels=8)
    return replace(site, channels=8, size=8)


def make_inputs(
    site: Site | ConvSite,
    direction: str,
    batch: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Inputs:
    """Makes random inputs for a batch norm or convolution of a net.

    The parameters and running statistics differ from channel to channel.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def activation(shape: tuple[int, ...]) -> Tensor:
        return random(*shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])

    def gradient(shape: tuple[int, ...]) -> Tensor:
        """Makes a gradient dy whose mean is not zero, and that is correlated with x.

        dx depends on the sum of dy and on the sum of dy * xhat, where xhat is the normalised x. If
        these sums were close to zero, an error in them would not be noticed. The dy of a pooled
        output is not correlated with x.
        """
        skewed = random(*shape) + 1
        if shape == tuple(x.shape):
            skewed += 0.5 * x.detach()
        return skewed.to(dtype).contiguous(memory_format=LAYOUTS[layout])

    needs_grad = direction != "eval"
    operation = site.operation
    output = site.output_shape(batch) if isinstance(site, ConvSite) else site.shape(batch)
    channels = output[1]

    def norm() -> Norm:
        return Norm(
            (random(channels).abs() + 0.5).requires_grad_(needs_grad),
            (0.3 * random(channels)).requires_grad_(needs_grad),
            random(channels),
            random(channels).abs() + 0.5,
        )

    filter = None
    if isinstance(site, ConvSite):
        kernel = (site.window.kernel_h, site.window.kernel_w)
        scale = (site.channels * site.window.taps) ** -0.5
        filter = (scale * random(channels, site.channels, *kernel)).to(dtype)
        filter = filter.contiguous(memory_format=LAYOUTS[layout])
    x = activation(site.shape(batch))
    residual = activation(output) if "add" in operation else None
    pooled = (batch, channels, -(-output[2] // 2), -(-output[3] // 2))
    shape = pooled if operation == "bn_relu_pool" else output
    count = 0 if direction != "backward" else 2 if operation.endswith("fork") else 1
    return Inputs(
        x.requires_grad_(needs_grad),
        norm(),
        None if residual is None else residual.requires_grad_(needs_grad),
        norm() if operation.startswith("dual") else None,
        filter,
        tuple(gradient(shape) for _ in range(count)),
    )


def _batch_norm(x: Tensor, norm: Norm, training: bool) -> Tensor:
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, MOMENTUM, EPS
    )


def formula(site: Site | ConvSite, training: bool) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Returns a function that computes the operation with torch's own operations.

    The ReLU is computed in place, as in torchvision's ResNets.
    """
    operation = site.operation
    if isinstance(site, ConvSite):
        window = site.window

        def convolution(inputs: Inputs) -> tuple[Tensor, ...]:
            assert inputs.filter is not None
            y = F.conv2d(
                inputs.x, inputs.filter, None, (window.stride_h, window.stride_w),
                (window.padding_h, window.padding_w),
            )  # fmt: skip
            y = _batch_norm(y, inputs.norm, training)
            return (F.relu(y if inputs.residual is None else y + inputs.residual, inplace=True),)

        return convolution

    def batch_norm(inputs: Inputs) -> tuple[Tensor, ...]:
        y = _batch_norm(inputs.x, inputs.norm, training)
        residual = inputs.residual
        if inputs.residual_norm is not None and residual is not None:
            residual = _batch_norm(residual, inputs.residual_norm, training)
        if residual is not None:
            y = y + residual
        if operation != "bn":
            y = F.relu(y, inplace=True)
        if operation == "bn_relu_pool":
            y = F.max_pool2d(y, *POOL)
        return (y, y) if operation.endswith("fork") else (y,)

    return batch_norm
