"""Selects Triton's interpreter if there is no GPU, before the kernels are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
