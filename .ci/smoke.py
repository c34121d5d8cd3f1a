"""Checks that the installed bnres works, and prints the path of its ``__init__.py``.

A fused layer's output and gradient on the CPU must equal those of torch's layers.
"""

import torch
from torch import nn

import bnres
import bnres.kernels.launch

x = torch.randn(4, 8, 6, 6, dtype=torch.float64, requires_grad=True)
y = bnres.nn.BatchNormAct2d(8).double()(x, x)
expected = torch.relu(nn.BatchNorm2d(8).double()(x) + x)
torch.testing.assert_close(y, expected)
dy = torch.randn_like(y)
torch.testing.assert_close(
    torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0]
)
print(bnres.__file__)
