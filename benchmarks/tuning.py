"""How good is the tuner? The same search twice, and a quick one against a long one, on this machine.

Winners are measured against each other in one process and in turns, so that their ratio means something.
Several processes, one per GPU, can share the long search: give each the same ``--storage``, and a
``LMKAN_GEN_CACHE`` of its own, since the quick searches of one cache exclude each other.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from lmkan_gen import device as devices
from lmkan_gen.cli.options import parse_shape
from lmkan_gen.families import family
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.report import duration
from lmkan_gen.tuner.run import QUICK_TRIALS, TuningFailed, tune
from lmkan_gen.tuner.space import explore
from lmkan_gen.tuner.worker import Worker
from lmkan_gen.tuning_file import Entry

_ROUNDS = 5


def main(
    shape: Annotated[
        str, typer.Option(metavar="IN,OUT,GRIDS,BATCH", help="The layer call.")
    ] = "512,512,18,65536",
    operation: Annotated[
        list[Operation] | None, typer.Option(help="Repeatable; by default all of a layer call.")
    ] = None,
    quick: Annotated[int, typer.Option(min=1, help="Candidates of the quick search.")] = QUICK_TRIALS,
    long: Annotated[
        int, typer.Option(min=0, help="Candidates of the long search; 0: the quick one again.")
    ] = 0,
    storage: Annotated[
        Path | None, typer.Option(help="Journal of the long search, which then goes on where it stopped.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for the long search of each operation.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda:N")] = "cuda:0",
) -> None:
    """Search twice, and measure both winners in turns."""
    where = torch.device(device)
    layer = parse_shape(shape)
    table = Table(title=f"{devices.of(where).name}, {layer}")
    for heading in ("operation", "quick", "took", "tried", "other", "took", "tried", "of", "quick / other"):
        table.add_column(heading, justify="right")
    for asked in dict.fromkeys(operation or CALL_OPERATIONS):
        problem = Problem(asked, layer, devices.of(where))
        count = explore(problem).tally.candidates
        typer.echo(f"{asked}: {count} candidates")
        try:
            one, one_s = _search(problem, where, quick)
            url = None if storage is None else str(storage)
            two, two_s = _search(problem, where, long or quick, url, budget)
        except TuningFailed as error:
            typer.echo(str(error), err=True)
            continue
        a, b = _in_turns(problem, where, one, two)
        ratio = f"{a.median / b.median:.3f}"
        # a run that is stopped must not lose what it has found
        typer.echo(
            f"{asked}: {_described(one, a)} after {one.search.tried} in {one_s:.0f} s, "
            f"the other {_described(two, b)} after {two.search.tried} of {count} in {two_s:.0f} s: {ratio}"
        )
        table.add_row(
            asked,
            duration(a.median),
            f"{one_s:.0f} s",
            str(one.search.tried),
            duration(b.median),
            f"{two_s:.0f} s",
            str(two.search.tried),
            str(count),
            ratio,
        )
    Console().print(table)


def _described(entry: Entry, timing: Timing) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in sorted(entry.parameters.items()))
    return f"{duration(timing.median)} ({entry.family}: {settings})"


def _search(
    problem: Problem,
    where: torch.device,
    trials: int,
    storage: str | None = None,
    budget: float | None = None,
) -> tuple[Entry, float]:
    """The winner, and seconds that it took to find, compilation included."""
    shape: LayerShape = problem.shape
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        (entry,) = tune(
            [shape],
            where,
            [problem.operation],
            trials=trials,
            time_budget=budget,
            output=Path(directory) / "found.yaml",
            storage_url=storage,
        ).entries
        return entry, time.monotonic() - began


def _in_turns(problem: Problem, where: torch.device, one: Entry, two: Entry) -> tuple[Timing, Timing]:
    times: list[Timing] = []
    with Worker(where) as worker:
        for turn in range(_ROUNDS):
            for i, entry in enumerate((one, two)):
                found = worker.measure(problem, family(entry.family), dict(entry.parameters), check=False)
                if turn == 0:
                    times.append(found)
                else:
                    times[i] += found
    return times[0], times[1]


if __name__ == "__main__":
    typer.run(main)
