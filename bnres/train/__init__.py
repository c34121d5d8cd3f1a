"""Trains image classifiers."""

from bnres.train.config import TrainConfig
from bnres.train.library import train_model
from bnres.train.loop import evaluate, train_epoch
from bnres.train.state import TrainState, build_state

__all__ = ["TrainConfig", "TrainState", "build_state", "evaluate", "train_epoch", "train_model"]
