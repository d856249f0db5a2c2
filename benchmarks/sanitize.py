"""Run kernels of every CUDA family on small shapes under NVIDIA's compute-sanitizer.

    python -m benchmarks.sanitize                     all four tools
    python -m benchmarks.sanitize --tool racecheck    one of them
    python -m benchmarks.sanitize --family row_gather kernels of one family

Each family, operation and table dtype runs with its default parameters and some random ones, and where
deterministic algorithms need another source with that one's default as well, on shapes with partial tiles
and odd tails, and its results are compared with the definition. compute-sanitizer comes with the CUDA
toolkit.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import islice, product
from random import Random
from typing import Annotated

import torch
import typer
from rich.console import Console

from lmkan_gen import device as devices
from lmkan_gen import packing, toolchain
from lmkan_gen.families import Family, Parameters, families
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Problem, TableDtype
from lmkan_gen.tuner.verify import make_case

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: partial tiles in both directions; an odd width, and more samples than a unit of work; whole tiles
SHAPES = (LayerShape(34, 33, 9, 65), LayerShape(21, 19, 12, 333), LayerShape(64, 64, 8, 1100))
#: what torch itself does counts for no tool; the driver is asked for functions that it may not have
_HARMLESS = "cuGetProcAddress"


def jobs(random: int, seed: int, only: Container[str]) -> Iterator[tuple[Problem, Family, Parameters]]:
    """What is to run: defaults, and ``random`` other candidates of families in ``only`` on each problem."""
    chip = devices.cuda(0)
    for shape, operation, table in product(SHAPES, CALL_OPERATIONS, TableDtype):
        problem = Problem(operation, shape, chip, table, constant=True)
        for family in families("cuda", operation, table):
            if family.name not in only:
                continue
            default = family.default(problem)
            if default is not None:
                yield problem, family, default
            points = family.drawn(problem, Random(f"{seed} {problem} {family.name}"))
            fitting = (p for p in points if not family.wasted(problem, p))
            yield from ((problem, family, parameters) for parameters in islice(fitting, random))
            ordered = replace(problem, deterministic=True)
            default = family.default(ordered)
            if default is not None and family.spec(ordered, default) != family.spec(problem, default):
                yield ordered, family, default


def run(random: int, seed: int, only: Container[str]) -> int:
    """Compile, run and check everything; returns how many kernels that were."""
    from lmkan_gen.launch import cuda

    todo = list(jobs(random, seed, only))
    device = torch.device("cuda", 0)
    toolchain.build([family.spec(problem, parameters) for problem, family, parameters in todo])
    for problem, family, parameters in todo:
        case = make_case(problem.operation, problem.shape, device, 1.0, 64, problem.table)
        plan = family.plan(problem, parameters)
        runner = cuda.prepare(family.spec(problem, parameters), plan, device)
        forms = packing.arranged(case.inputs, plan.buffers, problem.table)
        replace(case, inputs=forms).check(runner, f"{family.name} {parameters}")
    torch.cuda.synchronize()
    return len(todo)


def findings(output: str) -> int:
    """Errors that a tool reports about kernels: its own count, less those of the driver's interface."""
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    if found is None:
        raise RuntimeError(f"compute-sanitizer gave no summary:\n{output[-2000:]}")
    return int(found[1] or found[2]) - len(
        re.findall(rf"Program hit .* on CUDA API call to {_HARMLESS}", output)
    )


def watch(tool: str, random: int, seed: int, only: Iterable[str]) -> str:
    """Run everything under one tool; what it prints."""
    script = [sys.executable, "-m", "benchmarks.sanitize", "--inside"]
    # torch's own kernels are slow to watch; initcheck has to see what they write
    watched = [] if tool == "initcheck" else ["--kernel-name", "kns=lmkan_"]
    options = ["--random", str(random), "--seed", str(seed)]
    options += [option for name in only for option in ("--family", name)]
    command = ["compute-sanitizer", "--tool", tool, *watched, *script, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main(
    tool: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(TOOLS)}; by default all.")
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="Families of kernels; by default all.")] = None,
    random: Annotated[int, typer.Option(min=0, help="Random candidates per family and problem.")] = 1,
    seed: Annotated[int, typer.Option(help="Draws other candidates.")] = 0,
    inside: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run kernels of every family under compute-sanitizer; exit code 1 when a tool finds something."""
    tools = tool or list(TOOLS)
    if unknown := sorted(set(tools) - set(TOOLS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(TOOLS)}", param_hint="--tool")
    computing = (families("cuda", *asked) for asked in product(CALL_OPERATIONS, TableDtype))
    known = sorted({found.name for several in computing for found in several})
    if unknown := sorted(set(family or ()) - set(known)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint="--family")
    only = family or known
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device")
    count = run(random, seed, only)  # compiles everything, so that no tool watches compilers
    if inside:
        return
    if shutil.which("compute-sanitizer") is None:
        raise typer.BadParameter("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    console = Console()
    console.print(f"{devices.cuda(0).name}: {count} kernels under {', '.join(tools)}")
    bad = False
    # side by side: the tools' time is the host's
    with ThreadPoolExecutor(len(tools)) as pool:
        watched = {pool.submit(watch, name, random, seed, only): name for name in tools}
        for done in as_completed(watched):
            found = findings(done.result())
            bad |= found > 0
            console.print(f"{watched[done]}: {found} findings")
            if found:
                Console(stderr=True).print(done.result()[-4000:], markup=False, highlight=False)
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
