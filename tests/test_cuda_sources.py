"""CUDA kernels compile for every architecture, in all the variants that their templates have.

No GPU is needed. Candidates come from the families themselves, so a new one is covered as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from random import Random

import pytest
from jinja2 import Environment, FileSystemLoader, StrictUndefined, nodes

from lmkan_gen import golden, toolchain
from lmkan_gen.device import CUDA_ARCHITECTURES, target
from lmkan_gen.families import families
from lmkan_gen.families import family as family_called
from lmkan_gen.plan import Constant, KernelSpec
from lmkan_gen.problem import LayerShape, Operation, Problem, TableDtype
from lmkan_gen.resources import resource_directory
from lmkan_gen.toolchain import nvcc
from lmkan_gen.tuning_file import load

#: large, small batch, few inputs with a fine grid, and partial tiles everywhere, the last pair too
SHAPES = (
    LayerShape(512, 512, 18, 262144),
    LayerShape(128, 128, 26, 1024),
    LayerShape(12, 256, 28, 65536),
    LayerShape(33, 33, 9, 65),
)
#: where templates go ways that they do not go for the next architecture, and which that is
NEXT = {"sm_75": "sm_80", "sm_80": "sm_90"}
#: what is compiled for an architecture need not be for one that differs in the size of its memories
ALIKE = {"sm_86": "sm_80", "sm_89": "sm_86"}
#: random candidates of each family, operation and shape to choose from, and how many are taken anyway
POOL, TAKEN = 100, 1
SHIPPED = [p for p in sorted(resource_directory("tuning").glob("*.yaml")) if "arch: sm_" in p.read_text()]

#: the first of the two predicates that it writes is one that can be read
CLAMP_WITH_PREDICATE = re.compile(r"VIMNMX\S*\.RELU\S* +\w+, +P[0-6],")

#: an outcome of a condition in a template (file, line, number of the condition, outcome), or a
#: parameter with its value
Feature = tuple[str | int | bool, ...]


class Recorder(Environment):
    """Renders as `lmkan_gen.codegen` does, white space aside, and notes which way each condition went."""

    def __init__(self) -> None:
        loader = FileSystemLoader(resource_directory("templates"))
        super().__init__(loader=loader, undefined=StrictUndefined)
        self.globals["_note"] = self._note
        self.conditions: set[tuple[str, int, int]] = set()
        self._seen: set[Feature] = set()

    def features(self, spec: KernelSpec) -> set[Feature]:
        """The outcomes of all conditions that are met in rendering ``spec``."""
        self._seen = set()
        self.get_template(spec.template).render(spec.context)
        return self._seen

    def _note(self, file: str, line: int, number: int, outcome: object) -> object:
        self._seen.add((file, line, number, bool(outcome)))
        return outcome

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        assert name is not None
        for number, node in enumerate(tree.find_all((nodes.If, nodes.CondExpr))):
            assert isinstance(node, nodes.If | nodes.CondExpr)
            place = (name, node.lineno, number)
            self.conditions.add(place)
            arguments = [*map(nodes.Const, place), node.test]
            node.test = nodes.Call(nodes.Name("_note", "load"), arguments, [], None, None, lineno=node.lineno)
        return tree


RECORDER = Recorder()


@dataclass(frozen=True)
class Selected:
    """Kernels to compile for one architecture, and all that occurs in them."""

    defaults: frozenset[KernelSpec]
    others: frozenset[KernelSpec]
    features: frozenset[Feature]


@cache
def select(arch: str) -> Selected:
    """Every default, a few random candidates, and more of them as long as they have new features."""
    defaults: set[KernelSpec] = set()
    others: set[KernelSpec] = set()
    features: set[Feature] = set()
    for operation, table in product(Operation, TableDtype):
        for family in families("cuda", operation, table):
            random = Random(f"{arch} {operation} {table} {family.name}")
            shapes = SHAPES if table is TableDtype.FLOAT32 else SHAPES[::3]
            variants = (
                *((s, False, False) for s in shapes),
                (shapes[0], True, False),
                (shapes[0], False, True),
                (shapes[0], True, True),
                (shapes[-1], True, False),
            )
            for shape, deterministic, strided in variants:
                problem = Problem(
                    operation, shape, target(arch), table, deterministic, constant=True, strided=strided
                )
                if not strided and (parameters := family.default(problem)) is not None:
                    defaults.add(family.spec(problem, parameters))
                usual = not deterministic and not strided
                for i, candidate in enumerate(islice(family.drawn(problem, random), POOL)):
                    spec = family.spec(problem, candidate)
                    found = RECORDER.features(spec)
                    found |= {
                        (family.name, str(operation), n, v)
                        for n, v in candidate.items()
                        if isinstance(v, str)
                    }
                    if (i < TAKEN and usual) or not found <= features:
                        others.add(spec)
                        features |= found
    return Selected(frozenset(defaults), frozenset(others), frozenset(features))


def build(specs: Collection[KernelSpec]) -> dict[KernelSpec, toolchain.Binary]:
    """All of ``specs`` compiled; a compiler that is missing is an error like any other."""
    results = dict(zip(specs, toolchain.build(list(specs)), strict=True))
    binaries = {spec: result for spec, result in results.items() if isinstance(result, toolchain.Binary)}
    errors = [str(result) for spec, result in results.items() if spec not in binaries]
    assert not errors, f"{len(errors)} of {len(results)} kernels:\n" + "\n\n".join(errors)
    return binaries


def check_no_spills(binaries: Mapping[KernelSpec, toolchain.Binary]) -> None:
    """No kernel keeps in memory what belongs into registers."""
    spilling = [
        f"{r.kernel} stores {r.spill_stores} and loads {r.spill_loads} bytes in {spec.template} "
        f"for {spec.arch} with {', '.join(f'{k}={v}' for k, v in spec.constants)}"
        for spec, binary in binaries.items()
        for r in toolchain.resources(binary)
        if r.spill_stores or r.spill_loads
    ]
    assert not spilling, "\n".join(spilling)


def one_of_each_kind(specs: Iterable[KernelSpec]) -> Collection[KernelSpec]:
    """Of each template, one for each operation and element type of tables."""
    return {(s.template, s.context.get("operation"), s.context.get("table")): s for s in specs}.values()


def check_no_wrong_clamps(binaries: Mapping[KernelSpec, toolchain.Binary]) -> None:
    """Nothing depends on the predicate of a VIMNMX.RELU. One kernel of each kind is read: it takes long.

    ptxas 13.0 takes it for whether ``max(0, min(i, c))`` equals ``c``, which an H200 showed to be wrong.
    """
    wrong = [
        f"{spec.template} for {spec.arch} with {', '.join(f'{k}={v}' for k, v in spec.constants)}"
        for spec in one_of_each_kind(binaries)
        if CLAMP_WITH_PREDICATE.search(toolchain.sass(binaries[spec]))
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_out() -> None:
    """Each named value of a parameter, and each condition of a template both ways, on some architecture."""
    seen = {feature for arch in CUDA_ARCHITECTURES for feature in select(arch).features}
    named = {
        (family.name, str(operation), name, value)
        for operation in Operation
        for family in families("cuda", operation)
        for name, values in family.space(operation).items()
        for value in values
        if isinstance(value, str)
    }
    assert named - seen == set()
    outcomes = {(*condition, outcome) for condition in RECORDER.conditions for outcome in (True, False)}
    assert outcomes
    assert outcomes - seen == set()


def _but_for_capability(spec: KernelSpec) -> tuple[str, frozenset[tuple[str, Constant]]]:
    return spec.template, frozenset(item for item in spec.constants if item[0] != "capability")


@pytest.mark.slow
@pytest.mark.parametrize("arch", CUDA_ARCHITECTURES)
def test_every_variant_compiles_and_defaults_do_not_spill(arch: str) -> None:
    selected = select(arch)
    defaults = selected.defaults
    others = selected.others
    if arch != "sm_90":  # only those in which a template goes such a way; elsewhere none
        seen = select(NEXT.get(arch, arch)).features
        others = frozenset(spec for spec in others if not RECORDER.features(spec) <= seen)
    if arch in ALIKE:  # one of each kind, and what is not a default there
        known = {_but_for_capability(spec) for spec in select(ALIKE[arch]).defaults}
        new = (spec for spec in defaults if _but_for_capability(spec) not in known)
        defaults = frozenset((*one_of_each_kind(defaults), *new))
    binaries = build(defaults | others)
    check_no_spills({spec: binaries[spec] for spec in defaults})
    if arch == "sm_90":
        check_no_wrong_clamps({spec: binaries[spec] for spec in defaults})


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_choices_compile_and_do_not_spill(path: Path) -> None:
    """With deterministic algorithms neither: the same entries are used."""
    file = load(path)
    specs = {spec for _, spec in golden.specs(file)}
    for entry, (problem, _) in zip(file.entries, golden.specs(file), strict=True):
        chosen, ordered = family_called(entry.family), replace(problem, deterministic=True)
        if not chosen.violations(ordered, entry.parameters):
            specs.add(chosen.spec(ordered, entry.parameters))
    binaries = build(specs)
    check_no_spills(binaries)
    check_no_wrong_clamps(binaries)


def test_clamps_with_predicates_are_recognised() -> None:
    """In what nvdisasm makes of a comparison with the last cell's number, and of an ordinary clamp."""
    assert CLAMP_WITH_PREDICATE.search("/*0150*/                   VIMNMX.RELU R4, P2, P2, R8, 0x3, PT ;")
    assert not CLAMP_WITH_PREDICATE.search("/*01d0*/                   VIMNMX.RELU R5, PT, PT, R8, 0x3, PT ;")


def test_nvrtc_takes_the_kernels_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads some of C++ otherwise than nvcc, by which everything else here is compiled."""
    monkeypatch.delenv(nvcc.OVERRIDE, raising=False)
    monkeypatch.setattr(nvcc, "installed", lambda: ())
    monkeypatch.setattr(toolchain, "_known", {})
    specs: dict[tuple[str, Operation], KernelSpec] = {}
    tables = (TableDtype.FLOAT32, TableDtype.FLOAT16)
    for operation, table, batch in product(Operation, tables, (4096, 8)):
        problem = Problem(operation, LayerShape(64, 64, 5, batch), target("sm_90"), table, constant=True)
        for family in families("cuda", operation, table):
            parameters = family.default(problem)
            if parameters is not None:
                specs.setdefault((family.name, operation), family.spec(problem, parameters))
    templates = {path.name for path in resource_directory("templates").glob("*.cu.j2")}
    assert {spec.template for spec in specs.values()} == templates
    try:
        toolchain.compiler(next(iter(specs.values())))
    except toolchain.CompilerMissing as error:
        pytest.skip(str(error))
    for binary in toolchain.build(list(specs.values())):
        assert not isinstance(binary, Exception), binary
