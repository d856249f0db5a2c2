"""What the examples share: models of equal interface, a training loop, timing, results on disk."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from lmkan_gen import fold
from lmkan_gen.fitting import FittingSchedule
from lmkan_gen.nn import LMKANMLP, LMKANLinear
from lmkan_gen.tuner.measure import measure


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
    device: str


class Results:
    """A CSV file that grows with each trained model, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Result] = []
        if path.exists():
            with path.open(newline="") as stream:
                for row in csv.DictReader(stream):
                    kinds = {
                        f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Result)
                    }
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
    """Preconditioned lmKAN layers; batch last throughout."""
    widths = (inputs, *(width,) * hidden_layers, outputs)
    return LMKANMLP(widths, grids, precondition="relu_first", batch_first=False)


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


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: Iterable[int],
    count: int,
    learning_rate: float,
    hessian: float,
) -> None:
    """Adam in the four phases of the paper; an MLP sees their learning rates only.

    Args:
        model: trained in place.
        loss: the loss on a fresh batch.
        steps: to iterate over; a progress bar, for example.
        count: how many there are.
        learning_rate: before it decays.
        hessian: initial weight of the Hessian regularisation.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    if isinstance(model, LMKANMLP):
        schedule = FittingSchedule.four_phase(model, optimizer, count, hessian=hessian)
        penalty: Callable[[], Tensor | float] = schedule.penalty
    else:
        schedule = FittingSchedule.two_phase(model, optimizer, count, decay_fraction=0.75)
        penalty = float
    model.train()
    for _ in steps:
        total = loss() + penalty()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()


@contextmanager
def tf32(on: bool):  # type: ignore[no-untyped-def]
    """Matrix products of float32 in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def evaluate(
    name: str,
    width: int,
    model: nn.Module,
    error: Callable[[Callable[[Tensor], Tensor]], float],
    inputs: int,
    batch: int,
    device: torch.device,
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
    """
    cost, ready = flops(model), deployed(model)
    arithmetics = [("float32", torch.float32, False)]
    if isinstance(ready, nn.Sequential):
        if device.type == "cuda":
            arithmetics.append(("TF32", torch.float32, True))
        arithmetics.append(("bfloat16", torch.bfloat16, False))
    rows = []
    for label, dtype, fast in arithmetics:
        ready = ready.to(dtype)
        shape = (inputs, batch) if isinstance(ready, LMKANMLP) else (batch, inputs)
        x = torch.randn(shape, device=device, dtype=dtype)
        with tf32(fast):
            found = error(_predictor(ready, dtype))
            timing = measure([_inference(ready, x)], device)
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        rows.append(Result(name, width, label, found, cost, batch, timing.median, timing.iqr, device_name))
    return rows


def _predictor(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: call(model, x.to(dtype)).float()


def _inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def draw_pareto(rows: Sequence[Result], path: Path, ylabel: str, title: str) -> None:
    """Error against FLOPs and against measured time, a line per model and arithmetic."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_flops, by_time = figure.subplots(1, 2, sharey=True)
    colours = {"lmKAN": "tab:red", "MLP": "tab:blue"}
    styles = {"float32": "-", "TF32": "--", "bfloat16": ":"}
    for model, arithmetic in dict.fromkeys((row.model, row.arithmetic) for row in rows):
        line = sorted(
            (r for r in rows if (r.model, r.arithmetic) == (model, arithmetic)), key=lambda r: r.width
        )
        drawn = {"color": colours.get(model), "linestyle": styles.get(arithmetic), "marker": "o"}
        label = f"{model}, {arithmetic}"
        by_time.plot([r.microseconds for r in line], [r.error for r in line], label=label, **drawn)
        if arithmetic == "float32":
            by_flops.plot([r.flops for r in line], [r.error for r in line], label=model, **drawn)
            for r in line:
                for ax, x in ((by_flops, r.flops), (by_time, r.microseconds)):
                    ax.annotate(
                        str(r.width), (x, r.error), textcoords="offset points", xytext=(4, 4), fontsize=8
                    )
    for ax, xlabel in ((by_flops, "FLOPs per sample"), (by_time, f"µs per batch of {rows[0].batch}")):
        ax.set(xscale="log", xlabel=xlabel)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)
    if min(r.error for r in rows) > 0 and max(r.error for r in rows) / min(r.error for r in rows) > 5:
        by_flops.set_yscale("log")
    by_flops.set_ylabel(ylabel)
    figure.suptitle(f"{title} ({rows[0].device}; numbers are hidden widths)", fontsize=11)
    figure.savefig(path, dpi=150)


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def standard_scale(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, the latter never zero."""
    mean, deviation = values.double().mean().item(), values.double().std().item()
    return mean, deviation if deviation > 0 and math.isfinite(deviation) else 1.0
