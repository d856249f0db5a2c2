"""A training loop for the examples, whose steps are replays of a CUDA graph on GPUs.

Steps of small networks are dozens of kernels of a few microseconds, which take longer to launch than to run.
A graph launches them all at once. What changes from step to step (samples, learning rate, weights of the
regularisation and of preconditioned layers) stands in tensors that are overwritten between replays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmkan_gen.fitting import FittingSchedule
from lmkan_gen.nn import hessian_penalty, lmkan_layers

Batch = tuple[Tensor, ...]

#: steps before a capture: they compile and load kernels, and allocate what the optimiser keeps
_WARM_UP = 3


def train(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterator[Batch],
    steps: Iterable[int],
    schedule: Callable[[nn.Module, Optimizer], FittingSchedule],
    learning_rate: float,
    graph: bool = True,
) -> None:
    """Adam under a schedule, one batch a step.

    Args:
        model: trained in place, in the mode it is in.
        loss: of the tensors of a batch; it must not wait for the device.
        batches: of equal shapes, at least as many as there are steps.
        steps: to iterate over; a progress bar, for example.
        schedule: made for the model and its optimiser. Its regularisation is added to the loss.
        learning_rate: before the schedule's factor.
        graph: on a GPU, capture steps instead of launching each kernel.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    rate = torch.tensor(learning_rate, device=device) if on_gpu else learning_rate
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=on_gpu and graph, fused=on_gpu)
    plan = schedule(model, optimizer)
    regularised = bool(lmkan_layers(model))
    weight = torch.zeros((), device=device)
    held: list[Tensor] = []

    def step(with_penalty: bool) -> None:
        total = loss(*held)
        if with_penalty:
            total = total + weight * hessian_penalty(model)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    # one stream for everything: gradients remember the stream that they were first accumulated on
    stream = torch.cuda.Stream(device) if on_gpu else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        runs = {
            with_penalty: _Replayed(step, with_penalty, stream if graph else None)
            for with_penalty in (False, True)
        }
        for _ in steps:
            batch = next(batches)
            if not held:
                held.extend(tensor.clone() for tensor in batch)
            for into, tensor in zip(held, batch, strict=True):
                into.copy_(tensor)
            strength = plan.settings.hessian if regularised else 0.0
            weight.fill_(strength)
            runs[strength > 0]()
            plan.step()
    if stream is not None:
        torch.cuda.current_stream(device).wait_stream(stream)


class _Replayed:
    """A step: a few times as it is, then captured and replayed, if there is a stream to capture on."""

    def __init__(
        self, step: Callable[[bool], None], argument: bool, stream: torch.cuda.Stream | None
    ) -> None:
        self._step, self._argument, self._stream = step, argument, stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._stream is None or self._calls <= _WARM_UP:
            self._step(self._argument)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph, stream=self._stream):
                    self._step(self._argument)  # recorded, not run
            except RuntimeError as error:
                error.add_note("the training step could not be captured as a CUDA graph; try --no-graph")
                raise
        self._graph.replay()
