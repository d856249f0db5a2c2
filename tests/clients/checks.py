"""What every script of this folder shares: named checks that all run, and lines that `run.py` reads."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: a check raises if its claim does not hold, and returns what it measured
Check = Callable[[], str]


def run(*checks: Check) -> None:
    """Run every check, whatever the others do, and exit with status 1 if one failed.

    Prints a line per check: ``ok: `` or ``FAILED: ``, the first line of its docstring, and what it measured
    or the error that began it. Tracebacks go to stderr.
    """
    failed = 0
    for check in checks:
        claim = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
        torch.manual_seed(0)
        try:
            print(f"ok: {claim} ({check()})", flush=True)
        except Exception as error:
            traceback.print_exc()
            failed += 1
            origin: BaseException = error
            while origin.__cause__ is not None:
                origin = origin.__cause__
            reason = " ".join(f"{type(origin).__name__}: {origin}".split())
            print(f"FAILED: {claim}: {reason}", flush=True)
    sys.exit(bool(failed))


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


def deviation(found: object, expected: object) -> float:
    """The largest deviation in units of the largest expected magnitude.

    Args:
        found: anything that `torch.as_tensor` takes.
        expected: the same, of the same shape.

    Raises:
        AssertionError: shapes differ, or a value is not finite.
    """
    a, b = (torch.as_tensor(t).detach().cpu().double() for t in (found, expected))
    require(a.shape == b.shape, f"shape {list(a.shape)}, expected {list(b.shape)}")
    require(bool(a.isfinite().all()), "a value is not finite")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def close(found: object, expected: object, tolerance: float) -> str:
    """Require the `deviation` to be at most ``tolerance``, 0 for equal values; returns it in words."""
    error = deviation(found, expected)
    require(error <= tolerance, f"off by {error:.2e} of the largest value, allowed are {tolerance:.0e}")
    return f"off by {error:.1e}" if tolerance else "equal bits"


def falls(losses: list[float], factor: float) -> str:
    """Require the mean of the last five losses to be below ``factor`` times that of the first three."""
    first, last = sum(losses[:3]) / 3, sum(losses[-5:]) / 5
    require(last < factor * first, f"the loss fell from {first:.3g} to {last:.3g} only")
    return f"loss {first:.2g} to {last:.2g}"


def samples(count: int, inputs: int = 4, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Inputs ``[count, inputs]`` and a function of them ``[count, 1]`` that no linear one fits.

    Inputs are uniform with unit variance: outside the data an lmKAN extrapolates steeply.
    """
    x = (2 * torch.rand(count, inputs, generator=generator) - 1) * 3**0.5
    return x, (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].abs() - 0.5 * x[:, 3:4]


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The outputs of ``model`` in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        y: Tensor = model(x)
    return y
