"""What the examples share: models of equal interface, evaluation in several arithmetics, results on disk."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.optim import Optimizer

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
    """Preconditioned lmKAN layers; batch last throughout."""
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
