"""Run a model to see what reaches some of its modules, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

#: given a module, its positional arguments and its keyword arguments
Watcher = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def watching(model: nn.Module, watchers: Mapping[nn.Module, Watcher]) -> Iterator[None]:
    """Within the context the model is in evaluation mode, without gradients, and calls are watched.

    Args:
        model: any; the training mode of each of its modules is restored.
        watchers: called before the modules that they are given for.
    """
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module, watcher in watchers.items():
            stack.callback(module.register_forward_pre_hook(watcher, with_kwargs=True).remove)
        try:
            model.eval()
            with torch.no_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training
