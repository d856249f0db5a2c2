"""What the examples share: models of equal interface, evaluation in several arithmetics, runs of a plan."""

from __future__ import annotations

import copy
import csv
import math
import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.optim import Optimizer

from examples.summary import draw_pareto, print_summary
from lmkan_gen import fold
from lmkan_gen.fitting import FittingSchedule
from lmkan_gen.nn import LMKANMLP, LMKANLinear, lmkan_layers, preconditioned_layers
from lmkan_gen.tuner.measure import measure

LMKAN, MLP = "lmKAN", "MLP"


@dataclass(frozen=True)
class Result:
    """One trained model in one arithmetic. ``flops`` and ``microseconds`` are of inference.

    ``flops`` is per sample, ``microseconds`` for a batch of ``batch`` samples.
    """

    model: str
    width: int
    arithmetic: str
    error: float
    flops: int
    batch: int
    microseconds: float
    iqr: float
    parameters: int
    training_seconds: float
    device: str


class Results:
    """A CSV file that grows with each trained model, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Result] = []
        if path.exists():
            kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Result)}
            with path.open(newline="") as stream:
                reader = csv.DictReader(stream)
                if set(reader.fieldnames or ()) != set(kinds):
                    raise ValueError(
                        f"{path} has columns {reader.fieldnames}, not {list(kinds)}: another version of this "
                        "example wrote it; move it away or give another --output"
                    )
                for row in reader:
                    self.rows.append(Result(**{name: kinds[name](value) for name, value in row.items()}))

    def has(self, model: str, width: int) -> bool:
        """Whether that model was finished."""
        return any((row.model, row.width) == (model, width) for row in self.rows)

    def add(self, rows: Iterable[Result]) -> None:
        """Append a finished model's rows; the file is replaced at once."""
        self.rows.extend(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_suffix(".tmp")
        with staged.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [f.name for f in fields(Result)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        staged.replace(self.path)


def mlp(inputs: int, width: int, hidden_layers: int, outputs: int = 1) -> nn.Sequential:
    """Linear, batch norm, ReLU, ...; batch first."""
    layers: list[nn.Module] = []
    for i in range(hidden_layers):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def lmkan(inputs: int, width: int, hidden_layers: int, grids: int, outputs: int = 1) -> LMKANMLP:
    """Preconditioned lmKAN layers; batch last, which saves transpositions."""
    widths = (inputs, *(width,) * hidden_layers, outputs)
    return LMKANMLP(widths, grids, precondition="relu_first", batch_first=False)


def paper_schedule(hessian: float, steps: int) -> Callable[[nn.Module, Optimizer], FittingSchedule]:
    """The paper's four phases for lmKANs; MLPs see their learning rates only."""

    def make(model: nn.Module, optimizer: Optimizer) -> FittingSchedule:
        if preconditioned_layers(model):
            return FittingSchedule.four_phase(model, optimizer, steps, hessian=hessian)
        return FittingSchedule.two_phase(model, optimizer, steps)

    return make


def fused(model: nn.Sequential) -> nn.Sequential:
    """The MLP for inference, batch norm in the linear layers."""
    layers = list(model.eval())
    kept: list[nn.Module] = []
    for layer in layers:
        last = kept[-1] if kept else None
        if isinstance(layer, nn.BatchNorm1d) and isinstance(last, nn.Linear):
            kept[-1] = fuse_linear_bn_eval(last, layer)
        else:
            kept.append(layer)
    return nn.Sequential(*kept)


def deployed(model: nn.Module) -> nn.Module:
    """The model as it would be deployed."""
    return fused(model) if isinstance(model, nn.Sequential) else fold(model)


def flops(model: nn.Module) -> int:
    """Floating-point operations per sample: 2 per weight of a linear layer, 8 per function of two inputs."""
    if isinstance(model, LMKANMLP):
        return sum(4 * m.input_dim * m.output_dim for m in model.modules() if isinstance(m, LMKANLinear))
    return sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))


def call(model: nn.Module, x: Tensor) -> Tensor:
    """``model`` on ``x`` ``[samples, inputs]``: ``[samples, outputs]``."""
    y: Tensor = model(x.T.contiguous()).T if isinstance(model, LMKANMLP) else model(x)
    return y


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Matrix products of float32 in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def arithmetics(model: nn.Module, device: torch.device) -> list[str]:
    """In which arithmetics to evaluate: those that the device has kernels for."""
    if isinstance(model, LMKANMLP):
        return ["float32", "float16 tables", "int8 tables"] if device.type == "cuda" else ["float32"]
    return ["float32", "TF32", "float16", "bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]


def in_arithmetic(ready: nn.Module, arithmetic: str) -> tuple[nn.Module, torch.dtype]:
    """A copy of a deployed model for one of `arithmetics`, and the dtype of its inputs."""
    found = copy.deepcopy(ready).eval()
    name, *of_tables = arithmetic.split()
    dtype = torch.float32 if name == "TF32" else getattr(torch, name)
    if not of_tables:
        return found.to(dtype), dtype
    for layer in lmkan_layers(found).values():
        layer.freeze(dtype, master="drop")
    return found, torch.float32


@torch.no_grad()
def evaluate(
    name: str,
    width: int,
    model: nn.Module,
    error: Callable[[Callable[[Tensor], Tensor]], float],
    inputs: int,
    batch: int,
    device: torch.device,
    training_seconds: float = 0.0,
) -> list[Result]:
    """Error and inference time of the deployed model, in every arithmetic that the device has for it.

    Args:
        name: of the model, for the table.
        width: of its hidden layers.
        model: trained.
        error: given ``[samples, inputs] -> [samples, outputs]``, the error on the test set.
        inputs: number of inputs.
        batch: samples of a timed call.
        device: where to run.
        training_seconds: for the table.
    """
    cost, parameters = flops(model), sum(p.numel() for p in model.parameters())
    ready = deployed(model)
    rows = []
    for arithmetic in arithmetics(ready, device):
        network, dtype = in_arithmetic(ready, arithmetic)
        shape = (inputs, batch) if isinstance(network, LMKANMLP) else (batch, inputs)
        x = torch.randn(shape, device=device, dtype=dtype)
        with tf32(arithmetic == "TF32"):
            found = error(_predictor(network, dtype))
            timing = measure([_inference(network, x)], device)
        rows.append(
            Result(
                name,
                width,
                arithmetic,
                found,
                cost,
                batch,
                timing.median,
                timing.iqr,
                parameters,
                round(training_seconds, 1),
                device_name(device),
            )
        )
    return rows


def _predictor(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: call(model, x.to(dtype)).float()


def _inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


class Task(ABC):
    """What to approximate. Travels to other processes, so that data should be loaded when first needed.

    Attributes:
        inputs: of the models.
        error_name: for tables and pictures.
        title: of the picture.
    """

    inputs: int
    error_name: str
    title: str

    @property
    @abstractmethod
    def timed_batch(self) -> int:
        """Samples of a timed call."""

    @abstractmethod
    def build(self, name: str, width: int) -> nn.Module:
        """An untrained model on `best_device`."""

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
    torch.manual_seed(width)
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


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def standard_scale(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, the latter never zero."""
    mean, deviation = values.double().mean().item(), values.double().std().item()
    return mean, deviation if deviation > 0 and math.isfinite(deviation) else 1.0
