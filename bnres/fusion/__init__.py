"""Rewrites stock models: `fuse` for training, `fold` for inference; `explain` says what and why."""

from bnres.fusion.fold import fold
from bnres.fusion.report import FusionReport, Site
from bnres.fusion.rewrite import explain, fuse, unfuse

__all__ = ["FusionReport", "Site", "explain", "fold", "fuse", "unfuse"]
