"""What a deployed library holds: kernels, and recipes of the plans for layers and batches.

Recipes are those that the launcher learns (`lmkan_gen.launch.recipes`): each serves a range of batches, with
the very plans that these would have here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lmkan_gen import codegen, packing, selection, toolchain
from lmkan_gen.device import Device
from lmkan_gen.families import family
from lmkan_gen.launch import cpu, cuda, recipes
from lmkan_gen.launch.native import Part, Recipe
from lmkan_gen.launch.numbers import Written, write, write_recipe
from lmkan_gen.packing import SCALE_PAIRS, TORCH_DTYPES, RoundedTable
from lmkan_gen.plan import Fill, KernelSpec, Launch, LaunchPlan
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.selection import Choice
from lmkan_gen.toolchain import host, linking
from lmkan_gen.tracing import Trace, Traced, UntraceableError, plain

_TEMPLATE = "deployed.cpp.j2"
_ALIGNMENT = 64
#: what libraries call processors, by the architectures that kernels are compiled for
_LEVELS = {"generic": 0, "x86-64-v3": 3, "x86-64-v4": 4}


@dataclass(frozen=True)
class LayerKind:
    """What the plans of a layer depend on, apart from the batch.

    Attributes:
        inputs: of the layer.
        outputs: of the layer.
        grids: cells per axis.
        table: element type of the table, which stays as it is.
    """

    inputs: int
    outputs: int
    grids: int
    table: TableDtype


@dataclass(frozen=True)
class _Served:
    """A recipe as it is written, its head left open, and the batches among those asked for that it is for."""

    recipe: Recipe
    written: Written
    batches: list[int]


class Library:
    """Plans and kernels for layers on a device, to be written to a file.

    Attributes:
        name: of the operator that the file defines; it stands for the whole content.
        forms: for each kind of layer the forms of its table that plans read, in the operator's order.

    Args:
        kinds: of the layers, each once.
        batches: to prepare plans for, at least 1 each, ascending.
        device: where layers will run.
        deterministic: whether the same call must give the same bits every time.
        workspace: bytes of scratch memory, of that which could grow with the batch.

    Raises:
        ToolchainError: a kernel cannot be compiled.
        ValueError: no kernel fits a layer.
    """

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        batches: Sequence[int],
        device: Device,
        deterministic: bool,
        workspace: int,
    ) -> None:
        self._device = device
        self._deterministic = deterministic
        self._workspace = workspace
        #: numbers of kernels, and of their functions with the most shared memory that these are started with
        self._specs: dict[KernelSpec, int] = {}
        self._functions: dict[tuple[int, str], int] = {}
        self._shared_memory: dict[int, int] = {}
        served = {kind: [self._served(kind, batches, strided) for strided in (False, True)] for kind in kinds}
        self.forms: dict[LayerKind, tuple[str, ...]] = {
            kind: tuple(dict.fromkeys(form for of in both for one in of for form in one.written.forms))
            for kind, both in served.items()
        }
        self._payload = self._packed(served)
        # the same plans mean something else where the source that reads them is another one
        source = codegen.render(KernelSpec.make(_TEMPLATE, host.TORCH, {"name": "forward"}))
        self.name = f"forward_{hashlib.sha256(source.encode() + self._payload).hexdigest()[:24]}"

    def save(self, path: Path) -> None:
        """Compile the library to a file, whole or not at all.

        Raises:
            ToolchainError: there is no C++ compiler, or it refuses the source.
            OSError: the file cannot be written.
        """
        linking.link(KernelSpec.make(_TEMPLATE, host.TORCH, {"name": self.name}), self._payload, path)

    def _served(self, kind: LayerKind, batches: Sequence[int], strided: bool) -> list[_Served]:
        """Recipes that serve all batches."""
        found: list[_Served] = []
        for batch in batches:
            if found and _speaks_for(found[-1].recipe, batch):
                found[-1].batches.append(batch)
            else:
                found.append(self._recipe(kind, batch, strided))
        return found

    def _recipe(self, kind: LayerKind, batch: int, strided: bool) -> _Served:
        problem = Problem(
            Operation.FORWARD,
            LayerShape(kind.inputs, kind.outputs, kind.grids, batch),
            self._device,
            kind.table,
            self._deterministic,
            constant=True,
            workspace=self._workspace,
            strided=strided,
        )
        choice = selection.select(problem)
        if choice.family is None:
            raise ValueError(f"no kernel fits: {choice.describe()}")
        try:
            if recipe := recipes.traced(problem, [choice], self._starts):
                return _Served(recipe, _written(recipe, choice), [batch])
        except UntraceableError:
            pass
        recipe = self._for_one_batch(replace(choice, problem=replace(choice.problem, shape=problem.shape)))
        return _Served(recipe, _written(recipe, choice), [batch])

    def _for_one_batch(self, choice: Choice) -> Recipe:
        assert choice.family is not None
        problem, chosen = choice.problem, family(choice.family)
        spec, plan = chosen.spec(problem, choice.parameters), chosen.plan(problem, choice.parameters)
        batch = problem.shape.batch
        part = Part(spec, plan, problem.table, self._starts(spec, plan))
        return Recipe(range(batch, batch + 1), Trace(batch), [part])

    def _starts(self, spec: KernelSpec, plan: LaunchPlan) -> Sequence[Fill | cuda.Start | cpu.Start]:
        """The steps of a plan, with the numbers of functions in place of addresses."""
        if not spec.is_cuda:
            return [
                s if isinstance(s, Fill) else cpu.Start(self._function(spec, s), s, s.arguments)
                for s in plan.steps
            ]
        return [
            s if isinstance(s, Fill) else replace(s, address=self._function(spec, s.launch))
            for s in cuda.in_order(spec, plan, self._device.multiprocessors)
        ]

    def _function(self, spec: KernelSpec, launch: Launch) -> int:
        kernel = self._specs.setdefault(spec, len(self._specs))
        number = self._functions.setdefault((kernel, launch.kernel), len(self._functions))
        # a plain number: where it depended on the batch, the recipe would not speak for others
        needed = int(launch.shared_memory)
        self._shared_memory[number] = max(self._shared_memory.get(number, 0), needed)
        return number

    def _packed(self, served: dict[LayerKind, list[list[_Served]]]) -> bytes:
        """All of it, as ``Payload`` of the template reads it: numbers, and what they point to behind them."""
        blobs = bytearray()
        numbers = [self._device.kind == "cuda", self._fixed_order(), self._level(), len(self._specs)]
        for image in self._images():
            blobs += bytes(-len(blobs) % _ALIGNMENT)
            numbers += [len(blobs), len(image)]
            blobs += image
        numbers.append(len(self._functions))
        for (kernel, name), number in self._functions.items():
            numbers += [kernel, self._shared_memory[number], len(blobs)]
            blobs += name.encode() + b"\0"
        numbers.append(len(served))
        for kind, both in served.items():
            forms = self.forms[kind]
            sizes = _sizes(kind, forms)
            numbers += [kind.inputs, kind.outputs, kind.grids, len(sizes), *sizes]
            arrangements = list(dict.fromkeys(one.written.forms for of in both for one in of))
            numbers.append(len(arrangements))
            for arrangement in arrangements:
                numbers += [len(arrangement), *map(forms.index, arrangement)]
            for of in both:
                numbers.append(len(of))
                for one in of:
                    head: list[int | Traced] = [arrangements.index(one.written.forms)]
                    headed = replace(one.written, numbers=head + one.written.numbers)
                    numbers += [one.batches[-1], *map(plain, write_recipe(one.recipe, [headed]))]
        start = 8 * (1 + len(numbers))
        start += -start % _ALIGNMENT
        return array("q", [start, *numbers]).tobytes().ljust(start, b"\0") + blobs

    def _images(self) -> Iterator[bytes]:
        for built in toolchain.build(list(self._specs)):
            if isinstance(built, toolchain.ToolchainError):
                raise built
            yield built.path.read_bytes()

    def _level(self) -> int:
        device = self._device
        return device.compute_capability if device.kind == "cuda" else _LEVELS[device.arch]

    def _fixed_order(self) -> bool:
        """Whether the same call gives the same bits; on CPUs it does, for any number of threads."""
        return self._deterministic or self._device.kind == "cpu"


def _speaks_for(recipe: Recipe, batch: int) -> bool:
    return batch in recipe.batches and recipe.trace.values(batch) is not None


def _written(recipe: Recipe, choice: Choice) -> Written:
    (part,) = recipe.parts
    written = write(part, kept=True)
    if written is None:
        raise ValueError(f"the launcher has no room for the plan of {choice.describe()}")
    return written


def arranged(table: RoundedTable, forms: Sequence[str]) -> list[torch.Tensor]:
    """The forms of a table, none of which shares memory with it."""
    made = packing.arranged({}, forms, table.dtype, table)
    own = {t.untyped_storage().data_ptr() for t in (table.values, table.scales) if t is not None}
    found = [made[form] for form in forms]
    return [t.clone() if t.untyped_storage().data_ptr() in own else t for t in found]


def _sizes(kind: LayerKind, forms: Sequence[str]) -> list[int]:
    """Bytes of the forms of a table."""
    shape = LayerShape(kind.inputs, kind.outputs, kind.grids, 1)
    side, groups = kind.grids + 1, -(-shape.pairs // SCALE_PAIRS)
    values = torch.empty(side, side, kind.outputs, shape.pairs, dtype=TORCH_DTYPES[kind.table], device="meta")
    scales = torch.empty(groups, kind.outputs, device="meta") if kind.table is TableDtype.INT8 else None
    made = packing.arranged({}, forms, kind.table, RoundedTable(values, scales))
    return [made[form].nbytes for form in forms]
