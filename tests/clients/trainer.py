"""Hugging Face Transformers: `Trainer`, its checkpoints, `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

from lmkan_gen.nn import LMKANMLP, LMKANBlock, lmkan_layers
from tests.clients.checks import close, falls, require, run, samples

INPUTS = 4


class LMKANConfig(PretrainedConfig):  # type: ignore[misc]  # Any, to mypy
    """Sizes of the network, and what its tables are frozen to, if anything."""

    model_type = "lmkan_regressor"

    def __init__(self, width: int = 16, table_dtype: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.table_dtype = table_dtype


class LMKANRegressor(PreTrainedModel):  # type: ignore[misc]  # Any, to mypy
    """An `LMKANMLP` with a squared error, built from its configuration as users build theirs."""

    config_class = LMKANConfig

    def __init__(self, config: LMKANConfig) -> None:
        super().__init__(config)
        widths = (INPUTS, config.width, 1)
        self.network: torch.nn.Module = LMKANMLP(widths, num_grids=8, precondition="relu_first")
        if config.table_dtype is not None:
            freeze(self, config.table_dtype)
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """``[samples, 4]`` -> ``[samples, 1]``."""
        y = self.network(x.to(self.dtype))  # Trainer casts models for half precision, but not the data
        loss = None if labels is None else torch.nn.functional.mse_loss(y, labels)
        return SequenceClassifierOutput(loss=loss, logits=y)


class Block(GradientCheckpointingLayer, LMKANBlock):  # type: ignore[misc]  # Any, to mypy
    """A block that computes its insides again in the backward pass if the user wants that."""


class CheckpointingRegressor(LMKANRegressor):
    """The same of such blocks."""

    supports_gradient_checkpointing = True

    def __init__(self, config: LMKANConfig) -> None:
        super().__init__(config)
        self.network = torch.nn.Sequential(
            Block(INPUTS, config.width, normalize=False), Block(config.width, 1)
        )
        self.post_init()


def freeze(model: LMKANRegressor, table_dtype: str) -> None:
    """Freeze every layer, and say so in the configuration."""
    model.config.table_dtype = table_dtype
    for layer in lmkan_layers(model).values():
        layer.eval().freeze(getattr(torch, table_dtype))


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """What `samples` gives, as `Trainer` wants it."""

    def __init__(self, count: int) -> None:
        self.x, self.y = samples(count, INPUTS)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


def train(
    folder: str,
    steps: int,
    resume: str | None = None,
    kind: type[LMKANRegressor] = LMKANRegressor,
    **options: Any,
) -> tuple[LMKANRegressor, list[float]]:
    """A network after so many optimiser steps on the same data in the same order, and its losses."""
    torch.manual_seed(1)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=20,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    model = kind(LMKANConfig())
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(512))
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def checkpointed() -> str:
    """Gradient checkpointing does not change the training"""
    with tempfile.TemporaryDirectory() as folder:
        _, expected = train(f"{folder}/plain", 20, kind=CheckpointingRegressor)
        model, losses = train(
            f"{folder}/checkpointed", 20, kind=CheckpointingRegressor, gradient_checkpointing=True
        )
        blocks = [m for m in model.modules() if isinstance(m, Block)]
        require(all(b.gradient_checkpointing for b in blocks), "blocks are not checkpointed")
        return close(losses, expected, 0)


def evaluated_in_half_precision() -> str:
    """Evaluation in bfloat16 and in float16 gives the loss of float32"""
    words = []
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train(f"{folder}/run", 20)
        data = Samples(256)
        expected = torch.nn.functional.mse_loss(predict(model, data.x), data.y)
        for name, tolerance in {"bf16": 3e-2, "fp16": 3e-3}.items():
            options: dict[str, Any] = {f"{name}_full_eval": True}
            arguments = TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, **options)
            trainer = Trainer(model=copy.deepcopy(model), args=arguments, eval_dataset=data)
            loss = trainer.evaluate()["eval_loss"]
            require(trainer.model.dtype != torch.float32, "evaluation was in float32")
            words.append(f"{name} {close(loss, expected, tolerance)}")
    return ", ".join(words)


def predict(model: PreTrainedModel, x: Tensor) -> Tensor:
    """Outputs in evaluation mode."""
    model.eval()
    with torch.no_grad():
        y: Tensor = model(x).logits
    return y


def trained() -> str:
    """Trainer makes the loss fall"""
    with tempfile.TemporaryDirectory() as folder:
        model, losses = train(folder, 60)
        require(type(model) is LMKANRegressor, "the model was replaced")
    return falls(losses, 0.2)


def resumed() -> str:
    """Resuming from a checkpoint of Trainer ends where an uninterrupted run does"""
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = train(f"{folder}/whole", 40)
        train(f"{folder}/parts", 20)
        rest, losses = train(f"{folder}/parts", 40, resume=f"{folder}/parts/checkpoint-20")
        require(len(losses) == 40, f"{len(losses)} losses in the history, expected 40")
        x, _ = samples(100, INPUTS)
        return close(predict(rest, x), predict(whole, x), 0)


def reloaded() -> str:
    """from_pretrained gives the outputs of the saved model"""
    x, _ = samples(100, INPUTS)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train(f"{folder}/run", 20)
        model.save_pretrained(f"{folder}/model")
        other, report = LMKANRegressor.from_pretrained(f"{folder}/model", output_loading_info=True)
        require_complete(report)
        return close(predict(other, x), predict(model, x), 0)


def reloaded_half() -> str:
    """from_pretrained(dtype=float16) computes what the float32 model does, to float16's precision"""
    x, _ = samples(100, INPUTS)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train(f"{folder}/run", 20)
        model.save_pretrained(f"{folder}/model")
        other = LMKANRegressor.from_pretrained(f"{folder}/model", dtype=torch.float16)
        found = predict(other, x.half())
        require(found.dtype == torch.float16, f"outputs have dtype {found.dtype}")
        return close(found, predict(model, x), 1e-2)


