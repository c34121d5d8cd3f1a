"""Trains with fused layers and with torch's (stock) layers, and compares the results."""

from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from bnres.train.config import TrainConfig
from bnres.train.loop import TrainResult
from bnres.train.run import Run, epoch_line, prepare, progress_bar, route, run_epoch


def other_threads() -> int:
    """Returns a number of CPU threads that differs from the current number."""
    return 1 if torch.get_num_threads() > 1 else 2


def prepare_comparison(config: TrainConfig) -> dict[str, Run]:
    """Returns three runs by name: one with fused layers, one with stock layers, and a control.

    All three have the same seed. If two correct programs round differently, their losses differ
    more with every step. The control shows how large such a difference is. It is a stock run that
    adds numbers in a different order: on the CPU it uses a different number of threads, and on a
    GPU the other memory format (contiguous or channels_last).
    """
    if config.resume is not None:
        raise ValueError("compare trains from the start: it can't be combined with resume")
    stock = replace(config, fused=False)
    if on_cpu(config):
        control, how = stock, f"{other_threads()} thread(s)"
    else:
        control = replace(stock, channels_last=not config.channels_last)
        how = "the other memory format"
    configs = {"fused": replace(config, fused=True), "stock": stock, f"stock, {how}": control}
    return {name: prepare(each) for name, each in configs.items()}


def on_cpu(config: TrainConfig) -> bool:
    return torch.device(config.device).type == "cpu"


def compare(config: TrainConfig, console: Console) -> None:
    """Trains the runs of `prepare_comparison` in turn, an epoch each, and prints their results."""
    runs = prepare_comparison(config)
    threads = torch.get_num_threads()
    results: dict[str, list[TrainResult]] = {name: [] for name in runs}
    control = list(runs)[-1]
    with progress_bar(console) as progress:
        for _ in range(config.epochs):
            for name, run in runs.items():
                if on_cpu(config) and name == control:
                    torch.set_num_threads(other_threads())
                try:
                    results[name].append(run_epoch(run, progress, f"{name}: "))
                finally:
                    torch.set_num_threads(threads)
                console.print(
                    f"{name}: {epoch_line(run.state.history[-1], config.epochs)}", highlight=False
                )
    console.print(comparison_table(runs, results))
    console.print(
        "Drift: greatest difference between a run's loss and the stock run's loss at one step.",
        highlight=False,
    )


def comparison_table(runs: dict[str, Run], results: dict[str, list[TrainResult]]) -> Table:
    """Returns a table of each run's accuracy, images per second and drift.

    Drift is the greatest difference between a run's loss and the stock run's loss at one step.
    """
    config = runs["fused"].config
    losses = {name: [x for each in rs for x in each.step_losses] for name, rs in results.items()}
    table = Table(title=f"{config.model} on {config.dataset}, {config.device}, {config.dtype}")
    for heading in ("run", "route"):
        table.add_column(heading)
    for heading in ("test acc", "images/s", "drift, 10 steps", "drift, all steps"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        drift = [abs(a - b) for a, b in zip(losses[name], losses["stock"], strict=True)]
        drifts = [f"{max(drift[:10]):.1e}", f"{max(drift):.1e}"]
        seconds = sum(each.seconds for each in results[name])
        table.add_row(
            name,
            route(run.config),
            f"{run.state.history[-1]['test_accuracy']:.2%}",
            f"{len(drift) * run.batches.batch_size / seconds:,.0f}",
            *(("-", "-") if name == "stock" else drifts),
        )
    return table
