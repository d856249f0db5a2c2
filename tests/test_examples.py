"""What the examples compare, and that they compare like with like."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from examples.comparison import (
    Result,
    Results,
    call,
    deployed,
    flops,
    in_arithmetic,
    lmkan,
    mlp,
    paper_schedule,
)
from examples.function_approximation.task import PRESETS, Samples, network
from examples.plan import choose
from examples.summary import sentences, verdicts
from examples.training import train

ROOT = Path(__file__).resolve().parent.parent


def result(
    model: str, width: int, error: float, flops: int, microseconds: float, arithmetic: str = "float32"
) -> Result:
    return Result(model, width, arithmetic, error, flops, 10, microseconds, 0.1, 7, 1.0, "cpu")


def test_flops_are_those_of_the_formulas() -> None:
    assert flops(mlp(32, 64, 2)) == 2 * (32 * 64 + 64 * 64 + 64)
    # four multiply-adds per function of two inputs
    assert flops(lmkan(32, 64, 2, 12)) == 8 * (16 * 64 + 32 * 64 + 32)


@pytest.mark.parametrize("kind", ["mlp", "lmkan"])
def test_deployed_models_compute_what_was_trained(kind: str) -> None:
    model: nn.Module = mlp(6, 8, 2) if kind == "mlp" else lmkan(6, 8, 2, 8)
    for _ in range(3):
        call(model, torch.randn(64, 6))
    model.eval()
    ready = deployed(model)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in ready.modules())
    x = torch.randn(100, 6)
    torch.testing.assert_close(call(ready, x), call(model, x), rtol=1e-4, atol=1e-5)


def test_results_survive_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    row = result("MLP", 32, 0.5, 100, 1.5)
    Results(path).add([row])
    again = Results(path)
    assert again.rows == [row]
    assert again.has("MLP", 32)
    assert not again.has("MLP", 64)


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("model,width\nMLP,32\n")
    with pytest.raises(ValueError, match="another version"):
        Results(path)


@pytest.mark.parametrize("arithmetic", ["float16 tables", "int8 tables", "bfloat16"])
def test_other_arithmetics_are_close(arithmetic: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = mlp(6, 8, 2) if arithmetic == "bfloat16" else lmkan(6, 8, 2, 8)
    x = torch.randn(200, 6)
    for _ in range(30):
        call(model, x)
    ready = deployed(model.eval())
    network, dtype = in_arithmetic(ready, arithmetic)
    y, exact = call(network, x.to(dtype)).float(), call(ready, x)
    assert 0 < (y - exact).norm() < 0.05 * exact.norm()
    torch.testing.assert_close(call(ready, x), exact, rtol=0, atol=0)  # the original is as it was


def test_plans_are_chosen_by_name() -> None:
    plan = [("lmKAN", 8), ("MLP", 16)]
    assert choose(plan, []) == plan
    assert choose(plan, ["MLP-16"]) == [("MLP", 16)]
    with pytest.raises(ValueError, match="no model 'MLP-17'"):
        choose(plan, ["MLP-17"])


def test_summary_interpolates_in_logarithms() -> None:
    rows = [
        result("lmKAN", 1, 0.4, 100, 10),
        result("lmKAN", 2, 0.1, 10_000, 1000),
        result("lmKAN", 3, 0.3, 20_000, 2000),  # beaten by the one before
        result("MLP", 1, 0.5, 50, 5),
        result("MLP", 2, 0.2, 4000, 400),
        result("MLP", 3, 0.05, 10**6, 10**5),
    ]
    first, second, third = verdicts(rows, "float32")
    assert (first.error, first.at_least) == (None, True)  # no lmKAN is so fast
    assert first.time_ratio == pytest.approx(0.5)  # but the fastest is more accurate
    assert second.time_ratio == pytest.approx(4)  # 0.2 is halfway from 0.4 to 0.1: 100 µs
    assert second.flops_ratio == pytest.approx(4)
    # 400 µs is log10(40) / 2 of the way from 10 to 1000 µs
    assert second.error == pytest.approx(0.4 * 0.25 ** (math.log10(40) / 2))
    assert (third.error, third.time_ratio) == (0.1, None)
    assert sentences(rows, "float32") == [
        "float32: lmKAN is faster at equal error than MLP 2 (4.00x)",
        "float32: the fastest lmKAN here is slower, but more accurate, than MLP 1",
        "float32: no lmKAN here is as accurate as MLP 3",
    ]


def test_summary_takes_each_model_in_its_best_arithmetic() -> None:
    rows = [
        result("lmKAN", 1, 0.2, 100, 50),
        result("lmKAN", 1, 0.2, 100, 25, "float16 tables"),
        result("MLP", 1, 0.2, 100, 100),
        result("MLP", 1, 0.201, 100, 10, "TF32"),  # as good as the same
        result("MLP", 1, 0.25, 100, 5, "float16"),  # faster, but worse
        result("MLP", 2, 0.15, 100, 200),
    ]
    assert [v.time_ratio for v in verdicts(rows, "float32")] == [2, None]
    best = [(v.mlp.width, v.mlp.arithmetic, v.time_ratio) for v in verdicts(rows, None)]
    assert best == [(1, "TF32", 0.4), (2, "float32", None)]


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    for _ in range(count):
        x = torch.randn(64, 4)
        yield x, (x[:, :1] * x[:, 1:2]).tanh()


@pytest.mark.parametrize("kind", ["mlp", "lmkan"])
def test_training_is_the_loop_that_it_seems_to_be(kind: str) -> None:
    torch.manual_seed(1)
    trained: nn.Module = mlp(4, 8, 2) if kind == "mlp" else lmkan(4, 8, 2, 8)
    expected = copy.deepcopy(trained)
    make = paper_schedule(1e-2, 40)
    train(
        trained.train(),
        lambda x, y: mse_loss(call(trained, x), y),
        batches(40),
        range(40),
        make,
        5e-3,
    )
    optimizer = torch.optim.Adam(expected.train().parameters(), lr=5e-3)
    schedule = make(expected, optimizer)
    for x, y in batches(40):
        loss = mse_loss(call(expected, x), y)
        if kind == "lmkan":
            loss = loss + schedule.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("forces", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "lmkan"])
def test_replayed_steps_are_steps(kind: str, forces: bool) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not forces:
            return mse_loss(call(model, x), y)
        x = x.detach().requires_grad_()
        found = call(model, x)
        (slopes,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return mse_loss(found, y) + slopes.square().mean()

    x, y = (tensor.cuda() for tensor in next(batches(1)))
    errors = []
    for graph in (False, True):
        torch.manual_seed(1)
        model: nn.Module = (mlp(4, 8, 2) if kind == "mlp" else lmkan(4, 8, 2, 8)).cuda()
        untrained = loss(model.eval(), x, y).item()
        train(
            model.train(),
            lambda x, y, model=model: loss(model, x, y),
            ((x.cuda(), y.cuda()) for x, y in batches(200)),
            range(200),
            paper_schedule(1e-2, 200),
            5e-3,
            graph,
        )
        errors.append(loss(model.eval(), x, y).item())
    assert errors[0] < 0.7 * untrained
    # the order of sums differs, and Adam makes much of little
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_inputs_are_drawn_again_and_labels_kept(tmp_path: Path) -> None:
    preset = dataclasses.replace(PRESETS["quick"], batch=16, label_batches=3, test_batches=2)
    first, again = (Samples(preset, 10, tmp_path / "labels.pt") for _ in range(2))
    target = network(preset)
    drawn = [next(batch) for batch in [first.batches()] for _ in range(4)]
    assert torch.equal(drawn[0][0], drawn[3][0])  # after all, the first again
    assert not torch.equal(drawn[0][0], drawn[1][0])
    values = torch.cat([target(x) for x, _ in drawn[:3]]).detach()
    labels = torch.cat([y for _, y in drawn[:3]])
    torch.testing.assert_close(labels, (values - values.mean()) / values.std(), rtol=1e-4, atol=1e-4)
    assert torch.equal(first.labels, again.labels)
    assert not any(torch.equal(x, first.test[0][:16]) for x, _ in drawn)
    x, y = first.test
    torch.testing.assert_close(y, (target(x).detach() - values.mean()) / values.std(), rtol=1e-4, atol=1e-4)
    # of another length, or for other inputs: made anew
    assert len(Samples(preset, 2, tmp_path / "labels.pt").labels) == 2


def test_another_seed_draws_everything_anew(tmp_path: Path) -> None:
    preset = dataclasses.replace(PRESETS["quick"], batch=16, label_batches=3, test_batches=2)
    kept, other = (Samples(preset, 3, tmp_path / f"{seed}.pt", seed=seed) for seed in (0, 1))
    drawn = [x for samples in (kept, other) for x, _ in itertools.islice(samples.batches(), 3)]
    drawn += [*kept.test[0].split(16), *other.test[0].split(16)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    x, _ = kept.test
    assert not torch.allclose(network(preset, 0)(x), network(preset, 1)(x))


def test_seeds_have_their_own_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.function_approximation", "--steps", "20"]
    command += ["--output", str(tmp_path), "--only", "MLP-16"]
    for seed in ("0", "1"):
        done = subprocess.run(
            [*command, "--seed", seed], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    directories = (tmp_path, tmp_path / "seed-1")
    first, second = (Results(directory / "results.csv").rows[0].error for directory in directories)
    assert first != second
    states = [
        torch.load(directory / "models" / "MLP-16.pt", weights_only=True)["model"]
        for directory in directories
    ]
    # 20 steps go nowhere near: what is left is mostly the initial values
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in zip(*map(weights, states), strict=True))


def weights(state: dict[str, Tensor]) -> list[Tensor]:
    return [values for values in state.values() if values.ndim == 2]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_function_approximation_runs_and_goes_on(tmp_path: Path, jobs: str) -> None:
    command = [sys.executable, "-m", "examples.function_approximation", "--steps", "20", "--jobs", jobs]
    command += ["--output", str(tmp_path), "--only", "lmKAN-8", "--only", "MLP-16"]
    for _ in range(2 if jobs == "1" else 1):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with (tmp_path / "results.csv").open(newline="") as stream:
            models = [(row["model"], row["width"], row["arithmetic"]) for row in csv.DictReader(stream)]
        assert set(models) == {("lmKAN", "8", "float32"), ("MLP", "16", "float32"), ("MLP", "16", "bfloat16")}
        assert len(models) == 3
    if jobs == "1":
        assert "lmKAN 8" not in done.stdout  # finished before
    assert (tmp_path / "pareto.png").exists()
    assert "lmKAN against MLPs" in (tmp_path / "summary.txt").read_text()
