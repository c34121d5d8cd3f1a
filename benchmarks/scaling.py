"""A model of data-parallel training on many GPUs, with and without synchronised batch norm.

The time of a training step is its time on one GPU plus the time of the communication that does not
overlap with backward. The time of a collective is computed by NCCL's cost model: a latency for each
transfer from GPU to GPU, plus bytes divided by bandwidth. `SOURCES` says where the constants come
from. Only the step of ResNet-18 was measured on a GPU. `gloo_table` compares the cost model with
measured times of gloo on this machine's CPU.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bnres import models

# For each net: the seconds of a training step of 256 images on one GPU, and their source.
STEPS = {
    "resnet18": (9.04e-3, "measured on an H200"),
    "resnet50": (256 / 7160, "published for an H100, MLPerf v4.0"),
}
BACKWARD = 2 / 3  # Backward takes this fraction of a step's time.
# DDP sends gradients in buckets. These are the default sizes in bytes of the first bucket and of
# the later ones.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SOURCES = """\
Sources: the constants of the formulas for collectives are those of
[NCCL 2.7.5](https://github.com/NVIDIA/nccl/blob/01afd20/src/graph/tuning.cc). An H100's NVLink has
[900 GB/s](https://www.nvidia.com/en-sg/technologies/hopper-architecture/) in both directions
together, so 450 GB/s in each direction. An InfiniBand NDR adapter sends
[400 Gb/s](https://docs.nvidia.com/networking/display/ConnectX7VPI/Introduction), so eight adapters
send 400 GB/s."""
STATISTICS = 4  # Synchronised statistics are in fp32, which has this many bytes.


@dataclass(frozen=True)
class Protocol:
    """Costs of one of NCCL's protocols.

    Attributes:
        base: latency of a collective in seconds, to which the latencies of its transfers are added.
        local: latency of a transfer from GPU to GPU over NVLink, in seconds.
        remote: latency of a transfer over the network, in seconds.
        share: fraction of the bandwidth that is available for data.
    """

    base: float
    local: float
    remote: float
    share: float


RING = (Protocol(3.6e-6, 0.47e-6, 2.7e-6, 1 / 4), Protocol(8.4e-6, 3.4e-6, 9.6e-6, 1.0))
TREE = (Protocol(4.4e-6, 0.52e-6, 5.0e-6, 0.9 / 3.8), Protocol(0.0, 28e-6, 50e-6, 0.9))


@dataclass(frozen=True)
class Cluster:
    """A cluster of nodes with several GPUs each.

    Attributes:
        gpus: number of GPUs per node.
        nvlink: bytes per second that a GPU sends inside its node.
        network: bytes per second that a node sends.
        latency: factor by which NCCL's latencies are multiplied.
    """

    gpus: int = 8
    nvlink: float = 450e9
    network: float = 400e9
    latency: float = 1.0

    def nodes(self, gpus: int) -> int:
        return max(gpus // self.gpus, 1)

    def bandwidth(self, gpus: int) -> float:
        """Returns the bytes per second of the slowest link in a ring."""
        return self.nvlink if gpus <= self.gpus else min(self.nvlink, self.network)

    def all_reduce(self, size: int, gpus: int) -> float:
        """Returns the seconds of an all-reduce of ``size`` bytes by NCCL's fastest ring or tree."""
        nodes, local = self.nodes(gpus), min(gpus, self.gpus)
        rate = self.bandwidth(gpus)
        rings = (
            self.latency * (p.base + 2 * ((gpus - nodes) * p.local + (nodes - 1) * p.remote))
            + 2 * (gpus - 1) / gpus * size / (rate * p.share)
            for p in RING
        )  # fmt: skip
        trees = (
            self.latency * (p.base + 2 * ((local - 1) * p.local + math.log2(nodes) * p.remote))
            + 2 * size / (rate * p.share)
            for p in TREE
        )  # fmt: skip
        return min(*rings, *trees)

    def all_gather(self, size: int, gpus: int) -> float:
        """Returns the seconds of an all-gather of ``size`` bytes from each GPU.

        NCCL always uses a ring for an all-gather.
        """
        nodes = self.nodes(gpus)
        return min(
            self.latency * (p.base + (gpus - nodes) * p.local + (nodes - 1) * p.remote)
            + (gpus - 1) * size / (self.bandwidth(gpus) * p.share)
            for p in RING
        )  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """The communication of a net's training step.

    Attributes:
        gradients: bytes of all parameters' gradients in fp32.
        sites: number of channels of each synchronisation. Each batch norm is synchronised by
            itself, but the two at the end of a down-sampling block together.
    """

    gradients: int
    sites: tuple[int, ...]

    @property
    def forward(self) -> list[int]:
        """The bytes that a process sends in each synchronisation of a forward.

        These are the count, the mean and the sum of squared deviations of each channel.
        """
        return [STATISTICS * 3 * channels for channels in self.sites]

    @property
    def backward(self) -> list[int]:
        """The bytes that a process sends in each synchronisation of a backward.

        These are two sums of each channel.
        """
        return [STATISTICS * 2 * channels for channels in self.sites]

    @property
    def buckets(self) -> list[int]:
        """The bytes of each bucket of gradients, in the order in which they are sent."""
        starts = [0, *range(FIRST_BUCKET, self.gradients, BUCKET), self.gradients]
        return [end - start for start, end in pairwise(starts)]

    def sent(self, gpus: int) -> tuple[float, int, int, int]:
        """Returns what each of ``gpus`` GPUs sends in a step, if all collectives are rings.

        The result has the bytes and the messages of the gradients, then the bytes and the messages
        of synchronised batch norm.
        """
        others = gpus - 1
        return (
            2 * others / gpus * self.gradients,
            2 * others * len(self.buckets),
            others * sum(self.forward + self.backward),
            others * 2 * len(self.sites),
        )


def traffic(net: str) -> Traffic:
    """Returns the bytes of a net's gradients, and the number of channels per synchronisation."""
    with torch.device("meta"):
        model = models.create_model(net, fused=False)
    sites: list[int] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            if "downsample" in name:
                sites[-1] += module.num_features
            else:
                sites.append(module.num_features)
    return Traffic(sum(p.numel() for p in model.parameters()) * 4, tuple(sites))


def exposed(buckets: Sequence[int], backward: float, reduce: Callable[[int], float]) -> float:
    """Returns the seconds from the end of backward to the end of the gradients' all-reduces.

    A bucket is sent as soon as backward has computed all gradients of the bucket and the previous
    bucket has been sent.

    Args:
        buckets: bytes of each bucket.
        backward: seconds of backward.
        reduce: returns the seconds of an all-reduce of a given number of bytes.
    """
    end, done = 0.0, 0
    for size in buckets:
        done += size
        end = max(end, backward * done / sum(buckets)) + reduce(size)
    return max(end - backward, 0.0)


def step(net: str, gpus: int, cluster: Cluster, sync: str = "") -> float:
    """Returns the seconds of a training step with 256 images per GPU.

    Args:
        net: key of ``STEPS``.
        gpus: number of GPUs.
        cluster: cluster that the GPUs are part of.
        sync: how batch norm is synchronised, a key of ``KINDS``.
    """
    found, (one, _) = traffic(net), STEPS[net]
    total = one + exposed(
        found.buckets, BACKWARD * one, lambda size: cluster.all_reduce(size, gpus)
    )
    if sync:
        collective = cluster.all_reduce if sync == "all_reduce" else cluster.all_gather
        ranks = min(gpus, cluster.gpus) if sync == "node" else gpus
        total += sum(collective(size, ranks) for size in (*found.forward, *found.backward))
    return total


def efficiency(net: str, gpus: int, cluster: Cluster, sync: str = "") -> float:
    """Returns the images/s of each GPU, divided by the images/s of a GPU that trains alone."""
    return STEPS[net][0] / step(net, gpus, cluster, sync)


# Ways to synchronise batch norm. bnres uses an all-gather among all GPUs, or inside each node if
# each node is a process group. The all-reduce is modelled only for comparison.
KINDS = {
    "": "local batch norm",
    "node": "synchronised in each node",
    "all_gather": "synchronised",
    "all_reduce": "synchronised by all-reduce",
}


def table(cluster: Cluster = Cluster()) -> str:
    """Formats the modelled traffic and efficiency in Markdown, with the assumptions."""
    lines = [
        f"Assumptions: a node has {cluster.gpus} GPUs. Inside a node, each GPU sends "
        f"{cluster.nvlink / 1e9:g} GB/s in each direction. Each node sends "
        f"{cluster.network / 1e9:g} GB/s to other nodes. Latencies are those of NCCL, "
        f"multiplied by {cluster.latency:g}.",
        "",
        SOURCES,
        "",
    ]
    for net, (seconds, source) in STEPS.items():
        found = traffic(net)
        forward, backward = sum(found.forward) / 1e3, sum(found.backward) / 1e3
        lines += [
            f"{net} has {found.gradients / 1e6:,.1f} MB of gradients. If its batch norms are "
            f"synchronised, forward and backward have {len(found.sites)} collectives each. (The "
            "two batch norms whose outputs a down-sampling block adds share one.) In these "
            f"collectives a process sends {forward:,.1f} kB in forward and {backward:,.1f} kB in "
            "backward. On one GPU, a step of 256 images is assumed to take "
            f"{seconds * 1e3:.2f} ms ({source}).",
            "",
            "In a step each GPU sends the following, if all collectives are rings:",
            "",
            "| GPUs | MB of gradients | messages of gradients | MB of batch norm "
            "| messages of batch norm |",
            "|---:" * 5 + "|",
        ]
        for gpus in GPUS:
            size, messages, more_size, more_messages = found.sent(gpus)
            cells = [f"{size / 1e6:.1f}", f"{messages:,}"]
            cells += [f"{more_size / 1e6:.1f}", f"{more_messages:,}"]
            lines.append(f"| {gpus} | {' | '.join(cells)} |")
        lines += [
            "",
            "Efficiency is the throughput of a GPU, relative to training on one GPU:",
            "",
            "| GPUs | " + " | ".join(KINDS.values()) + " |",
            "|---:" * (1 + len(KINDS)) + "|",
        ]
        for gpus in GPUS:
            cells = [f"{efficiency(net, gpus, cluster, kind):.1%}" for kind in KINDS]
            lines.append(f"| {gpus} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw(path: Path, cluster: Cluster = Cluster()) -> None:
    """Draws how the modelled efficiency depends on the number of GPUs."""
    from benchmarks.report import style

    figure, (axes,) = style.new_figure(7, 4)
    colors = dict(zip(KINDS, ("#999999", "#009E73", "#0072B2", "#D55E00"), strict=True))
    for net, line in zip(STEPS, ("-", "--"), strict=True):
        for kind, title in KINDS.items():
            values = [efficiency(net, gpus, cluster, kind) for gpus in GPUS]
            axes.plot(GPUS, values, line, color=colors[kind], marker="o", label=f"{net}, {title}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="GPUs", ylabel="modelled efficiency", ylim=(0, 1.05))
    axes.set_xticks(GPUS, map(str, GPUS))
    axes.legend(fontsize=8)
    style.save(figure, path)


# gloo is measured on the CPU for these sizes in bytes, with this number of repetitions.
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
REPEATS = 30


def _time_all_reduce(rank: int, world: int, port: int, found: "mp.Queue[list[float]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    medians = []
    for size in SIZES:
        value = torch.zeros(size // 4)
        seconds = []
        for _ in range(REPEATS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(value)
            seconds.append(time.perf_counter() - start)
        medians.append(sorted(seconds)[REPEATS // 2])
    if rank == 0:
        found.put(medians)
    dist.destroy_process_group()


def measure(world: int) -> list[float]:
    """Returns the median seconds of gloo's all-reduce in ``world`` processes, for each size."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: mp.Queue[list[float]] = mp.get_context("spawn").Queue()
    mp.spawn(_time_all_reduce, (world, port, found), nprocs=world)
    return found.get()


def fit(medians: Sequence[float], world: int) -> tuple[float, float]:
    """Returns a ring's seconds per transfer and bytes per second.

    They are fitted to the times in ``medians`` for the smallest and the largest of ``SIZES``.
    """
    steps, moved = 2 * (world - 1), 2 * (world - 1) / world
    rate = moved * (SIZES[-1] - SIZES[0]) / (medians[-1] - medians[0])
    return (medians[0] - moved * SIZES[0] / rate) / steps, rate


def ring(size: int, world: int, latency: float, rate: float) -> float:
    """Returns the modelled seconds of a ring's all-reduce of ``size`` bytes by ``world`` processes.

    ``latency`` is the seconds of a transfer, and ``rate`` is the bytes per second.
    """
    return 2 * (world - 1) * latency + 2 * (world - 1) / world * size / rate


def gloo_table() -> str:
    """Formats the measured times and the predicted times of gloo's all-reduce on this CPU.

    `ring` predicts the times. Its constants are fitted to the measured times of the smallest and
    the largest size in two processes.
    """
    measured = {world: measure(world) for world in (2, 4)}
    latency, rate = fit(measured[2], 2)
    lines = ["| processes | bytes | measured, µs | predicted, µs | |", "|---:|---:|---:|---:|---|"]
    for world, medians in measured.items():
        for size, seconds in zip(SIZES, medians, strict=True):
            fitted = world == 2 and size in (SIZES[0], SIZES[-1])
            predicted = ring(size, world, latency, rate)
            lines.append(
                f"| {world} | {size:,} | {seconds * 1e6:,.0f} | {predicted * 1e6:,.0f} | "
                f"{'fitted' if fitted else f'{predicted / seconds:.2f} of measured'} |"
            )
    return "\n".join(lines)
