"""Sets the backend and the precision of the tests, before the kernels are imported."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tests.device import DEVICE

if TYPE_CHECKING:
    from bnres.data import ImageDataset

# Without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# pytest-xdist starts one worker per core, so each worker uses one thread.
torch.set_num_threads(1)

# Don't round the operands of fp32 convolutions and matrix products to TF32, and use deterministic
# convolutions. Setting ``allow_tf32`` also sets torch's newer switch ``fp32_precision``. Setting
# ``fp32_precision`` would not set ``allow_tf32``.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.deterministic = True
# torch's deterministic mode requires this variable. torch reads it at the first matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-tf32", action="store_true", help="round to TF32 on the CPU where a GPU may"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    # triton reads TRITON_INTERPRET when triton is imported. The first import is here, so a pytest
    # plugin can unset the variable before. Then the kernels are compiled.
    from bnres.kernels.interpreter import is_interpreting

    try:
        interpreting = is_interpreting()
    except ImportError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    if interpreting:
        from tests import fast_interpreter

        fast_interpreter.patch_once()
    if session.config.getoption("--emulate-tf32"):
        if torch.cuda.is_available():
            raise pytest.UsageError("--emulate-tf32 must be used without a GPU, got one")
        from tests import tf32

        tf32.emulate()


@pytest.fixture(autouse=True)
def not_deterministic() -> Iterator[None]:
    """Turns torch's deterministic mode off after a test, because a training run may turn it on."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def aten() -> Iterator[None]:
    """Selects ATen, for tests that are not about kernels."""
    from bnres import use_backend

    with use_backend("aten"):
        yield


@pytest.fixture(params=["aten", "triton-interpreter" if DEVICE == "cpu" else "triton"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test once with ATen and once with the kernels."""
    from bnres import use_backend

    with use_backend(request.param):
        yield


@pytest.fixture
def few_graphs() -> Iterator[None]:
    """Drops the graphs of other tests. On the CPU selects ATen, because the interpreter is slow."""
    from bnres import use_backend

    torch._dynamo.reset()
    with use_backend("triton" if DEVICE == "cuda" else "aten"):
        yield


@pytest.fixture
def pair() -> "tuple[torch.nn.Module, torch.nn.Module]":
    """Returns a fused copy of the model that `small_models.small` builds, and this model."""
    import bnres
    from tests.small_models import small

    stock = small()
    return bnres.fuse(stock), stock


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> "ImageDataset":
    """Returns a tiny data set. Commands load it instead of the data set that they are asked for."""
    from bnres.data.dataset import make_dataset

    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (32, 1, 28, 28), dtype=torch.uint8), torch.arange(32) % 2
    found = make_dataset("tiny", ("a", "b"), (images[:24], labels[:24]), (images[24:], labels[24:]))
    for place in ("bnres.train.run", "bnres.train.trained"):
        monkeypatch.setattr(f"{place}.load_dataset", lambda *where, **options: found)
    return found
