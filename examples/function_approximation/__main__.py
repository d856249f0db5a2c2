"""Approximate a random deep network R^32 -> R^1 with lmKANs and MLPs, and draw error against cost.

    python -m examples.function_approximation --preset quick
    python -m examples.function_approximation --preset full     # needs a GPU

The setting is the paper's: the target is a random tanh network of 10 layers of 1024 units with weights 3
times as large as usual, inputs are normal, and the error is the mean squared error in units of the
target's variance. All models see the same samples, each once. They are labelled once, in TF32 on GPUs, and
kept in ``labels.pt`` (labels only: inputs are drawn anew from their batch's number). Finished models are kept
too; run again to go on. ``--seed`` draws everything anew, into a directory of its own, which shows the spread
over draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from examples.comparison import LMKAN, MLP
from examples.function_approximation.task import PRESETS, FunctionApproximation
from examples.plan import choose, compare


def main(
    preset: Annotated[Literal["quick", "full"], typer.Option(help="quick: minutes on a CPU.")] = "quick",
    output: Annotated[Path | None, typer.Option(help="Directory for results and trained models.")] = None,
    steps: Annotated[int | None, typer.Option(min=20, help="Training steps of every model.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Adam's, before it decays.")] = 5e-3,
    hessian: Annotated[float, typer.Option(help="Initial weight of the regularisation.")] = 1e-3,
    only: Annotated[list[str] | None, typer.Option(help="Such as lmKAN-32; repeatable.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models to train at a time.")] = 1,
    graph: Annotated[bool, typer.Option(help="Train by replaying CUDA graphs, on GPUs.")] = True,
    seed: Annotated[
        int, typer.Option(min=0, max=999, help="Draws another target, other samples and initial values.")
    ] = 0,
) -> None:
    """Fit a random deep network with lmKANs and MLPs of several widths."""
    chosen, console = PRESETS[preset], Console()
    directory = output or Path("results") / f"function_approximation-{preset}"
    if seed:
        directory /= f"seed-{seed}"  # models of another target are no results of this one
    plan = [(LMKAN, w) for w in chosen.lmkan_widths] + [(MLP, w) for w in chosen.mlp_widths]
    steps = steps or chosen.steps
    task = FunctionApproximation(chosen, directory, steps, learning_rate, hessian, graph, seed)
    task.prepare(console)
    compare(task, choose(plan, only or ()), directory, jobs, console)
    console.print(f"{directory}: results.csv, pareto.png, summary.txt")


if __name__ == "__main__":
    typer.run(main)
