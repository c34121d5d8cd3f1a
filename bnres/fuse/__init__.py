"""Rewrites stock models: `fuse` for training, `fold` for inference; `explain` says what and why."""

from bnres.fuse.fold import fold
from bnres.fuse.report import FusionReport, Site
from bnres.fuse.rewrite import explain, fuse, unfuse

__all__ = ["FusionReport", "Site", "explain", "fold", "fuse", "unfuse"]
