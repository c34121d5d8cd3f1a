"""Fuses batch norms with other operations in models that were written without bnres.

`fuse` makes a model run fused operations. `fold` folds batch norms into convolutions for export.
`explain` reports what `fuse` does to a model and why.
"""

from bnres.fusion.backend import fuse, inductor, unfuse
from bnres.fusion.explain import explain
from bnres.fusion.fold import fold
from bnres.fusion.report import FusionReport, Site

__all__ = ["FusionReport", "Site", "explain", "fold", "fuse", "inductor", "unfuse"]
