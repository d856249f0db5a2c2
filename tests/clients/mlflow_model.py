"""MLflow: models logged to a run, and loaded again as torch modules and as Python functions."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pytorch
import torch
from mlflow.models import infer_signature
from torch import nn

from lmkan_gen.nn import LMKANMLP, lmkan_layers
from tests.clients.checks import close, falls, outputs, run, samples


def network(losses: list[float]) -> LMKANMLP:
    """A network after some training."""
    model = LMKANMLP((4, 16, 1), num_grids=8, precondition="relu_first")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = samples(512)
    for _ in range(80):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval()


def logged(model: nn.Module, **options: Any) -> str:
    """The address of a model in a run of its own."""
    x, _ = samples(8)
    with mlflow.start_run():
        signature = infer_signature(x.numpy(), outputs(model, x).numpy())
        return str(mlflow.pytorch.log_model(model, name="model", signature=signature, **options).model_uri)


def metrics() -> str:
    """Losses that were logged are in the run"""
    losses: list[float] = []
    network(losses)
    with mlflow.start_run() as active:
        for step, loss in enumerate(losses):
            mlflow.log_metric("loss", loss, step=step)
    history = mlflow.MlflowClient().get_metric_history(active.info.run_id, "loss")
    close([entry.value for entry in history], losses, 0)
    return falls(losses, 0.3)


def reloaded() -> str:
    """A logged model gives the same outputs as a torch module and as a Python function"""
    model = network([])
    x, _ = samples(100)
    uri = logged(model, serialization_format="pickle")
    close(outputs(mlflow.pytorch.load_model(uri), x), outputs(model, x), 0)
    return close(mlflow.pyfunc.load_model(uri).predict(x.numpy()), outputs(model, x), 0)


def exported() -> str:
    """A model logged as an exported program (pt2) gives the same outputs, for any number of samples"""
    model = network([])
    x, _ = samples(100)
    uri = logged(model, serialization_format="pt2", input_example=x[:8].numpy())
    function = mlflow.pyfunc.load_model(uri)
    for count in (8, 100, 1):
        close(function.predict(x[:count].numpy()), outputs(model, x[:count]), 1e-6)
    return "8, 100, 1 samples"


def frozen() -> str:
    """A logged model with float16 tables gives the same outputs"""
    model = network([])
    for layer in lmkan_layers(model).values():
        layer.freeze(torch.float16)
    x, _ = samples(100)
    uri = logged(model, serialization_format="pickle")
    return close(mlflow.pyfunc.load_model(uri).predict(x.numpy()), outputs(model, x), 0)


def frozen_exported() -> str:
    """A model with int8 tables that was logged without pickle (pt2) gives the same outputs"""
    model = network([])
    for layer in lmkan_layers(model).values():
        layer.freeze(torch.int8)
    x, _ = samples(100)
    uri = logged(model, serialization_format="pt2", input_example=x[:8].numpy())
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    try:
        return close(mlflow.pyfunc.load_model(uri).predict(x.numpy()), outputs(model, x), 1e-6)
    finally:
        del os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"]


def state() -> str:
    """A state dict that was logged loads"""
    model = network([])
    x, _ = samples(100)
    with mlflow.start_run() as active:
        mlflow.pytorch.log_state_dict(model.state_dict(), "state")
    other = LMKANMLP((4, 16, 1), num_grids=8, precondition="relu_first")
    other.load_state_dict(mlflow.pytorch.load_state_dict(f"runs:/{active.info.run_id}/state"))
    return close(outputs(other, x), outputs(model, x), 0)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{Path(folder) / 'runs.db'}")
        mlflow.create_experiment("clients", artifact_location=(Path(folder) / "artifacts").as_uri())
        mlflow.set_experiment("clients")
        run(metrics, reloaded, exported, frozen, frozen_exported, state)
