"""Tests that training with CUDA graphs gives the same results as training without them."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnres import use_backend
from bnres.data.dataset import make_dataset
from bnres.train import TrainConfig, build_state, train_epoch
from bnres.train.distributed import World
from bnres.train.passes import WARMUP_BATCHES, GraphedPasses
from tests.device import DEVICE


class RecordedGraph(TorchDispatchMode):
    """Replaces a CUDA graph on the CPU: records operations, and repeats them on the same memory.

    The first replay does nothing, because recording has already run the operations. The capture of
    a CUDA graph does not run them.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        with torch.no_grad():
            for op, args, kwargs, result in self.calls:
                again = op(*args, **kwargs)
                pairs = zip(result, again) if isinstance(result, tuple) else [(result, again)]  # noqa: B905
                for old, new in pairs:
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def cuda_graphs(monkeypatch):
    """On a CPU, replaces torch's interface to CUDA graphs by `RecordedGraph`."""
    if DEVICE == "cuda":
        return

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            pass

    @contextmanager
    def record(graph, stream, capture_error_mode):
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(60) % 2
    return make_dataset("noise", ("a", "b"), (images[:44], labels[:44]), (images[44:], labels[44:]))


def make_config(**options):
    options = {"batch_size": 8, **options}
    return TrainConfig(epochs=2, drop_last=False, device=DEVICE, **options)


def graphed(config, dataset):
    """Returns the state of a run that uses CUDA graphs, and its batches."""
    state, batches = build_state(config, dataset)
    passes = state.passes
    state.passes = GraphedPasses(state.model, passes.forward, passes.scaler, config)
    return state, batches


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        # With the smaller stem, the input of every strided convolution is larger than one pixel.
        # For one pixel, torch's bf16 convolution on the CPU leaves some gradients unwritten.
        {"dtype": "bf16", "stem": "cifar", "clip_norm": 1.0, "ema": 0.9, "flip": True},
        # The smaller stem is used because it has no max-pool. torch's max-pool may not be
        # deterministic on a GPU.
        pytest.param(
            {"stem": "cifar", "optimizer": "adamw", "schedule": "cosine", "fused": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_training_is_bit_equal(cuda_graphs, dataset, options):
    """Each epoch has five full batches, and a smaller last batch that runs without the graph."""
    config = make_config(deterministic=DEVICE == "cuda", **options)
    with use_backend("triton" if DEVICE == "cuda" else "aten"):
        expected, batches = build_state(config, dataset)
        actual, _ = graphed(config, dataset)
        for _ in range(config.epochs):
            first, second = (train_epoch(s, batches, config) for s in (expected, actual))
            assert first.step_losses == second.step_losses
            assert first.accuracy == second.accuracy
    assert actual.passes.graph is not None
    pairs = [(expected.model, actual.model)]
    if config.ema:
        pairs.append((expected.average, actual.average))
    for one, other in pairs:
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    # The batch size, and the sizes of the batches that are not replayed. An epoch has five batches
    # of 8 and one of 4, or two of 16 and one of 12. The last batch is always run without the graph.
    [(8, [8, 8, 8, 8, 4, 4]), (16, [16, 16, 12, 16, 16, 12])],
    ids=str,
)
def test_one_capture(cuda_graphs, dataset, batch_size, expected):
    """After the warm-up and one capture, full batches are replayed. Smaller batches are not."""
    config = make_config(batch_size=batch_size)
    with use_backend("triton" if DEVICE == "cuda" else "aten"):
        state, batches = graphed(config, dataset)
        eager, passes = [], state.passes
        forward = passes.forward
        hook = forward.register_forward_pre_hook(lambda net, inputs: eager.append(len(inputs[0])))
        train_epoch(state, batches, config)
        train_epoch(state, batches, config)
        hook.remove()
    assert eager == expected
    assert expected.count(batch_size) == WARMUP_BATCHES + 1  # one for the capture


def test_several_processes_are_refused(cuda_graphs, dataset, monkeypatch):
    config = make_config()
    object.__setattr__(config, "cuda_graphs", True)
    with pytest.raises(ValueError, match="cuda_graphs works only with one process, got 2"):
        build_state(config, dataset, World(0, 2))
