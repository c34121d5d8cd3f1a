"""Runs each fused operation of ResNet-18's stem and layer1, for a hardware profiler."""

import itertools

import torch

from benchmarks.cases import OpCase, bn_sites
from benchmarks.operations import DTYPES, LAYOUTS, make_inputs, smaller
from benchmarks.providers import PROVIDERS
from benchmarks.sites import ConvSite, Site, conv_sites

BATCH, SMALL_BATCH = 256, 2
STAGES = ("stem", "layer1")


def run(device: torch.device) -> int:
    """Runs the operations in bf16, on small tensors if there is no GPU. Returns the number of runs.

    Operations with batch norms run forward and backward, once in each layout. Convolutions run once
    in inference, in channels_last and only on a GPU.
    """
    on_gpu = device.type == "cuda"
    done = 0
    known: list[Site | ConvSite] = [*bn_sites("resnet18"), *conv_sites("resnet18")]
    sites = [
        site
        for site in known
        if (site.out_channels <= 64 if isinstance(site, ConvSite) else site.name in STAGES)
    ]
    for layout, site in itertools.product(LAYOUTS, sites):
        provider = PROVIDERS["bnres-conv-kernel" if isinstance(site, ConvSite) else "bnres"]
        if isinstance(site, ConvSite) and (not on_gpu or layout == "contiguous"):
            continue
        direction = "eval" if isinstance(site, ConvSite) else "backward"
        case = OpCase(site, direction, layout, "bf16", BATCH, provider.name)
        batch, shape = (BATCH, site) if on_gpu else (SMALL_BATCH, smaller(site))
        inputs = make_inputs(shape, direction, batch, layout, DTYPES["bf16"], device)
        operation = provider.prepare(case)(inputs)
        with torch.set_grad_enabled(direction == "backward"):
            # ``operation.backward`` runs the forward itself.
            (operation.backward if direction == "backward" else operation.forward)()
        done += 1
    return done
