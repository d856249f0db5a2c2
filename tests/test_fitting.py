"""Schedules against the published ones, written out, and in use with optimisers and Lightning."""

from __future__ import annotations

import copy
import importlib
import math
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lmkan_gen import dispatch
from lmkan_gen.fitting import Curve, FittingSchedule, Phase
from lmkan_gen.nn import LMKANMLP, LMKANBlock, hessian_penalty, preconditioned_layers


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "1")


def published(epoch: int) -> tuple[float, float]:
    """The authors' function: learning rate and weight of the regularisation."""
    if epoch <= 250:
        return 1e-3, 1.0 / 10 ** (epoch / 30)
    return 0.5 * 1e-3 * (1.0 + math.cos(math.pi * (epoch - 250) / 250)), 0.0


def test_two_phases_are_the_published_function() -> None:
    model = LMKANMLP((2, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = FittingSchedule.two_phase(model, optimizer)
    for epoch in range(501):
        rate, weight = published(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12, abs=1e-18)
        assert schedule.settings.hessian == pytest.approx(weight, rel=1e-9)
        assert schedule.finished == (epoch == 500)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_four_phases() -> None:
    model = LMKANMLP((4, 3, 1), precondition="relu_first")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = FittingSchedule.four_phase(
        model, optimizer, 100, fractions=(0.1, 0.2, 0.3), cooldown_fraction=0.2, hessian_end=1e-6
    )
    seen: list[tuple[float, float, float]] = []
    for _ in range(101):
        gammas = {layer.gamma.item() for layer in preconditioned_layers(model).values()}
        assert len(gammas) == 1
        seen.append((optimizer.param_groups[0]["lr"], schedule.settings.hessian, gammas.pop()))
        schedule.step()
    rate, weight, gamma = (torch.tensor(column, dtype=torch.float64) for column in zip(*seen, strict=True))
    assert (gamma[:11] == 0).all()  # I
    torch.testing.assert_close(gamma[10:31].diff(), torch.full((20,), 0.3 / 20).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(gamma[30:], torch.full((71,), 0.3).double(), atol=1e-7, rtol=0)
    assert (weight[:31] == 1).all()  # I and II
    ratio = (weight[31:61] / weight[30:60]).log10()
    torch.testing.assert_close(ratio, torch.full((30,), -6 / 30).double())
    assert (weight[61:] == 1e-6).all()  # IV
    assert (rate[:81] == 2e-3).all()
    expected = 1e-3 * (1 + torch.cos(torch.pi * torch.arange(1, 21).double() / 20))
    torch.testing.assert_close(rate[81:], expected)


def test_a_hundredth_of_the_regularisation_stays() -> None:
    model = LMKANMLP((4, 3, 1), precondition="relu_first")
    schedule = FittingSchedule.four_phase(model, steps=1000, hessian=0.5)
    assert schedule.at(60).hessian == 0.5
    assert schedule.at(360).hessian == pytest.approx(5e-3)
    assert schedule.at(361).hessian == schedule.at(1000).hessian == 5e-3


def test_learning_rates_are_factors_on_each_group() -> None:
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": torch.tensor(0.1)}], lr=1)
    schedule = FittingSchedule([Phase("half", 2, Curve(1, 0.5))], nn.Linear(1, 1), optimizer)
    schedule.step()
    schedule.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])
    assert isinstance(optimizer.param_groups[1]["lr"], Tensor)


def test_without_an_optimizer_learning_rates_are_left_to_other_schedulers() -> None:
    model = LMKANMLP((4, 3, 1), precondition="relu_last")
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    schedule = FittingSchedule.four_phase(model, steps=100)
    for _ in range(4):
        optimizer.step()
        schedule.step()
        other.step()
    assert optimizer.param_groups[0]["lr"] == 0.5**4
    assert 0 < model.blocks[0].lmkan.gamma.item() < 0.3  # type: ignore[union-attr, operator]


def test_penalty() -> None:
    model = LMKANMLP((4, 3, 1))
    schedule = FittingSchedule([Phase("on", 1, hessian=Curve(0.25, 0))], model)
    torch.testing.assert_close(schedule.penalty(), 0.25 * hessian_penalty(model))
    schedule.step()
    assert schedule.penalty().item() == 0
    (torch.ones((), requires_grad=True) + schedule.penalty()).backward()


def loop(
    model: nn.Module, optimizer: Any, schedule: FittingSchedule, data: list[tuple[Tensor, Tensor]]
) -> None:
    for x, y in data:
        loss = mse_loss(model(x), y) + schedule.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_a_run_can_be_resumed(kind: Any) -> None:
    data = [(x := torch.randn(32, 3), x.prod(1, keepdim=True)) for _ in range(20)]

    def start() -> tuple[nn.Module, Any, FittingSchedule]:
        torch.manual_seed(0)
        model = LMKANMLP((3, 4, 1), 6, precondition="relu_first")
        optimizer = kind(model.parameters(), lr=1e-2)
        return model, optimizer, FittingSchedule.four_phase(model, optimizer, 20)

    whole = start()
    loop(*whole, data)
    first = start()
    loop(*first, data[:9])
    states = [copy.deepcopy(part.state_dict()) for part in first]
    second = start()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    loop(*second, data[9:])
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert whole[1].param_groups[0]["lr"] == second[1].param_groups[0]["lr"]


def test_regularisation_smooths() -> None:
    x = torch.randn(256, 2)
    y = torch.sign(x[:, :1] * x[:, 1:])
    roughness = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = LMKANMLP((2, 1), 12)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        schedule = FittingSchedule([Phase("all", 100, hessian=Curve(weight))], model, optimizer)
        loop(model, optimizer, schedule, [(x, y)] * 100)
        roughness.append(hessian_penalty(model).item())
    assert roughness[1] < 0.05 * roughness[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curve(-1), "start must be finite and not negative, got -1"),
        (lambda: Curve(1, math.inf), "end must be finite"),
        (lambda: Curve(1, 0, "exponential"), "an exponential curve never reaches zero, but end is 0"),
        (lambda: Curve(1, 0, "sine"), "shape must be 'linear', 'exponential' or 'cosine', got 'sine'"),  # type: ignore[arg-type]
        (lambda: Phase("I", -1), "steps of phase 'I' must not be negative, got -1"),
        (lambda: FittingSchedule([], nn.Linear(1, 1)), "phases must hold at least one"),
        (lambda: FittingSchedule.four_phase(LMKANMLP((2, 1))), "has no preconditioned layer"),
        (
            lambda: FittingSchedule.four_phase(nn.Linear(1, 1), fractions=(0.5, 0.5, 0.5)),
            "add up to more than 1",
        ),
    ],
)
def test_bad_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`FittingCallback` on a stand-in for Lightning's base class."""
    package, module = types.ModuleType("lightning"), types.ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    monkeypatch.delitem(sys.modules, "lmkan_gen.fitting.lightning", raising=False)
    yield importlib.import_module("lmkan_gen.fitting.lightning").FittingCallback
    sys.modules.pop("lmkan_gen.fitting.lightning", None)


