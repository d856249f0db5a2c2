"""Methane: what the generator promises, and forces against finite differences of energies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.comparison import lmkan, mlp
from examples.methane import generate
from examples.methane.generate import Configurations
from examples.methane.task import SCALE, Samples, energies_of, gradients_of, rotations

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tblite() -> None:
    pytest.importorskip("tblite", reason="tblite, of the examples extra, is not installed")


def test_configurations_keep_their_distances() -> None:
    positions = generate.sample(500, np.random.default_rng(5))
    assert positions.shape == (500, 4, 3)
    atoms = np.concatenate([np.zeros((500, 1, 3)), positions], axis=1)
    for i in range(5):
        for j in range(i):
            assert np.linalg.norm(atoms[:, i] - atoms[:, j], axis=1).min() >= 0.5
    radii = np.linalg.norm(positions, axis=-1)
    assert radii.max() <= 3.5
    # uniform in the sphere: half of the volume is outside of 0.79 radii; fewer than 2000 points, 4 sigma
    assert (radii > 3.5 * 0.5 ** (1 / 3)).mean() == pytest.approx(0.5, abs=0.06)
    # what makes inputs of unit variance
    assert (SCALE * positions).std() == pytest.approx(1, abs=0.05)


def test_files_hold_positions_exactly(tmp_path: Path) -> None:
    positions = generate.sample(50, np.random.default_rng(1))
    rng = np.random.default_rng(2)
    found = Configurations(positions, rng.normal(-97, 2, 50), rng.normal(0, 3, (50, 4, 3)))
    generate.save(tmp_path / "data.npz", found)
    again = generate.load(tmp_path / "data.npz")
    np.testing.assert_array_equal(again.positions, positions)
    np.testing.assert_allclose(again.energies, found.energies, rtol=1e-7)
    np.testing.assert_allclose(again.gradients, found.gradients, rtol=5e-4, atol=1e-7)
    assert list(tmp_path.iterdir()) == [tmp_path / "data.npz"]


@pytest.mark.usefixtures("tblite")
def test_gradients_are_those_of_the_energies() -> None:
    positions = generate.sample(2, np.random.default_rng(3))
    gradients = generate.label(positions).gradients
    step = 1e-3
    for atom in range(4):
        for axis in range(3):
            moved = np.repeat(positions, 2, axis=0)
            moved[0::2, atom, axis] += step
            moved[1::2, atom, axis] -= step
            energies = generate.label(moved).energies
            slopes = (energies[0::2] - energies[1::2]) / (2 * step)
            np.testing.assert_allclose(slopes, gradients[:, atom, axis], atol=2e-3)


@pytest.mark.usefixtures("tblite")
def test_methane_is_the_minimum_of_its_surroundings() -> None:
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
    lengths = np.array([0.9, 1.0, 1.09, 1.2, 1.3])  # Å; the bond of methane is 1.09
    found = generate.label(np.stack([length * corners for length in lengths]))
    assert found.energies.argmin() == 2
    assert np.abs(found.gradients[2]).max() < 0.5


@pytest.mark.usefixtures("tblite")
def test_unconverged_configurations_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    # at room temperature some do not converge; which ones, each tells by itself
    monkeypatch.setattr(generate, "_TEMPERATURE", 300 * generate._KELVIN)
    positions = generate.sample(60, np.random.default_rng(1))
    found = generate.label(positions)
    assert 0 < len(found.energies) < len(positions)
    kept = [row.tobytes() for row in found.positions]
    assert set(kept) < {row.tobytes() for row in positions}
    assert found.gradients.shape == (len(kept), 4, 3)
    assert np.isfinite(found.energies).all()


@pytest.mark.usefixtures("tblite")
def test_other_errors_are_not_taken_for_unconverged_ones() -> None:
    with pytest.raises(RuntimeError, match="Too close interatomic distances"):
        generate.label(np.zeros((1, 4, 3)))  # all atoms in one place


@pytest.mark.usefixtures("tblite")
def test_killed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    shards = path.with_suffix(".shards")
    command = [sys.executable, "-m", "examples.methane.generate", "--output", str(path)]
    command += ["--configurations", str(2 * generate.SHARD), "--processes", "1"]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL) as run:
        try:
            while not (shards / "00000.npz").exists():
                assert run.poll() is None
                time.sleep(0.01)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
    assert not path.exists()
    first = shards / "00000.npz"
    made = first.stat().st_mtime_ns
    (shards / "00001.99999.tmp").write_bytes(b"half a file")  # what a kill may leave
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert first.stat().st_mtime_ns == made
    found = generate.load(path)
    assert len(found.energies) == 2 * generate.SHARD
    # as in a run that nobody killed: a shard depends on its number alone
    expected = generate.sample(generate.SHARD, np.random.default_rng((generate.SEED, 1)))
    np.testing.assert_array_equal(found.positions[generate.SHARD :], expected)
    again = generate.label(expected[:3])
    np.testing.assert_allclose(found.energies[generate.SHARD :][:3], again.energies, rtol=1e-6)


def test_missing_tblite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tblite", None)
    with pytest.raises(ImportError, match="pip install tblite"):
        generate.generate(tmp_path / "data.npz", 10)


def test_augmentation_is_a_symmetry(tmp_path: Path) -> None:
    """Batches are training configurations turned, mirrored and permuted; gradients turn along."""
    rng = np.random.default_rng(4)
    positions = generate.sample(40, rng)
    # an energy with all the symmetries, and its gradient
    energies = (positions**2).sum((1, 2))
    generate.save(tmp_path / "data.npz", Configurations(positions, energies, 2 * positions))
    samples = Samples(tmp_path / "data.npz", 10)
    x, e, g = next(samples.batches(64))
    assert x.shape == g.shape == (64, 4, 3)
    mean = energies[:-10].mean()
    torch.testing.assert_close(e[:, 0] * samples.unit + mean, x.square().sum((1, 2)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(g * samples.unit, 2 * x, rtol=2e-3, atol=2e-3)
    radii = np.sort(np.linalg.norm(positions[:-10], axis=2), axis=1)
    found = np.sort(x.norm(dim=2).numpy(), axis=1)
    assert np.abs(found[:, None] - radii[None]).max(axis=2).min(axis=1).max() < 1e-4


def test_rotations_are_rotations() -> None:
    turn = rotations(torch.randn(100, 4, dtype=torch.float64))
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3, dtype=torch.float64).expand(100, 3, 3))
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(100, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["mlp", "lmkan"])
def test_forces_of_models_are_slopes_of_their_energies(kind: str) -> None:
    torch.manual_seed(3)
    model = mlp(12, 8, 2) if kind == "mlp" else lmkan(12, 8, 2, 8)
    model.double().eval()
    positions = torch.from_numpy(generate.sample(20, np.random.default_rng(6)))
    _, gradients = gradients_of(model, positions, create_graph=False)
    step = 1e-7
    agreeing = 0
    with torch.no_grad():
        for atom in range(4):
            for axis in range(3):
                moved = torch.zeros(4, 3, dtype=torch.float64)
                moved[atom, axis] = step
                slopes = energies_of(model, positions + moved) - energies_of(model, positions - moved)
                slopes = slopes[:, 0] / (2 * step)
                agreeing += int(torch.isclose(slopes, gradients[:, atom, axis], rtol=1e-4, atol=1e-6).sum())
    # slopes jump at knots and kinks, which a step may cross
    assert agreeing >= 0.98 * gradients.numel()


def test_example_runs(tmp_path: Path) -> None:
    """On data of a made-up potential, so that it needs no tblite."""
    positions = generate.sample(1000, np.random.default_rng(4))
    energies = (positions**2).sum((1, 2))
    generate.save(tmp_path / "data.npz", Configurations(positions, energies, 2 * positions))
    command = [
        sys.executable,
        "-m",
        "examples.methane",
        "--steps",
        "20",
        "--data",
        str(tmp_path / "data.npz"),
    ]
    command += ["--output", str(tmp_path / "out"), "--only", "lmKAN-8", "--only", "MLP-32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.csv",
        "pareto.png",
        "summary.txt",
        "forces.csv",
        "models",
    }
    lines = (tmp_path / "out" / "forces.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["lmKAN", "8"], ["MLP", "32"]]
