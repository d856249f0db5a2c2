"""Run a plan: train models one by one or several at a time, then evaluate each with the device to itself."""

from __future__ import annotations

import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor, nn

from examples.comparison import LMKAN, Result, Results, best_device, evaluate, lmkan, mlp, tf32
from examples.summary import draw_pareto, print_summary
from lmkan_gen import device as devices
from lmkan_gen import toolchain
from lmkan_gen.ahead import kernels
from lmkan_gen.model_tuning import layer_shapes
from lmkan_gen.problem import TableDtype

HIDDEN_LAYERS = 2
#: how far apart the random numbers of two draws start. Generators on CPUs look at 32 bits only
DRAW = 2**20


class Task(ABC):
    """What to approximate. Travels to other processes, so that data should be loaded when first needed.

    Attributes:
        inputs: of the models.
        error_name: for tables and pictures.
        title: of the picture.
        seed: draws other initial values.
    """

    inputs: int
    error_name: str
    title: str
    seed: int = 0

    @property
    @abstractmethod
    def timed_batch(self) -> int:
        """Samples of a timed call."""

    @property
    @abstractmethod
    def batches(self) -> tuple[int, ...]:
        """Of training and of `error`."""

    @property
    @abstractmethod
    def grids(self) -> int:
        """Of the lmKANs."""

    def build(self, name: str, width: int) -> nn.Module:
        """An untrained model on `best_device`."""
        model: nn.Module = (
            lmkan(self.inputs, width, HIDDEN_LAYERS, self.grids)
            if name == LMKAN
            else mlp(self.inputs, width, HIDDEN_LAYERS)
        )
        return model.to(best_device())

    @abstractmethod
    def fit(self, model: nn.Module, progress: Callable[[int], Iterable[int]]) -> None:
        """Train; ``progress`` counts steps."""

    @abstractmethod
    def error(self, predict: Callable[[Tensor], Tensor]) -> float:
        """On test data, given ``[samples, inputs] -> [samples, outputs]``."""


def compare(
    task: Task, plan: Sequence[tuple[str, int]], directory: Path, jobs: int, console: Console
) -> list[Result]:
    """Train and evaluate each model of a plan that is not in the results yet; draw and print them all.

    Args:
        task: what to approximate.
        plan: names of models, `LMKAN` or `MLP`, and their hidden widths.
        directory: for ``results.csv``, ``pareto.png``, ``summary.txt``, and trained models.
        jobs: how many to train at a time, in processes of their own. Timing is done one by one.
        console: to report on.
    """
    results = Results(directory / "results.csv")
    missing = [(name, width) for name, width in plan if not results.has(name, width)]
    lmkans = [width for name, width in missing if name == LMKAN]
    if lmkans and best_device().type == "cuda":
        _compile(task, lmkans, console)
    if jobs > 1:
        _fit_in_processes(task, missing, directory, jobs, console)
    for name, width in missing:
        path = checkpoint(directory, name, width)
        if not path.exists():
            _fit(task, name, width, path, progress_bar(f"{name} {width}", console))
        model = task.build(name, width)
        saved = torch.load(path, map_location=best_device(), weights_only=True)
        model.load_state_dict(saved["model"])
        rows = evaluate(
            name, width, model, task.error, task.inputs, task.timed_batch, best_device(), saved["seconds"]
        )
        results.add(rows)
        for row in rows:
            console.print(
                f"{name} {width}, {row.arithmetic}: {task.error_name} {row.error:.4f}, "
                f"{row.microseconds:.0f} µs"
            )
        draw_pareto(results.rows, directory / "pareto.png", task.error_name, task.title)
    if results.rows:
        print_summary(results.rows, directory / "summary.txt", task.error_name, console)
    return results.rows


def progress_bar(label: str, console: Console) -> Callable[[int], Iterable[int]]:
    """For `Task.fit`."""
    return lambda count: track(range(count), label, console=console)


def choose(plan: Sequence[tuple[str, int]], only: Sequence[str]) -> list[tuple[str, int]]:
    """The models of a plan that are named, such as ``lmKAN-32``; all if none is.

    Raises:
        ValueError: a name is not in the plan.
    """
    names = {f"{name}-{width}": (name, width) for name, width in plan}
    for wanted in only:
        if wanted not in names:
            raise ValueError(f"no model {wanted!r} in this preset; there are {', '.join(names)}")
    return [names[wanted] for wanted in only] or list(plan)


def checkpoint(directory: Path, name: str, width: int) -> Path:
    """Where a trained model is kept: its state under ``model``, and the ``seconds`` that training took."""
    return directory / "models" / f"{name}-{width}.pt"


def _fit(
    task: Task, name: str, width: int, path: Path, progress: Callable[[int], Iterable[int]] = range
) -> float:
    """Train one model and save it; return the seconds."""
    torch.manual_seed(width + task.seed * DRAW)
    model = task.build(name, width)
    start = time.perf_counter()
    with tf32(False):
        task.fit(model, progress)
    if best_device().type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "seconds": seconds}, staged)
    staged.replace(path)
    return seconds


def _compile(task: Task, widths: Sequence[int], console: Console) -> None:
    """Compile kernels on all cores, instead of one by one when first needed."""
    batches = {*task.batches, task.timed_batch}
    shapes = [shape for width in widths for shape in layer_shapes(task.build(LMKAN, width), batches)]
    specs = kernels(shapes, [devices.of(best_device())], tables=(TableDtype.FLOAT16, TableDtype.INT8))
    with Progress(console=console) as bar:
        progress = bar.add_task("kernels", total=len(specs))
        results = toolchain.build(specs, lambda spec, result: bar.advance(progress))
    for error in {str(r) for r in results if isinstance(r, toolchain.ToolchainError)}:
        console.print(error)


def _fit_in_processes(
    task: Task, plan: Sequence[tuple[str, int]], directory: Path, jobs: int, console: Console
) -> None:
    paths = {checkpoint(directory, name, width): (name, width) for name, width in plan}
    missing = {path: model for path, model in paths.items() if not path.exists()}
    # spawned, not forked: CUDA does not survive a fork
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(_fit, task, name, width, path): f"{name} {width}"
            for path, (name, width) in missing.items()
        }
        try:
            for future in as_completed(futures):
                console.print(f"{futures[future]} trained in {future.result():.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