def reloaded_frozen(table_dtype: str) -> str:
    """Outputs before and after, of a model that `LMKANRegressor` freezes as its configuration says."""
    x, _ = samples(100, INPUTS)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train(f"{folder}/run", 20)
        freeze(model, table_dtype)
        model.save_pretrained(f"{folder}/model")
        require(any(Path(f"{folder}/model").glob("*.safetensors")), "no safetensors file was written")
        other, report = LMKANRegressor.from_pretrained(f"{folder}/model", output_loading_info=True)
        require_complete(report)
        require(str(getattr(torch, table_dtype)) in str(table_dtypes(other)), f"{table_dtypes(other)}")
        return close(predict(other, x), predict(model, x), 0)


def reloaded_float16() -> str:
    """from_pretrained gives the outputs of a model with tables frozen to float16"""
    return reloaded_frozen("float16")


def reloaded_int8() -> str:
    """from_pretrained gives the outputs of a model with tables frozen to int8"""
    return reloaded_frozen("int8")


def sharded() -> str:
    """from_pretrained gives the outputs of a model with frozen tables that was saved in several files"""
    x, _ = samples(100, INPUTS)
    with tempfile.TemporaryDirectory() as folder:
        model = LMKANRegressor(LMKANConfig(width=64))
        freeze(model, "float16")
        model.save_pretrained(folder, max_shard_size="20KB")
        files = len(list(Path(folder).glob("*.safetensors")))
        require(files > 1, f"there are {files} files")
        other, report = LMKANRegressor.from_pretrained(folder, output_loading_info=True)
        require_complete(report)
        return f"{files} files, {close(predict(other, x), predict(model, x), 0)}"


def table_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    """Element types of the tables in a model's state dict."""
    return {t.dtype for name, t in model.state_dict().items() if name.endswith("frozen.values")}


def mistaken() -> str:
    """from_pretrained reports the tables that a file with frozen ones does not have"""
    with tempfile.TemporaryDirectory() as folder:
        model = LMKANRegressor(LMKANConfig())
        freeze(model, "float16")
        model.config.table_dtype = None
        model.save_pretrained(folder)
        _, report = LMKANRegressor.from_pretrained(folder, output_loading_info=True)
        missing = [name for name in report["missing_keys"] if name.endswith("func_parameter")]
        require(len(missing) == 2, f"missing keys are {sorted(report['missing_keys'])}")
    return f"{len(missing)} tables"


def require_complete(report: dict[str, Any]) -> None:
    """Require that every tensor of the file found its place, and the other way round."""
    left = {kind: sorted(names) for kind, names in report.items() if names}
    require(not left, f"from_pretrained reports {left}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    run(
        trained,
        resumed,
        checkpointed,
        evaluated_in_half_precision,
        reloaded,
        reloaded_half,
        reloaded_float16,
        reloaded_int8,
        sharded,
        mistaken,
    )
