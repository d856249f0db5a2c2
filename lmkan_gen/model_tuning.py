"""Tuning for a model: which lmKAN layer calls it makes, and the fastest kernels for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lmkan_gen import dispatch
from lmkan_gen.dispatch import Used
from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.nn.layers import lmkan_layers
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation
from lmkan_gen.watching import watching

if TYPE_CHECKING:
    from lmkan_gen.tuner.progress import Observer
    from lmkan_gen.tuning_file import TuningFile


def tune(
    model: nn.Module,
    sample_input: Any,
    *,
    forward_only: bool = False,
    trials: int | None = None,
    time_budget: float | None = None,
    output: Path | None = None,
    resume: bool = False,
    storage_url: str | None = None,
    observer: Observer | None = None,
) -> TuningFile:
    """Find the fastest kernels for all lmKAN layers of a model, where it is, at its sizes.

    The model runs once, in evaluation mode and without gradients, to see which calls it makes; each
    distinct shape is then tuned. Layers find the results by themselves, the model's from its next call on.
    In scripts call it under ``if __name__ == "__main__":``, since it starts a measuring process.

    Args:
        model: calls lmKAN layers, all on one device.
        sample_input: of the size that matters later: a tuple becomes positional arguments, a mapping
            keyword arguments, anything else the only argument.
        forward_only: leave gradients out, for inference.
        trials: candidates to try per shape and operation; by default those of the quick preset.
        time_budget: seconds for all of it; None: as long as it takes.
        output: tuning file to write or add to; by default one that layers find.
        resume: go on with what an earlier, interrupted run of the same search measured.
        storage_url: share the search with other processes; see `lmkan_gen.tuner.run.tune`.
        observer: hears of the progress, such as `lmkan_gen.tuner.report.ConsoleObserver`.

    Returns:
        The entries of this run.

    Raises:
        ValueError: the model makes no lmKAN call that kernels run, or makes them on several devices.
        lmkan_gen.tuner.run.TuningFailed: no kernel could be tuned.
        lmkan_gen.tuner.worker.NotGuarded: called in a script on standard input, or not under the guard.
    """
    from lmkan_gen.tuner import run, worker

    worker.refuse_in_measuring_process()  # before the model runs
    calls = _calls(model, sample_input)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} makes no lmKAN call in float32 or half precision with this sample "
            "input, so there is nothing to tune"
        )
    devices = {call.device for call in calls}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the model's lmKAN layers are on {names}; move them to one device to tune them")
    operations = (Operation.FORWARD,) if forward_only else CALL_OPERATIONS
    return run.tune(
        list(dict.fromkeys(call.shape for call in calls)),
        devices.pop(),
        operations,
        trials=trials or run.QUICK_TRIALS,
        time_budget=time_budget,
        output=output,
        resume=resume,
        storage_url=storage_url,
        observer=observer,
    )


def layers(model: nn.Module) -> list[LMKAN2DLayer]:
    """The lmKAN layers of a model, each once.

    Raises:
        ValueError: there is none.
    """
    found = list(lmkan_layers(model).values())
    if not found:
        raise ValueError(f"{type(model).__name__} has no LMKAN2DLayer to tune for")
    return found


def layer_shapes(model: nn.Module, batches: Iterable[int]) -> list[LayerShape]:
    """Distinct shapes of the model's layers, for each batch; for models whose layers all see one batch."""
    found = {
        LayerShape(layer.input_dim, layer.output_dim, layer.num_grids, batch): None
        for batch in batches
        for layer in layers(model)
    }
    return list(found)


def layer_calls(model: nn.Module, sample_input: Any) -> list[LayerShape]:
    """Distinct shapes with which the model calls lmKAN layers, in the order of the calls.

    What counts is what runs: layers inside other modules, compiled ones and plain calls of `lmkan_gen.lmkan`
    too. A convolution calls its layer once for each slab of patches. Calls with a batch of 0 and in float64
    run no kernel and do not count. The model is left as it was.
    """
    return list(dict.fromkeys(call.shape for call in _calls(model, sample_input)))


def _calls(model: nn.Module, sample_input: Any) -> list[Used]:
    with watching(model, {}), dispatch.recording() as seen:
        if isinstance(sample_input, tuple):
            model(*sample_input)
        elif isinstance(sample_input, Mapping):
            model(**sample_input)
        else:
            model(sample_input)
    return [call for call in seen if call.operation is Operation.FORWARD]
