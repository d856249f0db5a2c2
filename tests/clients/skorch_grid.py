"""skorch and scikit-learn: `GridSearchCV` over an lmKAN network, pipelines, pickles."""

from __future__ import annotations

import pickle
import tempfile

import numpy as np
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetRegressor
from skorch.callbacks import EarlyStopping
from skorch.dataset import Dataset
from skorch.helper import predefined_split

from lmkan_gen.nn import LMKANMLP
from tests.clients.checks import close, require, run, samples


def estimator() -> NeuralNetRegressor:
    """A network that skorch makes anew for every fit."""
    return NeuralNetRegressor(
        LMKANMLP,
        module__widths=(4, 16, 1),
        optimizer=torch.optim.Adam,
        lr=1e-2,
        max_epochs=30,
        batch_size=64,
        train_split=None,
        verbose=0,
    )


def data(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples that are not standardised yet."""
    x, y = samples(count)
    return (3 + 10 * x).numpy(), y.numpy()


def searched() -> str:
    """GridSearchCV finds a network that predicts held-out samples, in two processes"""
    x, y = data(1000)
    pipeline = make_pipeline(StandardScaler(), estimator())
    grid = {
        "neuralnetregressor__module__num_grids": [4, 8],
        "neuralnetregressor__lr": [1e-6, 1e-2],  # the first one is too small to learn
    }
    search = GridSearchCV(pipeline, grid, cv=3, n_jobs=2, error_score="raise").fit(x, y)
    require(search.best_params_["neuralnetregressor__lr"] == 1e-2, f"the best is {search.best_params_}")
    unseen, expected = data(300)
    score, linear = search.score(unseen, expected), LinearRegression().fit(x, y).score(unseen, expected)
    require(score > 0.9, f"R2 is {score:.3f}")
    require(linear < 0.6, f"R2 of a linear model is {linear:.3f}: the task is too simple to tell")
    return f"R2 {score:.3f}, of a linear model {linear:.3f}"


def copied() -> str:
    """A pickled estimator predicts the same, and a clone is untrained"""
    x, y = (a.astype(np.float32) for a in data(200))
    x = StandardScaler().fit_transform(x)
    fitted = estimator().set_params(max_epochs=3).fit(x, y)
    fresh = clone(fitted)
    require(not getattr(fresh, "initialized_", False), "a clone is initialised")
    return close(pickle.loads(pickle.dumps(fitted)).predict(x), fitted.predict(x), 0)


def saved() -> str:
    """Parameters saved as safetensors load into a fresh estimator"""
    x, y = (a.astype(np.float32) for a in data(200))
    x = StandardScaler().fit_transform(x)
    fitted, fresh = estimator().set_params(max_epochs=3).fit(x, y), estimator().initialize()
    with tempfile.TemporaryDirectory() as folder:
        fitted.save_params(f_params=f"{folder}/model.safetensors", use_safetensors=True)
        fresh.load_params(f_params=f"{folder}/model.safetensors", use_safetensors=True)
    return close(fresh.predict(x), fitted.predict(x), 0)


def stopped() -> str:
    """Early stopping ends with the parameters that were best on held-out samples"""
    (x, y), (unseen, expected) = (tuple(t.numpy() for t in samples(count)) for count in (400, 200))
    stopping = EarlyStopping("valid_loss", patience=4, load_best=True)
    net = estimator().set_params(
        lr=3e-2, max_epochs=200, callbacks=[stopping], train_split=predefined_split(Dataset(unseen, expected))
    )
    net.fit(x, y)
    losses = net.history[:, "valid_loss"]
    require(4 < len(losses) < 200, f"it stopped after {len(losses)} epochs")
    error = float(np.square(net.predict(unseen) - expected).mean())
    return f"after {len(losses)} epochs, loss {close(error, min(losses), 1e-5)}"


if __name__ == "__main__":
    run(searched, copied, saved, stopped)
