"""SchNetPack: energies and forces of a SchNet whose readout is an lmKAN."""

from __future__ import annotations

import torch
from ase.build import molecule
from torch import Tensor, nn

from lmkan_gen.nn import LMKANMLP, lmkan_layers
from tests.clients.checks import close, falls, require, run
from tests.clients.repairs import make_schnetpack_importable

make_schnetpack_importable()
import schnetpack.atomistic  # noqa: E402
import schnetpack.model  # noqa: E402
import schnetpack.nn  # noqa: E402
import schnetpack.representation  # noqa: E402
from schnetpack import properties  # noqa: E402

CUTOFF = 5.0


def potential() -> nn.Module:
    """SchNet with the two linear layers of its readout replaced."""
    representation = schnetpack.representation.SchNet(
        n_atom_basis=16,
        n_interactions=2,
        radial_basis=schnetpack.nn.GaussianRBF(n_rbf=12, cutoff=CUTOFF),
        cutoff_fn=schnetpack.nn.CosineCutoff(CUTOFF),
    )
    energy = schnetpack.atomistic.Atomwise(n_in=16, output_key=properties.energy)
    energy.outnet = LMKANMLP((16, 16, 1), num_grids=8, precondition="relu_first")
    model: nn.Module = schnetpack.model.NeuralNetworkPotential(
        representation,
        input_modules=[schnetpack.atomistic.PairwiseDistances()],
        output_modules=[energy, schnetpack.atomistic.Forces()],
    )
    require(len(lmkan_layers(model)) == 2, "the readout was not replaced")
    return model


def batch(positions: list[Tensor], numbers: Tensor) -> dict[str, Tensor]:
    """Molecules of the same atoms in the form that SchNetPack collates them to, all pairs as neighbours."""
    atoms, count = len(numbers), len(positions)
    pairs = [(i, j) for i in range(atoms) for j in range(atoms) if i != j]
    first, second = torch.tensor(pairs).T
    offsets = (atoms * torch.arange(count)).view(-1, 1)
    dtype = positions[0].dtype
    return {
        properties.Z: numbers.repeat(count),
        properties.R: torch.cat(positions),
        properties.n_atoms: torch.full((count,), atoms),
        properties.idx_m: torch.arange(count).repeat_interleave(atoms),
        properties.idx_i: (first + offsets).flatten(),
        properties.idx_j: (second + offsets).flatten(),
        properties.offsets: torch.zeros(count * len(pairs), 3, dtype=dtype),
        properties.cell: torch.zeros(count, 3, 3, dtype=dtype),
        properties.pbc: torch.zeros(3 * count, dtype=torch.bool),
    }


def methane() -> tuple[Tensor, Tensor]:
    """Positions in Angstrom, float64, and atomic numbers."""
    atoms = molecule("CH4")
    return torch.tensor(atoms.get_positions()), torch.tensor(atoms.get_atomic_numbers())


def differentiated() -> str:
    """Forces are the negative gradient of the energy, by finite differences in float64"""
    positions, numbers = methane()
    model = potential()
    places = [positions + 0.1 * torch.randn_like(positions) for _ in range(3)]
    model.train()
    for _ in range(3):  # statistics of batch norm
        model(batch([p.float() for p in places], numbers))
    model.double().eval()
    forces = model(batch(places, numbers))[properties.forces]
    numeric, step = torch.zeros_like(forces), 1e-5
    for place in range(forces.numel()):
        energies = []
        for sign in (1, -1):
            shift = torch.zeros(forces.numel(), dtype=torch.float64)
            shift[place] = sign * step
            moved = list((torch.stack(places) + shift.view(3, -1, 3)).unbind())
            energies.append(model(batch(moved, numbers))[properties.energy].sum())
        numeric.view(-1)[place] = -(energies[0] - energies[1]).detach() / (2 * step)
    require(forces.abs().max().item() > 1e-3, "there are no forces to compare")
    return close(forces, numeric, 1e-6)


def precise() -> str:
    """Energies and forces in float32, from the kernels, are those of float64"""
    positions, numbers = methane()
    model = potential().train()
    places = [positions + 0.1 * torch.randn_like(positions) for _ in range(8)]
    for _ in range(3):
        model(batch([p.float() for p in places], numbers))
    model.eval()
    single = model(batch([p.float() for p in places], numbers))
    double = model.double()(batch(places, numbers))
    close(single[properties.forces], double[properties.forces], 1e-4)
    return close(single[properties.energy], double[properties.energy], 1e-4)


def trained() -> str:
    """Training on energies and forces makes both losses fall: gradients go through the forces"""
    positions, numbers = methane()
    bonds = positions[1:].norm(dim=1).mean()

    def truth(place: Tensor) -> Tensor:
        stretch = (place[1:] - place[:1]).norm(dim=1) - bonds
        energy: Tensor = (1 - (-2 * stretch).exp()).square().sum()  # a Morse potential per bond
        return energy

    places, energies, forces = [], [], []
    for _ in range(64):
        place = (positions + 0.1 * torch.randn_like(positions)).requires_grad_()
        energy = truth(place)
        (gradient,) = torch.autograd.grad(energy, place)
        places.append(place.detach().float())
        energies.append(energy.detach().float())
        forces.append(-gradient.float())
    model = potential().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    of_energy, of_forces = [], []
    for _ in range(120):
        chosen = torch.randperm(64)[:16].tolist()
        found = model(batch([places[i] for i in chosen], numbers))
        loss_e = nn.functional.mse_loss(found[properties.energy], torch.stack([energies[i] for i in chosen]))
        loss_f = nn.functional.mse_loss(found[properties.forces], torch.cat([forces[i] for i in chosen]))
        optimizer.zero_grad()
        (loss_e + loss_f).backward()
        optimizer.step()
        of_energy.append(loss_e.item())
        of_forces.append(loss_f.item())
    return f"energy: {falls(of_energy, 0.3)}, forces: {falls(of_forces, 0.3)}"


if __name__ == "__main__":
    run(differentiated, precise, trained)
