"""Fit energies of CH4, then energies and forces, with lmKANs and MLPs, and draw error against cost.

    python -m examples.methane --preset quick
    python -m examples.methane --preset full     # needs a GPU

Configurations are random (see `examples.methane.generate`), labelled with GFN2-xTB; the models' inputs are
the 12 coordinates of the hydrogens. The file with the data is made if it is missing, which needs `tblite`.
Finished models are kept; run again to go on.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from examples.comparison import LMKAN, MLP, best_device, tf32
from examples.methane.generate import generate
from examples.methane.task import PRESETS, Methane
from examples.plan import checkpoint, choose, compare, progress_bar

HEADINGS = (
    "model",
    "width",
    "steps_with_forces",
    "energy_error_before",
    "force_error_before",
    "energy_error",
    "force_error",
)


def main(
    preset: Annotated[Literal["quick", "full"], typer.Option(help="quick: minutes on a CPU.")] = "quick",
    output: Annotated[Path | None, typer.Option(help="Directory for results and trained models.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data; made if missing.")] = None,
    steps: Annotated[int | None, typer.Option(min=20, help="Training steps of every model.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Adam's, before it decays.")] = 5e-3,
    hessian: Annotated[float, typer.Option(help="Initial weight of the regularisation.")] = 1e-3,
    only: Annotated[list[str] | None, typer.Option(help="Such as lmKAN-32; repeatable.")] = None,
    forces: Annotated[bool, typer.Option(help="Go on with forces afterwards.")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Models to train at a time.")] = 1,
    graph: Annotated[bool, typer.Option(help="Train by replaying CUDA graphs, on GPUs.")] = True,
) -> None:
    """Fit methane's energies and forces with lmKANs and MLPs of several widths."""
    chosen, console = PRESETS[preset], Console()
    directory = output or Path("results") / f"methane-{preset}"
    path = data or Path("results/data") / ("methane.npz" if preset == "full" else "methane-quick.npz")
    if not path.exists():
        console.print(f"{path} does not exist: generating {chosen.configurations} configurations")
        generate(path, chosen.configurations)
    plan = [(LMKAN, w) for w in chosen.lmkan_widths] + [(MLP, w) for w in chosen.mlp_widths]
    plan = choose(plan, only or ())
    task = Methane(chosen, path, steps or chosen.steps, learning_rate, hessian, graph)
    compare(task, plan, directory, jobs, console)
    with_forces: list[tuple[str, int]] = []
    if forces:
        with_forces = [(LMKAN, w) for w in chosen.force_lmkan_widths]
        with_forces += [(MLP, w) for w in chosen.force_mlp_widths]
        with_forces = [model for model in with_forces if model in plan]
        fit_forces(task, with_forces, directory, console)
    written = ", forces.csv" if with_forces else ""
    console.print(f"{directory}: results.csv, pareto.png, summary.txt{written}")


def fit_forces(task: Methane, plan: list[tuple[str, int]], directory: Path, console: Console) -> None:
    """Train each model of the plan on with energies and forces, and tell what it is worth."""
    if not plan:
        console.print("none of the chosen models is one that goes on with forces")
        return
    rows: list[tuple[str, int, int, float, float, float, float]] = []
    for name, width in plan:
        model = task.build(name, width)
        saved = torch.load(checkpoint(directory, name, width), map_location=best_device(), weights_only=True)
        model.load_state_dict(saved["model"])
        model.eval()
        before = task.force_errors(model)
        with tf32(False):
            task.fit_forces(model, progress_bar(f"{name} {width}, forces", console))
        rows.append((name, width, task.preset.force_steps, *before, *task.force_errors(model)))
    table = Table(title="RMSE / STD before and after training with forces")
    for heading in HEADINGS:
        table.add_column(heading.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
    with (directory / "forces.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(HEADINGS)
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
