"""Imports torchvision, even if its compiled operators don't match the installed torch."""

import torch

try:
    import torchvision
except RuntimeError:
    # torchvision can be imported if these operators are declared. The benchmarks never call them.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    _library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