def test_callback_adds_the_penalty_once_per_optimizer_step(callback: Any) -> None:
    model = LMKANBlock(4, 2, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    trainer = types.SimpleNamespace(optimizers=[optimizer])
    phases = [Phase("only", 2, Curve(1, 0), Curve(0.5))]
    hook = callback(lambda m, o: FittingSchedule(phases, m, o), interval="step")
    hook.on_train_start(trainer, model)
    for accumulated in (False, False, True):  # three batches make one optimiser step
        model(torch.randn(8, 4)).sum().backward()
        if accumulated:
            table = model.lmkan.layer.func_parameter
            before = table.grad.clone()  # type: ignore[union-attr]
            with torch.no_grad():  # as inside an optimiser
                hook.on_before_optimizer_step(trainer, model, optimizer)
            (expected,) = torch.autograd.grad(0.5 * hessian_penalty(model), [table])
            assert table.grad is not None
            torch.testing.assert_close(table.grad - before, expected, rtol=1e-4, atol=1e-5)
        hook.on_train_batch_end(trainer, model, None, None, 0)
    hook.on_train_epoch_end(trainer, model)
    assert optimizer.param_groups[0]["lr"] == 0.5
    later = callback(lambda m, o: FittingSchedule(phases, m, o), interval="step")
    later.load_state_dict(hook.state_dict())
    assert later.state_dict() == {"position": 1}  # loaded and saved again without training
    later.on_train_start(trainer, model)
    assert later.schedule.state_dict() == hook.schedule.state_dict() == {"position": 1}


def test_callback_refuses_what_it_cannot_do(callback: Any) -> None:
    with pytest.raises(ValueError, match="interval must be 'epoch' or 'step', got 'batch'"):
        callback(FittingSchedule.two_phase, interval="batch")
    hook = callback(FittingSchedule.two_phase)
    with pytest.raises(ValueError, match="exactly one optimizer, configure_optimizers made 0"):
        hook.on_train_start(types.SimpleNamespace(optimizers=[]), nn.Linear(1, 1))


def test_without_lightning_the_callback_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lmkan_gen.fitting.lightning", raising=False)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("lmkan_gen.fitting.lightning")


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_callback_in_a_real_trainer(tmp_path: Path, interval: Literal["epoch", "step"]) -> None:
    lightning: Any = pytest.importorskip("lightning.pytorch")
    from lmkan_gen.fitting.lightning import FittingCallback

    epochs, batches = 8, 2
    count = epochs if interval == "epoch" else epochs * batches
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randn(40, 1))

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = LMKANMLP((3, 4, 1), 6, precondition="relu_first")

        def training_step(self, batch: Any, index: int) -> Tensor:
            return mse_loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class Spy(lightning.Callback):  # type: ignore[misc]
        """Notes what each optimiser step sees."""

        def __init__(self, hook: Any) -> None:
            self.hook, self.seen = hook, list[tuple[str, float, float]]()

        def on_train_batch_start(self, trainer: Any, module: Any, *arguments: Any) -> None:
            (gamma,) = {layer.gamma.item() for layer in preconditioned_layers(module).values()}
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.seen.append((self.hook.schedule.settings.phase, rate, gamma))

    def fit(checkpoint: Path | None = None, **options: Any) -> tuple[Any, Any, Any]:
        hook = FittingCallback(schedule, interval)
        spy, module = Spy(hook), Module()
        saving = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[saving, hook, spy],
            **options,
        )
        loader = torch.utils.data.DataLoader(data, batch_size=20)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module, hook, spy.seen

    def schedule(model: nn.Module, optimizer: Any) -> FittingSchedule:
        return FittingSchedule.four_phase(
            model, optimizer, count, fractions=(1 / 8, 1 / 4, 1 / 4), cooldown_fraction=1 / 4
        )

    whole, hook, seen = fit()
    assert hook.schedule.finished
    # the same without Lightning
    module = Module()
    optimizer = module.configure_optimizers()
    expected = schedule(module, optimizer)
    steps = []
    for step in range(epochs * batches):
        (gamma,) = {layer.gamma.item() for layer in preconditioned_layers(module).values()}
        steps.append((expected.settings.phase, optimizer.param_groups[0]["lr"], gamma))
        optimizer.zero_grad()
        x, y = (tensor.split(20)[step % batches] for tensor in data.tensors)
        module.training_step((x, y), step).backward()
        expected.penalty().backward()
        optimizer.step()
        if interval == "step" or step % batches == batches - 1:
            expected.step()
    assert seen == steps
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == ["I", "II", "III", "IV", "IV, cooldown"]
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    # a run that goes on from a checkpoint is the same run
    for epoch in (2, 5):
        resumed, _, later = fit(tmp_path / f"epoch={epoch}.ckpt")
        assert later == seen[batches * (epoch + 1) :]
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor)
    # nothing left to do: the position is not lost
    _, hook, later = fit(tmp_path / f"epoch={epochs - 1}.ckpt")
    assert (later, hook.state_dict()) == ([], {"position": count})
    # a step is the optimiser's
    _, hook, _ = fit(accumulate_grad_batches=batches)
    assert hook.schedule.state_dict() == {"position": epochs}
