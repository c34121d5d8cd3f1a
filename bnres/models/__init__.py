"""Residual networks of fused layers."""

from bnres.models.blocks import Residual
from bnres.models.factories import is_factory
from bnres.models.registry import (
    DEFAULT_INPUT_SHAPE,
    INPUT_SHAPES,
    MODELS,
    check_model_name,
    create_model,
)
from bnres.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from bnres.models.seed import lenet_seed, resnet18_seed
from bnres.models.summary import Stage, Summary, summarize

__all__ = [
    "DEFAULT_INPUT_SHAPE",
    "INPUT_SHAPES",
    "MODELS",
    "ResNet",
    "Residual",
    "Stage",
    "Summary",
    "check_model_name",
    "create_model",
    "is_factory",
    "lenet_seed",
    "resnet18",
    "resnet18_seed",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "summarize",
]
