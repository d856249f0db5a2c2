"""Random CH4 configurations labelled with GFN2-xTB energies and gradients.

    python -m examples.methane.generate --configurations 600000

Carbon sits at the origin, four hydrogens are uniform in a sphere of 3.5 Å, and no two atoms are closer than
0.5 Å. Most of these are far from methane's minimum: broken bonds, H2, CH2. Energies come from `tblite` (``pip
install tblite``), at an electronic temperature of 5000 K, which is usual where bonds break: at 300 K one
configuration in thirty does not converge, and neighbouring ones may converge to different states. What does
not converge is dropped.

A killed run goes on where it was: shards are on disk, and each depends on its number alone, so that the
result does not depend on the number of processes either.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed as completed
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track

RADIUS, LEAST_DISTANCE = 3.5, 0.5
#: positions are multiples of 1 / RESOLUTION Å, so that int16 holds them exactly
RESOLUTION = 2**13
SHARD = 2500
SEED = 0
_KELVIN, _BOHR, _HARTREE = 3.166808578545117e-6, 0.529177210903, 27.211386245988
_TEMPERATURE = 5000 * _KELVIN
#: where several processes compute, more threads in each would only fight
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Array = NDArray[np.floating]


class Configurations(NamedTuple):
    """``positions`` ``[n, 4, 3]`` of the hydrogens in Å, ``energies`` ``[n]`` in eV, ``gradients`` of the
    energy ``[n, 4, 3]`` in eV/Å with respect to the positions."""

    positions: Array
    energies: Array
    gradients: Array


def sample(count: int, generator: np.random.Generator) -> Array:
    """Positions of hydrogens ``[count, 4, 3]`` in Å; see the module's text."""
    found = np.empty((0, 4, 3))
    while len(found) < count:
        drawn = generator.uniform(-RADIUS, RADIUS, (20 * count, 4, 3))
        drawn = np.round(drawn * RESOLUTION) / RESOLUTION
        inside = np.linalg.norm(drawn, axis=-1).max(axis=1) <= RADIUS
        drawn = drawn[inside]
        found = np.concatenate([found, drawn[shortest_distances(drawn) >= LEAST_DISTANCE]])
    return found[:count]


def shortest_distances(positions: Array) -> Array:
    """Of any two of the five atoms, ``[n]``, in the unit of ``positions`` ``[n, 4, 3]``."""
    atoms = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    first, second = np.triu_indices(5, 1)
    shortest: Array = np.linalg.norm(atoms[:, first] - atoms[:, second], axis=-1).min(axis=1)
    return shortest


def label(positions: Array) -> Configurations:
    """Energies and gradients, without configurations whose energy does not converge.

    Raises:
        ImportError: `tblite` is not installed.
    """
    from tblite.exceptions import TBLiteRuntimeError
    from tblite.interface import Calculator

    kept, energies, gradients = [], [], []
    elements = np.array([6, 1, 1, 1, 1])
    for hydrogens in positions:
        atoms = np.concatenate([np.zeros((1, 3)), hydrogens])
        # made anew each time: no result depends on the one before
        calculator = Calculator("GFN2-xTB", elements, atoms / _BOHR)
        calculator.set("verbosity", 0)
        calculator.set("temperature", _TEMPERATURE)
        try:
            result = calculator.singlepoint()
        except TBLiteRuntimeError as error:
            if "not converged" not in str(error):
                raise
            continue
        kept.append(hydrogens)
        energies.append(result.get("energy") * _HARTREE)
        gradients.append(result.get("gradient")[1:] * (_HARTREE / _BOHR))
    shape = (len(kept), 4, 3)
    return Configurations(
        np.reshape(kept, shape), np.array(energies, dtype=float), np.reshape(gradients, shape)
    )


def save(path: Path, found: Configurations) -> None:
    """Write a compact file, at once or not at all: 52 bytes a configuration.

    Positions are exact, energies float32, gradients float16 (relative errors below 5e-4).
    """
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    with staged.open("wb") as stream:
        np.savez(
            stream,
            positions=np.round(found.positions * RESOLUTION).astype(np.int16),
            energies=found.energies.astype(np.float32),
            gradients=found.gradients.astype(np.float16),
        )
    staged.replace(path)


def load(path: Path) -> Configurations:
    """What `save` wrote, as float32."""
    with np.load(path) as file:
        return Configurations(
            file["positions"].astype(np.float32) / RESOLUTION,
            file["energies"],
            file["gradients"].astype(np.float32),
        )


def generate(path: Path, configurations: int, processes: int | None = None) -> None:
    """Make ``path`` with at least ``configurations`` of them drawn, of which some may be dropped.

    Args:
        path: of the file; shards are kept in a directory beside it.
        configurations: how many to draw, rounded up to whole shards of 2500.
        processes: to work in; by default one per core.

    Raises:
        ImportError: `tblite` is not installed.
    """
    try:
        import tblite  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "methane's energies are computed with tblite: pip install tblite. Or copy a file made "
            f"elsewhere by `python -m examples.methane.generate` to {path}"
        ) from error
    directory = path.with_suffix(".shards")
    directory.mkdir(parents=True, exist_ok=True)
    shards = [directory / f"{number:05}.npz" for number in range(-(-configurations // SHARD))]
    missing = [shard for shard in shards if not shard.exists()]
    # spawned, not forked: threads of torch and of OpenMP do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _set_up, (_ONE_THREAD,)) as pool:
        futures = [pool.submit(_make, shard) for shard in missing]
        try:
            for future in track(completed(futures), "configurations", total=len(futures)):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    parts = [load(shard) for shard in shards]
    save(path, Configurations(*(np.concatenate(columns) for columns in zip(*parts, strict=True))))


def _set_up(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _make(shard: Path) -> None:
    save(shard, label(sample(SHARD, np.random.default_rng((SEED, int(shard.stem))))))


def main(
    configurations: Annotated[int, typer.Option(min=1, help="How many to draw.")] = 600_000,
    output: Annotated[Path, typer.Option(help="The file.")] = Path("results/data/methane.npz"),
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
) -> None:
    """Generate configurations of CH4 with energies and gradients; goes on where it was."""
    generate(output, configurations, processes)
    found = load(output)
    print(f"{output}: {len(found.energies)} configurations, {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
