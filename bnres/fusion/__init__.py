"""Fuses users' models: `fuse`, `fold` for export, `explain` to show what is fused and why."""

from bnres.fusion.backend import fuse, inductor, unfuse
from bnres.fusion.explain import explain
from bnres.fusion.fold import fold
from bnres.fusion.report import FusionReport, Site

__all__ = ["FusionReport", "Site", "explain", "fold", "fuse", "inductor", "unfuse"]
