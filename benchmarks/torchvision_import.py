"""torchvision beside a CPU build of torch: its compiled operators are missing there."""

import torch

try:
    import torchvision
except RuntimeError:
    # Its Python code only asks that the operators have a schema.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    _library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
