"""Tests that fusing a random module changes neither its results nor the error that it raises.

``python -m tests.test_fuse_random SEED [COUNT]`` tests COUNT modules (by default one), whose seeds
are SEED, SEED + 1 and so on. It prints the modules that fail.
"""

import copy
import linecache
import logging
import os
import random
import sys
import types
from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import nn

import bnres
from bnres.fusion.dynamo import graph_breaks
from tests.device import DEVICE
from tests.random_modules import write_module
from tests.recorded_sites import recorded_sites

FIRST_SEED = int(os.environ.get("BNRES_FIRST_SEED", "0"))
STEPS = 4


def load(source: str, name: str) -> type[nn.Module]:
    """Runs ``source`` as a module called ``name``, and returns its class ``Net``.

    The module and its source are registered, so that Dynamo finds them.
    """
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    return module.Net


def build(cls: type[nn.Module], seed: int, dtype: torch.dtype) -> nn.Module:
    """Returns a module whose norms have random parameters and statistics.

    In fp64 a norm's first weight may be 0. Then every output of the first channel is the first
    bias, which may be 0 or 6, the bounds of relu6. In fp32 no weight is 0: the channel would be
    constant, and a later norm would divide its rounding errors by sqrt(eps), which is small.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = cls().to(DEVICE, dtype)
    for module in model.modules():
        if "running_var" not in module._buffers:
            continue
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5)
                if rng.random() < 0.15 and "running" not in name and dtype == torch.float64:
                    tensor.data[0] = 0
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.bias.data[0] = rng.choice((0.0, 6.0, 0.125))
    return model


def change_of(rng: random.Random, model: nn.Module) -> str:
    """Returns a statement that changes ``model`` between two steps, as in a training loop."""
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norm = f"model.get_submodule({rng.choice(norms)!r})" if norms else "model"
    return rng.choice(
        [
            "model.flag = not model.flag", "model.scale += 1", "model.eval()", "model.train()",
            f"{norm}.train(not {norm}.training)", f"{norm}.momentum = 0.7",
            f"{norm}.momentum = None", f"{norm}.eps = 0.01", f"{norm}.requires_grad_(False)",
            "model.requires_grad_(False)", "model.requires_grad_(True)", "pass", "pass",
        ]
    )  # fmt: skip


def step(model: nn.Module, x: torch.Tensor, seed: int, leaf: bool, grad: bool) -> dict:
    """Runs a forward and a backward. Returns their results, and tensors that they may change."""
    found: dict = {}
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_(leaf)
    given = x if not leaf or seed % 2 else x * 1  # unlike a leaf, x * 1 may be written
    with torch.set_grad_enabled(grad):
        try:
            outputs = model(given)
            # `is_leaf` raises for a view that a write to the view's base has made invalid.
            found["kinds"] = [(t.dtype, t.requires_grad, t.is_leaf, t.stride()) for t in outputs]
        except Exception as error:
            return {"forward error": error}
    found["outputs"] = [t.detach().clone() for t in outputs]
    shared = [given, *outputs, *model.parameters(), *model.buffers()]
    places = [t.untyped_storage().data_ptr() for t in shared]
    found["aliases"] = [places.index(place) for place in places]
    loss = sum(
        (
            t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)
        ).sum()
        for t in outputs
        if t.requires_grad
    )
    found["input"] = given.detach().clone()
    found["buffers"] = [t.detach().clone() for t in model.buffers()]
    found["parameters"] = [t.detach().clone() for t in model.parameters()]
    if torch.is_tensor(loss) and grad:
        try:
            loss.backward()
        except RuntimeError as error:
            found["backward error"] = error
        found["gradients"] = [p.grad for p in (x, *model.parameters()) if p.is_leaf]
        found["buffers after"] = [t.detach().clone() for t in model.buffers()]
    return found


def difference(found: dict, expected: dict, tolerance: float) -> str:
    """Returns a description of the first difference from the stock module, or "" if all agree."""
    if "forward error" in expected or "forward error" in found:
        errors = [each.get("forward error") for each in (found, expected)]
        if type(errors[0]).__name__ == "InternalTorchDynamoError":
            return ""  # a bug of Dynamo: torch's "eager" backend raises the same error
        same = None not in errors and isinstance(errors[0], type(errors[1]))
        return "" if same else f"forward: {errors[0]!r:.600}, stock {errors[1]!r:.300}"
    if "backward error" in expected:
        # The model has written to a tensor that the stock module saves for backward. The fused
        # module saves fewer tensors, so its backward may succeed.
        for name in ("gradients", "buffers after"):
            found.pop(name), expected.pop(name)
        found["backward error"] = expected["backward error"]
    if set(found) != set(expected):
        return f"backward: {found.get('backward error')!r}"
    for name, values in expected.items():
        if name == "backward error":
            continue
        for i, (a, b) in enumerate(zip(found[name], values, strict=True)):
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                if a is not b and a != b:
                    return f"{name} {i}: {a} instead of {b}"
                continue
            scale = max(1.0, b.double().nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 1)
            a, b = a.double(), b.double()
            if a.shape != b.shape or not torch.allclose(a, b, tolerance, tolerance * scale, True):
                return f"{name} {i}: {a.flatten()[:5]} instead of {b.flatten()[:5]}"
    return ""


def with_torchs_backend(model: nn.Module) -> nn.Module:
    """Returns a copy that Dynamo captures, but whose graphs are not rewritten."""
    twin = copy.deepcopy(model)
    twin.compile(backend="eager")
    return twin


def without_checkpoints(model: nn.Module) -> nn.Module:
    """Returns a copy that calls checkpointed parts without checkpointing."""
    twin = copy.deepcopy(model)

    def forward(*args: torch.Tensor) -> tuple:
        def call(part: Callable, x: torch.Tensor, use_reentrant: bool) -> torch.Tensor:
            return part(x)

        with patch.dict(type(model).forward.__globals__, checkpoint=call):
            return type(model).forward(twin, *args)

    twin.forward = forward
    return twin


def check(seed: int) -> Counter:
    """Calls `run`, but accepts a module that torch runs incorrectly even without our fusion.

    Two such bugs of torch are known. Dynamo loses a hook on an input that is written in place. And
    if a checkpointed part writes to a tensor that backward reads, torch returns wrong gradients
    without raising an error.
    """
    try:
        return run(seed)
    except AssertionError:
        for torchs_own in (with_torchs_backend, without_checkpoints):
            try:
                run(seed, torchs_own)
            except AssertionError:
                return Counter({"wrong in torch": 1})
        raise


def run(seed: int, fuse: Callable[[nn.Module], nn.Module] = bnres.fuse) -> Counter:
    """Compares a random module with its fused copy in a random sequence of steps.

    Raises:
        AssertionError: if their results differ. The message has the module and the steps.
    """
    torch._dynamo.reset()
    rng = random.Random(-1 - seed)
    source, shape = write_module(seed)
    interpreted = seed % 10 == 9
    # A module with autocast runs in fp64, on which autocast has no effect. In fp32, autocast would
    # round to bf16, and the rounding could change which of two values a max-pool chooses.
    narrow = seed % 20 in (7, 19) and "autocast" not in source
    dtype = torch.float32 if narrow else torch.float64
    tolerance = 1e-3 if narrow else 1e-7
    stock = build(load(source, "random_module"), seed, dtype)
    fused = fuse(stock)
    seen, steps, breaks = Counter(), [], graph_breaks()
    # If there are too many graphs, torch must raise. By default it would run the stock code.
    limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    route = "triton" if DEVICE == "cuda" else "triton-interpreter" if interpreted else "aten"
    with bnres.use_backend(route), torch._dynamo.config.patch(limits), recorded_sites() as sites:
        for i in range(STEPS):
            change = change_of(rng, stock) if i else "pass"
            batch, grad, leaf = rng.choice((2, 4, 4)), rng.random() < 0.85, rng.random() < 0.8
            steps.append(f"{change}; {batch=} {grad=} {leaf=}")
            generator = torch.Generator().manual_seed(seed + i)
            x = torch.randn(batch, *shape, dtype=dtype, generator=generator).to(DEVICE)
            results = []
            for model in (fused, stock):
                exec(change, {"model": model})
                results.append(step(model, x, seed + i, leaf, grad))
            seen["steps"] += 1
            seen["forward errors"] += "forward error" in results[1]
            seen["dynamo errors"] += "Internal" in type(results[0].get("forward error")).__name__
            seen["backward errors"] += "backward error" in results[1]
            if graph_breaks() != breaks and overwritten(*results):
                seen["bias overwritten"] += 1
                break
            wrong = difference(*results, tolerance)
            if wrong:
                script = "\n".join(steps)
                raise AssertionError(
                    f"{wrong}\n\nseed {seed}, {route}, {dtype}:\n{source}\n{script}"
                )
            if "forward error" in results[0] or "backward error" in results[1]:
                break  # after an error, the modules may have stopped at different places
    return seen + Counter(site.pattern for site in sites)


def overwritten(found: dict, expected: dict) -> bool:
    """Returns whether only the fused module's backward raises, because a saved tensor was written.

    Our backward may read the bias of a batch norm. If the model writes to the bias in another
    graph, `fuse` can't see this write.
    """
    error = str(found.get("backward error", ""))
    return "backward error" not in expected and "modified by an inplace operation" in error


def run_many(seeds: range) -> None:
    """Checks the modules of all seeds, that many norms are fused, and that few modules raise."""
    total = sum(map(check, seeds), Counter())
    fused = sum(n for name, n in total.items() if name.startswith(("bn-", "bn+", "conv-bn")))
    assert fused >= len(seeds), total  # at least one per module
    assert total["forward errors"] + total["dynamo errors"] <= len(seeds) / 4, total
    assert total["wrong in torch"] + total["bias overwritten"] <= len(seeds) / 10, total


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + 12, 6))
def test_a_few_random_modules(first):
    run_many(range(first, first + 6))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST_SEED + 12, FIRST_SEED + 512, 25))
def test_many_random_modules(first):
    run_many(range(first, first + 25))


if __name__ == "__main__":
    first, count = int(sys.argv[1]), int((sys.argv[2:] or ["1"])[0])
    total: Counter = Counter()
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    for seed in range(first, first + count):
        try:
            total += check(seed)
        except AssertionError as error:
            print(f"{error}\n{'=' * 80}", flush=True)
            total["failed"] += 1
        if count > 1 and (seed + 1) % 100 == 0:
            print(f"to seed {seed}: {dict(total)}", flush=True)
    print(dict(total))
