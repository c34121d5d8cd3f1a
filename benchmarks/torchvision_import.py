"""Imports torchvision even if its compiled operators are missing, as with some builds of torch."""

import torch

try:
    import torchvision
except RuntimeError:
    # torchvision's Python code only needs these operators to have a schema.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    _library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
