"""Where and how exactly the tests compute: set before the kernels are imported."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from bnres.data import ImageDataset

# Without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# As many workers as cores share the machine.
torch.set_num_threads(1)

# A GPU may round the operands of fp32 convolutions to TF32 and may sum in any order. These are the
# older switches: torch's newer ones, `fp32_precision`, follow them, but not the other way round.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.deterministic = True
# torch looks at it at its first matrix product, and in its deterministic mode insists on it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-tf32", action="store_true", help="without a GPU, round to TF32 where one may"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    # Not while plugins are configured: one may still choose compiled kernels, and triton decides
    # when it is imported.
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
            raise pytest.UsageError("--emulate-tf32: the GPU here has TF32 itself")
        from tests import tf32

        tf32.emulate()


@pytest.fixture(autouse=True)
def not_deterministic() -> Iterator[None]:
    """A run that is to be deterministic sets it for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def aten() -> Iterator[None]:
    """For tests of files and commands: the kernels have their own tests."""
    from bnres import use_backend

    with use_backend("aten"):
        yield


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> "ImageDataset":
    """Little data, which the commands load in place of any other."""
    from bnres.data.dataset import make_dataset

    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (32, 1, 28, 28), dtype=torch.uint8), torch.arange(32) % 2
    found = make_dataset("tiny", ("a", "b"), (images[:24], labels[:24]), (images[24:], labels[24:]))
    for place in ("bnres.train.run", "bnres.train.trained"):
        monkeypatch.setattr(f"{place}.load_dataset", lambda *where, **options: found)
    return found
