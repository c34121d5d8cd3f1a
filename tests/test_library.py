"""Tests of `bnres.train.train_model`, which trains a module from Python."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bnres.data import make_dataset
from bnres.fusion import rewrite
from bnres.train import TrainConfig, train_model
from tests.own_models import Net
from tests.test_own_models import dataset

# The kernels' interpreter is slow, and other tests cover the kernels.
pytestmark = pytest.mark.usefixtures("aten")


def config(**options):
    return TrainConfig(
        **{"epochs": 3, "batch_size": 8, "shift": 0, "lr": 0.05, "device": "cpu", **options}
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_module_learns_and_is_unfused_afterwards(fused, monkeypatch):
    calls, original = [], rewrite.fuse_graph
    monkeypatch.setattr(rewrite, "fuse_graph", lambda m: calls.append(m) or original(m))
    model = net()
    history = train_model(model, dataset(), config(fused=fused))
    assert bool(calls) == fused
    assert [row["epoch"] for row in history] == [1, 2, 3] and history[-1]["test_accuracy"] == 1
    assert not model.training
    calls.clear()
    data = dataset()
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    with torch.no_grad():
        y = model((data.test_images / 255 - mean) / std)
    assert (y.argmax(1) == data.test_labels).all()
    assert calls == []


def test_the_model_ends_with_the_averaged_weights():
    plain, averaged = net(), net()
    row = train_model(plain, dataset(), config(epochs=1))[-1]
    other = train_model(averaged, dataset(), config(epochs=1, ema=0.9))[-1]
    assert row["train_loss"] == pytest.approx(other["train_loss"])
    assert row["test_loss"] != pytest.approx(other["test_loss"])
    assert not torch.equal(plain[0].weight, averaged[0].weight)
    assert not plain.training and not averaged.training


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got str$"):
        train_model("net", dataset(), config())
    model = Net(5, 1)
    with pytest.raises(ValueError, match=r"^model 'Net' must return 2x2, a number for each of 2 "):
        train_model(model, dataset(), config())
    assert model._compiled_call_impl is None  # the model is unfused again
    with pytest.raises(
        ValueError, match=r"^resume works only with bnres train, not with train_model$"
    ):
        train_model(net(), dataset(), config(resume=Path(__file__)))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), "train: images must be torch.uint8 of "
         "shape (N, channels, height, width), got torch.float32 of shape (4, 3, 8, 8)"),
        (torch.zeros(4, 8, 8).byte(), torch.zeros(4).long(), "train: images must be torch.uint8 of "
         "shape (N, channels, height, width), got torch.uint8 of shape (4, 8, 8)"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.zeros(4), "train: labels must be torch.int64 of "
         "shape (4,), got torch.float32 of shape (4,)"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.zeros(3).long(), "train: labels must be torch.int64 "
         "of shape (4,), got torch.int64 of shape (3,)"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.arange(4), "train: labels must be from 0 to 1, "
         "because there are 2 classes, got 0 to 3"),
    ],
    ids=["float", "3D", "float labels", "too few labels", "classes"],
)  # fmt: skip
def test_images_and_labels_that_do_not_fit(images, labels, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_dataset("x", ("a", "b"), (images, labels), (images, labels))
