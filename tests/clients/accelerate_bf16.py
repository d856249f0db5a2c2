"""Accelerate: training with bfloat16 autocast, `save_state`, and loading into an empty model."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmkan_gen.nn import LMKANMLP, LMKANConv2d, LMKANLinear, lmkan_layers
from tests.clients.checks import close, falls, outputs, require, run, samples


def network() -> nn.Sequential:
    """A linear layer, whose outputs are bfloat16 under autocast, and lmKAN layers."""
    return nn.Sequential(
        nn.Linear(4, 8), LMKANLinear(8, 16, 8), LMKANMLP((16, 16, 1), 8, normalize_input=True)
    )


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Eight batches, always in the same order."""
    torch.manual_seed(2)
    return DataLoader(TensorDataset(*samples(512)), batch_size=64)


class Run:
    """A network in training under Accelerate."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        self.model, self.optimizer, self.batches = self.accelerator.prepare(model, optimizer, loader())
        self.losses: list[float] = []

    def epochs(self, count: int) -> None:
        """Train on."""
        self.model.train()
        for _ in range(count):
            for x, y in self.batches:
                predicted = self.model(x)
                loss = nn.functional.mse_loss(predicted.float(), y)
                self.optimizer.zero_grad()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.losses.append(loss.item())


def trained() -> str:
    """Training in bf16 makes the loss fall, and parameters stay float32"""
    work = Run()
    work.epochs(12)
    dtypes = {p.dtype for p in work.model.parameters()}
    require(dtypes == {torch.float32}, f"parameters have dtypes {dtypes}")
    x, _ = samples(256)
    plain = work.accelerator.unwrap_model(work.model, keep_fp32_wrapper=False)
    close(outputs(work.model, x), outputs(plain, x), 5e-2)
    return falls(work.losses, 0.2)


def resumed() -> str:
    """save_state and load_state go on where training was"""
    whole, first, second = Run(), Run(), Run()
    whole.epochs(4)
    first.epochs(2)
    with tempfile.TemporaryDirectory() as folder:
        first.accelerator.save_state(folder)
        second.accelerator.load_state(folder)
    second.epochs(2)
    return close(torch.tensor(second.losses), torch.tensor(whole.losses[-len(second.losses) :]), 0)


def dispatched(table_dtype: torch.dtype | None) -> str:
    """The outputs of a model that is built without memory and filled from a file."""
    x, _ = samples(512)
    model = network()
    for _ in range(3):
        model(x)  # statistics of batch norm
    if table_dtype is not None:
        freeze(model, table_dtype)
    expected = outputs(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file(model.state_dict(), path)
        with init_empty_weights(include_buffers=True):
            empty = network()
            if table_dtype is not None:
                freeze(empty, table_dtype)
        loaded = load_checkpoint_and_dispatch(empty, path, device_map={"": "cpu"}, strict=True)
        return close(outputs(loaded, x), expected, 0)


def offloaded() -> str:
    """load_checkpoint_and_dispatch leaves tables on a disk until they are needed, frozen ones too"""
    x, _ = samples(512)
    for table_dtype in (None, torch.float16, torch.int8):
        model = network()
        for _ in range(3):
            model(x)  # statistics of batch norm
        if table_dtype is not None:
            freeze(model, table_dtype)
        expected = outputs(model, x)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.safetensors")
            save_file(model.state_dict(), path)
            with init_empty_weights(include_buffers=True):
                empty = network()
                if table_dtype is not None:
                    freeze(empty, table_dtype)
            loaded = load_checkpoint_and_dispatch(
                empty,
                path,
                device_map={"0": "cpu", "1": "disk", "2": "disk"},
                offload_folder=f"{folder}/tables",
                offload_buffers=True,
            )
            tables = [
                t for name, t in loaded.state_dict().items() if "func_parameter" in name or "values" in name
            ]
            require(len(tables) == 3 and all(t.is_meta for t in tables), "tables are in memory")
            for _ in range(2):
                close(outputs(loaded, x), expected, 0)
    return "float32, float16 and int8, equal bits"


def offloaded_convolution() -> str:
    """cpu_offload serves convolutions that it is told to load as a whole"""
    model, x = nn.Sequential(LMKANConv2d(3, 4, 3, num_grids=8), nn.Flatten()), torch.randn(2, 3, 8, 8)
    expected = outputs(model, x)
    # a convolution reads the table of its layer, but does not call the layer
    found = cpu_offload(model, torch.device("cpu"), True, preload_module_classes=["LMKANConv2d"])
    return close(outputs(found, x), expected, 0)


def freeze(model: nn.Module, table_dtype: torch.dtype) -> None:
    """Freeze every lmKAN layer."""
    for layer in lmkan_layers(model.eval()).values():
        layer.freeze(table_dtype)


def dispatched_float32() -> str:
    """load_checkpoint_and_dispatch fills a model built with init_empty_weights"""
    return dispatched(None)


def dispatched_float16() -> str:
    """load_checkpoint_and_dispatch fills a model whose empty layers were frozen to float16"""
    return dispatched(torch.float16)


def dispatched_int8() -> str:
    """load_checkpoint_and_dispatch fills a model whose empty layers were frozen to int8"""
    return dispatched(torch.int8)


def replaced_float16() -> str:
    """load_checkpoint_and_dispatch fills a model in memory with tables frozen to float16 before"""
    x, _ = samples(512)
    first, second = network(), network()
    freeze(first, torch.float16)
    freeze(second, torch.float16)
    before = outputs(second, x)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file(first.state_dict(), path)
        loaded = load_checkpoint_and_dispatch(second, path, device_map={"": "cpu"}, strict=True)
    require(not torch.equal(outputs(first, x), before), "both models were the same before")
    return close(outputs(loaded, x), outputs(first, x), 0)


class Messages(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.texts.append(record.getMessage())


def mistaken() -> str:
    """load_checkpoint_and_dispatch warns of each frozen table, or refuses it, where layers are not frozen"""
    model, messages = network(), Messages()
    freeze(model, torch.float16)
    logging.getLogger("accelerate").addHandler(messages)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file(model.state_dict(), path)
        load_checkpoint_and_dispatch(network(), path, device_map={"": "cpu"})
        warned = sum(text.count("frozen.values") for text in messages.texts)
        require(warned == 3, f"{warned} of 3 tables were mentioned in {messages.texts}")
        try:
            load_checkpoint_and_dispatch(network(), path, device_map={"": "cpu"}, strict=True)
        except ValueError as error:
            return f"strict: {error}"
    raise AssertionError("strict=True took tables that layers have no place for")


if __name__ == "__main__":
    run(
        trained,
        resumed,
        dispatched_float32,
        dispatched_float16,
        dispatched_int8,
        replaced_float16,
        offloaded,
        offloaded_convolution,
        mistaken,
    )
