"""Compares hashes of every operation's outputs, gradients and buffers with frozen.json.

The inputs are small integers, and every mean is over 2ⁿ values. So sums and means are exact, and
the hashes are the same on every machine.

If you change the results on purpose, write frozen.json again with
``TRITON_INTERPRET=1 python -m tests.test_frozen``. Say in the commit message why they changed.
"""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch

from bnres import use_conv_route
from bnres.functional import (
    BatchNormState,
    batch_norm_act,
    batch_norm_act_max_pool2d,
    conv2d_batch_norm_act,
)
from tests.device import DEVICE

RECORD = Path(__file__).with_name("frozen.json")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Activations that need neither transcendental functions nor inexact products.
ACTS = [(None, {}), ("relu", {}), ("leaky_relu", {"negative_slope": 0.25}), ("relu6", {})]
MODES = ("training", "frozen", "inference")
SHAPES = {"planes": (4, 6, 4, 4), "groups": (4, 16, 1, 4), "odd": (2, 5, 1, 2)}


def whole(shape, seed, dtype, low=-8, high=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE, dtype)


class Norm:
    """The tensors of a batch norm. Weight and bias require gradients."""

    def __init__(self, channels, seed, affine=True):
        acc = torch.float32
        self.running_mean = whole((channels,), seed, acc)
        self.running_var = whole((channels,), seed + 1, acc, 1, 9)
        self.weight = whole((channels,), seed + 2, acc, -4, 5).requires_grad_() if affine else None
        self.bias = whole((channels,), seed + 3, acc).requires_grad_() if affine else None
        self.counter = torch.tensor(3, device=DEVICE)

    @property
    def tensors(self):
        return self.running_mean, self.running_var, self.weight, self.bias

    @property
    def buffers(self):
        return self.running_mean, self.running_var, self.counter


def activation(shape, seed, dtype, layout):
    return whole(shape, seed, dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def single(shape, dtype, layout, mode, act, affine, residual, fork):
    x, bn = activation(shape, 0, dtype, layout), Norm(shape[1], 10, affine)
    other = activation(shape, 1, dtype, layout) if residual else None
    y = batch_norm_act(
        x, *bn.tensors, residual=other, act=act[0], act_kwargs=act[1], training=mode == "training",
        num_batches_tracked=bn.counter, fork=fork,
    )  # fmt: skip
    return y if fork else (y,), (x, other, bn.weight, bn.bias), bn.buffers


def two_norms(shape, dtype, layout, mode, act, affine, fork):
    x, other = (activation(shape, seed, dtype, layout) for seed in (0, 1))
    bn, second = Norm(shape[1], 10), Norm(shape[1], 20, affine)
    state = BatchNormState(*second.tensors, momentum=0.5, num_batches_tracked=second.counter)
    y = batch_norm_act(
        x, *bn.tensors, residual=other, residual_norm=state, act=act[0], act_kwargs=act[1],
        eps=0.25, training=mode == "training", num_batches_tracked=bn.counter, fork=fork,
    )  # fmt: skip
    tensors = (x, other, bn.weight, bn.bias, second.weight, second.bias)
    return y if fork else (y,), tensors, (*bn.buffers, *second.buffers)


def pooled(shape, dtype, layout, mode, act, affine):
    x, bn = activation(shape, 0, dtype, layout), Norm(shape[1], 10, affine)
    y = batch_norm_act_max_pool2d(
        x, *bn.tensors, kernel_size=3, stride=2, padding=1, act=act[0], act_kwargs=act[1],
        training=mode == "training", num_batches_tracked=bn.counter,
    )  # fmt: skip
    return (y,), (x, bn.weight, bn.bias), bn.buffers


def convolved(shape, dtype, layout, mode, act, affine, residual, conv_bias):
    x, bn = activation(shape, 0, dtype, layout), Norm(16, 10, affine)
    filter = whole((16, shape[1], 3, 3), 2, dtype, -2, 3).requires_grad_()
    bias = whole((16,), 3, dtype).requires_grad_() if conv_bias else None
    other = activation((shape[0], 16, *shape[2:]), 1, dtype, layout) if residual else None
    with use_conv_route("kernel"):
        y = conv2d_batch_norm_act(
            x, filter, bias, *bn.tensors, padding=1, residual=other, act=act[0], act_kwargs=act[1],
            training=mode == "training", num_batches_tracked=bn.counter,
        )  # fmt: skip
    return (y,), (x, other, bn.weight, bn.bias, bias), bn.buffers


def cases():
    """Yields each case's name, function and options.

    Each mode is combined with each value of each option, except that inference has no fork.
    """
    for shape, layout, mode in itertools.product(SHAPES, LAYOUTS, MODES):
        name = f"{shape}-{layout}-{mode}"
        common = {"shape": SHAPES[shape], "layout": layout, "mode": mode}
        for i, (act, residual) in enumerate(itertools.product(ACTS, (False, True))):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
            options = {"dtype": dtype, "act": act, "affine": i % 4 != 3, "residual": residual}
            fork = i % 2 == 1 and mode != "inference"
            yield f"single-{name}-{i}", single, {**common, **options, "fork": fork}
        for i, act in enumerate(ACTS):
            options = {"dtype": (torch.float32, torch.bfloat16)[i % 2], "act": act}
            options |= {"affine": i != 2, "fork": i == 1 and mode != "inference"}
            yield f"two_norms-{name}-{i}", two_norms, {**common, **options}
        for i in range(2):
            options = {"dtype": (torch.float32, torch.float16)[i], "act": ACTS[i + 1]}
            options |= {"affine": i == 0}
            yield f"pooled-{name}-{i}", pooled, {**common, **options}
        if shape != "odd":
            options = {"dtype": torch.float32, "act": ACTS[1], "affine": True}
            options |= {"residual": layout == "contiguous", "conv_bias": True}
            yield f"convolved-{name}", convolved, {**common, **options}


def bits(run, mode, **options):
    """Returns a short hash of a case's outputs, buffers and gradients."""
    with torch.set_grad_enabled(mode != "inference"):
        outputs, inputs, buffers = run(mode=mode, **options)
    found = [*outputs, *buffers]
    if mode != "inference":
        inputs = [t for t in inputs if t is not None]
        dys = [whole(y.shape, 30 + i, y.dtype, -3, 4) for i, y in enumerate(outputs)]
        found += torch.autograd.grad(outputs, inputs, dys)
    digest = hashlib.sha256()
    for t in found:
        t = t.detach().cpu().contiguous()
        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU fuses multiplication and addition, the interpreter does not"
)
@pytest.mark.parametrize(
    ("name", "run", "options"), list(cases()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_bits_match_the_record(name, run, options):
    assert bits(run, **options) == json.loads(RECORD.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    found = {name: bits(run, **options) for name, run, options in cases()}
    RECORD.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
