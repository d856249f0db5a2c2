"""Which kernel a problem gets: tuning files and demands in, one `Choice` out."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from itertools import product
from types import MappingProxyType

from lmkan_gen.families import Demand, Family, Parameters, families, family
from lmkan_gen.plan import Constant
from lmkan_gen.problem import CALL_OPERATIONS, Layer, LayerShape, Operation, Problem, TableDtype
from lmkan_gen.tuning_sources import (
    TUNING_VARIABLE,
    Evidence,
    Source,
    evidence,
    forget_files,
    sources,
    tuned_batches,
    user_tuning_directory,
)

__all__ = [
    "TUNING_VARIABLE",
    "Choice",
    "Source",
    "Tier",
    "batches_alike",
    "clear_caches",
    "default_choice",
    "select",
    "select_backward",
    "sources",
    "tune_command",
    "tuned_choices",
    "user_tuning_directory",
]

logger = logging.getLogger("lmkan_gen")

_FAR = 6.0  # a factor of 8 in both widths, say
_OVER_TUNED = 1.0  # families that are preferred by more are taken over what was tuned for other shapes
_SPLIT = (Operation.GRAD_INPUT, Operation.GRAD_TABLE)
_BACKWARD = (*_SPLIT, Operation.BACKWARD)
_RANGE_BITS = 4  # of batches, ranges per factor of two as a power of two


class Tier(StrEnum):
    """How well a choice is founded, best first."""

    EXACT = "exact"
    NEAREST_SHAPE = "nearest_shape"
    NEAREST_DEVICE = "nearest_device"
    DEFAULT = "default"
    REFERENCE = "reference"
    DEMANDED = "demanded"


_ORDER = {tier: position for position, tier in enumerate(Tier)}


@dataclass(frozen=True)
class Choice:
    """The kernel for one problem.

    Attributes:
        family: name of the kernel family; None: the plain torch reference.
        parameters: the family's parameters (empty for the reference).
        tier: how well the choice is founded.
        source: the tuning file it came from, or words.
        time_us: median time in microseconds from the tuning file; None unless the tier is exact, where
            another model stood in for the device, or where deterministic algorithms are asked for, which
            were not measured.
        tuned_for: the shape that the parameters were measured on; None when they were not.
        cost: measured picoseconds per function evaluation there; compares choices that were tuned
            for one shape. None when not measured.
        evidence: what tuning files say, where the choice came from there as it is.
    """

    problem: Problem
    family: str | None
    parameters: Parameters = field(hash=False)
    tier: Tier
    source: str
    time_us: float | None = None
    tuned_for: LayerShape | None = None
    cost: float | None = None
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    @property
    def stale(self) -> bool:
        """Whether the kernel's source has changed since it was measured on this device.

        Found out when asked for, which takes milliseconds.
        """
        return self.evidence is not None and self.evidence.stale

    def describe(self) -> str:
        """One line: what runs, and why."""
        p = self.problem
        what = "plain torch"
        if self.family is not None:
            settings = ", ".join(f"{k}={v}" for k, v in sorted(self.parameters.items()))
            what = f"{self.family}({settings})"
        time = f", {self.time_us:.1f} us" if self.time_us is not None else ""
        tuned_for = f", tuned for {self.tuned_for}" if self.tier is Tier.NEAREST_SHAPE else ""
        tier = self.tier.replace("_", " ") + (", kernels changed since" if self.stale else "")
        table = "" if p.table is TableDtype.FLOAT32 else f" with {p.table} tables"
        busy = ", measured on a busy device" if self.evidence and self.evidence.entry.doubts else ""
        why = f"{tier}{tuned_for}, {self.source}{time}{busy}"
        return f"{p.operation} {p.shape}{table} on {p.device.name}: {what} [{why}]"


def select(problem: Problem, demand: Demand | None = None) -> Choice:
    """The kernel to run for ``problem``.

    In order: an entry of a tuning file for this device and shape; the nearest shape on this device;
    the nearest device of the same architecture; a family's analytic default, also where the nearest
    shape is far or its family not for this one; plain torch. A batch of zero gets the choice of a batch of
    one. Batches are asked about in ranges: see `batches_alike`.

    Args:
        problem: what is to be computed.
        demand: the seed's tile and block arguments. They are honoured or refused, except on CPUs,
            where they mean nothing.

    Raises:
        ValueError: the demand cannot be honoured; says which limit it breaks and what would fit.
    """
    (choice,) = _chosen(_select, problem, demand)
    return choice


def batches_alike(problem: Problem) -> tuple[range, int]:
    """The batches that get the choice of one of them, and that one.

    Sixteen ranges lie between a power of two and the next. A range is asked about for the batch that was
    tuned, or for its last one. Where several were tuned, each has its own part of the range. A choice that
    does not fit another batch of the range is made anew for that batch.
    """
    batch = problem.shape.batch
    width = 1 << max(0, (batch - 1).bit_length() - _RANGE_BITS - 1) if batch > 0 else 1
    last = -(-batch // width) * width
    first, of = last - width + 1, last
    layer, environment = problem.layer, os.environ.get(TUNING_VARIABLE)
    operations = _BACKWARD if layer.operation is Operation.BACKWARD else (layer.operation,)
    tuned = {b for o in operations for b in tuned_batches(layer.doing(o), environment) if first <= b <= last}
    if tuned:
        of = min(tuned, key=lambda b: (abs(b - batch), b))
        below, above = (
            max((b for b in tuned if b < of), default=None),
            min((b for b in tuned if b > of), default=None),
        )
        first = first if below is None else (below + of) // 2 + 1
        last = last if above is None else (of + above) // 2
    return range(first, last + 1), of


def select_backward(problem: Problem, demand: Demand | None = None) -> tuple[Choice, ...]:
    """The kernels for both gradients: one fused, or one for each.

    Args:
        problem: its operation is ignored.
        demand: as in `select`; kernels without tiles are left out when one is demanded.

    Returns:
        One choice with operation ``BACKWARD``, or two (``GRAD_INPUT``, ``GRAD_TABLE``).

    Raises:
        ValueError: as in `select`.
    """
    problem = _doing(problem, Operation.BACKWARD)
    return _chosen(_select_backward, problem, demand)


_Choose = Callable[[Problem, Demand, str | None], tuple[Choice, ...]]


def _chosen(choose: _Choose, problem: Problem, demand: Demand | None) -> tuple[Choice, ...]:
    choices = _choose_alike(choose, problem, demand or Demand(), os.environ.get(TUNING_VARIABLE))
    for choice in choices:
        _announce(choice)
    return choices


@lru_cache(maxsize=4096)
def _choose_alike(
    choose: _Choose, problem: Problem, demand: Demand, environment: str | None
) -> tuple[Choice, ...]:
    """As `_decide`, whose answers are kept."""
    choices = _decide(choose, problem, demand, environment)
    if logger.isEnabledFor(logging.DEBUG):  # whether it is stale takes long to find out
        for choice in choices:
            logger.debug("chosen: %s", choice.describe())
    return choices


def _decide(choose: _Choose, problem: Problem, demand: Demand, environment: str | None) -> tuple[Choice, ...]:
    """What ``choose`` answers for the batch that ``problem`` is asked about with, if that fits."""
    _, of = batches_alike(problem)
    if of != problem.shape.batch:
        alike = choose(problem.layer.of(replace(problem.shape, batch=of)), demand, environment)
        if (choices := _for_batch(alike, problem.shape)) is not None:
            return choices
    return choose(problem, demand, environment)


def _for_batch(choices: tuple[Choice, ...], shape: LayerShape) -> tuple[Choice, ...] | None:
    """The same choices for another batch; None where one does not fit it."""
    moved = []
    for choice in choices:
        problem = choice.problem.layer.of(shape)
        if choice.family is None or family(choice.family).violations(problem, choice.parameters):
            return None
        tier = Tier.NEAREST_SHAPE if choice.tier is Tier.EXACT else choice.tier
        moved.append(replace(choice, problem=problem, tier=tier, time_us=None))
    return tuple(moved)


def clear_caches() -> None:
    """Forget choices and file contents, so that tuning files are read again."""
    caches = (_choose_alike, _select, _select_backward, _fitting_completions, _nearest_completions)
    for cached in caches:
        cached.cache_clear()
    forget_files()
    _announced.clear()


def default_choice(problem: Problem) -> Choice | None:
    """The analytic default of the families, of the most preferred one where several fit."""
    return _default_choice(problem)


def _default_choice(problem: Problem, above: float = -math.inf) -> Choice | None:
    """The same of those families that are preferred by more than ``above``."""
    some = families(problem.device.kind, problem.operation, problem.table)
    preferred = [(preference, f) for f in some if (preference := f.preference(problem)) > above]
    # sorting is stable: of equally preferred ones the first is taken
    for _, f in sorted(preferred, key=lambda item: -item[0]):
        parameters = f.default(problem)
        if parameters is not None and not f.violations(problem, parameters):
            return _choice(problem, f.name, parameters, Tier.DEFAULT, "analytic default")
    return None


def tuned_choices(problem: Problem) -> Iterator[Choice]:
    """Choices from tuning files that fit ``problem``, best founded first."""
    for distance, found in evidence(problem):
        if not _violates(problem, found):
            yield _tuned_choice(problem, found, distance)


def _violates(problem: Problem, found: Evidence) -> bool:
    return bool(family(found.entry.family).violations(problem, found.parameters))


def _tuned_choice(problem: Problem, found: Evidence, distance: float) -> Choice:
    entry = found.entry
    tier = Tier.NEAREST_DEVICE
    if found.same_device:
        tier = Tier.NEAREST_SHAPE if distance else Tier.EXACT
    own_time = tier is Tier.EXACT and entry.measured_on is None
    stand_in = f", measured on {entry.measured_on}" if entry.measured_on else ""
    return Choice(
        problem,
        entry.family,
        found.parameters,
        tier,
        f"{found.source.path}{stand_in}",
        # with a fixed order of sums it takes longer
        time_us=entry.time_us.median if own_time and not problem.deterministic else None,
        tuned_for=entry.shape.layer,
        cost=found.cost,
        evidence=found,
    )


def tune_command(problem: Problem) -> str:
    """The shell command that would tune ``problem``."""
    operation = "backward" if problem.operation in _BACKWARD else problem.operation
    table = "" if problem.table is TableDtype.FLOAT32 else f" --table {problem.table}"
    what = f"--shape {problem.shape} --operation {operation}{table}"
    return f"lmkan-gen tune --device {problem.device.kind} {what}"


def _choice(
    problem: Problem,
    name: str | None,
    parameters: Parameters,
    tier: Tier,
    source: str,
    *,
    tuned_for: LayerShape | None = None,
    cost: float | None = None,
) -> Choice:
    frozen = MappingProxyType(dict(parameters))
    return Choice(problem, name, frozen, tier, source, tuned_for=tuned_for, cost=cost)


def _doing(problem: Problem, operation: Operation) -> Problem:
    """The same problem with another operation."""
    if problem.operation is operation:
        return problem
    return problem.layer.doing(operation).of(problem.shape)


@lru_cache(maxsize=4096)
def _select(problem: Problem, demand: Demand, environment: str | None) -> tuple[Choice, ...]:
    return (_pick(problem, demand),)


@lru_cache(maxsize=4096)
def _select_backward(problem: Problem, demand: Demand, environment: str | None) -> tuple[Choice, ...]:
    if demand.is_free:
        demand = Demand()  # without a tile or a block to go with, the fast mode is what is chosen anyway
    # Where nothing was measured the order decides. One kernel for both gradients is faster than two,
    # but among those with tiles, which a demand asks for, two are.
    ways = ((Operation.BACKWARD,), _SPLIT) if demand.is_free else (_SPLIT, (Operation.BACKWARD,))
    alternatives = [tuple(_doing(problem, o) for o in operations) for operations in ways]
    if problem.device.kind == "cuda" and not demand.is_free:
        tiled = [a for a in alternatives if any(_tiled_families(p, demand) for p in a)]
        alternatives = tiled or alternatives
    chosen: list[tuple[Choice, ...]] = []
    refusals = []
    for alternative in alternatives:
        try:
            picked = _pick_all(alternative, demand, chosen)
        except ValueError as error:
            refusals.append(error)
        else:
            chosen += [picked] if picked else []
    if not chosen:
        raise refusals[0]
    runnable = [c for c in chosen if all(choice.family is not None for choice in c)]
    # the reference for both gradients shares work between them
    fused = next((c for c in chosen if len(c) == 1), chosen[0])
    return min(runnable, key=_rank) if runnable else fused


def _pick_all(
    problems: Iterable[Problem], demand: Demand, rivals: Iterable[tuple[Choice, ...]]
) -> tuple[Choice, ...] | None:
    """The choices for all problems; None as soon as a part is founded worse than a runnable rival is."""
    runnable = [_rank(rival)[0] for rival in rivals if all(c.family is not None for c in rival)]
    limit = min(runnable, default=math.inf)
    picked = []
    for problem in problems:
        choice = _pick(problem, demand)
        if _foundation(choice) > limit:
            return None
        picked.append(choice)
    return tuple(picked)


def _pick(problem: Problem, demand: Demand) -> Choice:
    """The choice; where nothing reads narrow tables, one that reads float32."""
    if problem.shape.batch == 0:
        layer = problem.layer
        problem = layer.of(layer.shape)
    choice = _demanded_choice(problem, demand) or _free_choice(problem)
    if choice.family is None and problem.table is not TableDtype.FLOAT32:
        return _pick(replace(problem, table=TableDtype.FLOAT32), demand)
    return choice


def _rank(choices: tuple[Choice, ...]) -> tuple[float, float]:
    """Of a whole alternative: the worst foundation of a part, then the measured cost.

    A time measured for this shape, be it on another device, says more than one scaled from another shape, and
    a family that asks to be taken over such is between them. The cost is infinite when a part was never
    measured.
    """
    worst = max(_foundation(c) for c in choices)
    return worst, sum(math.inf if c.cost is None else c.cost for c in choices)


def _foundation(choice: Choice) -> float:
    """How well a choice is founded, best first: tiers, and what has none of its own."""
    if choice.tier is Tier.NEAREST_DEVICE and choice.tuned_for == choice.problem.shape:
        return 0.25
    if choice.tier is Tier.DEFAULT and _is_preferred(choice):
        return 0.5
    return _ORDER[choice.tier]


def _free_choice(problem: Problem) -> Choice:
    choice = _near_choice(problem)
    if choice is None:
        choice = default_choice(problem)
    elif choice.tuned_for != problem.shape:
        choice = _default_choice(problem, above=_OVER_TUNED) or choice
    choice = choice or next(tuned_choices(problem), None)
    if choice is not None:
        return choice
    some = families(problem.device.kind, problem.operation, problem.table)
    why = "no kernel fits this problem" if some else f"no {problem.table} kernels for {problem.device.kind}"
    return _choice(problem, None, {}, Tier.REFERENCE, why)


def _near_choice(problem: Problem) -> Choice | None:
    """The best founded of `tuned_choices` that says more about the problem than analysis does.

    What was tuned for shapes that are far says less; so do a family that is not for this shape, of too few
    samples, say, and parameters that would be wasted on it, such as tiles of twice its outputs.
    """
    unwanted: dict[str, bool] = {}
    for distance, found in evidence(problem, within=_FAR):
        name = found.entry.family
        if distance:
            if name not in unwanted:
                unwanted[name] = family(name).preference(problem) < 0
            if unwanted[name] or family(name).wasted(problem, found.parameters):
                continue
        if not _violates(problem, found):
            return _tuned_choice(problem, found, distance)
    return None


def _is_preferred(choice: Choice) -> bool:
    """Whether a default's family asks to be taken over what was tuned for other shapes."""
    return choice.family is not None and family(choice.family).preference(choice.problem) > _OVER_TUNED


# --- demands --------------------------------------------------------------------------------------


def _tiled_families(problem: Problem, demand: Demand) -> list[tuple[Family, Parameters]]:
    """Families that know tiles and blocks, with the parameters that ``demand`` fixes."""
    some = families(problem.device.kind, problem.operation, problem.table)
    fixed = ((f, f.demanded(problem, demand)) for f in some)
    return [(f, p) for f, p in fixed if p is not None]


def _demanded_choice(problem: Problem, demand: Demand) -> Choice | None:
    """The choice that honours ``demand``; None where there is nothing to honour.

    The fast mode is a wish: it is dropped where it does not fit.
    """
    if problem.device.kind != "cuda" or (demand.is_free and not demand.fast_mode):
        return None
    tiled: list[tuple[Family, Parameters]] = []
    for wish in dict.fromkeys((demand, replace(demand, fast_mode=False))):
        tiled = [(f, fixed) for f, fixed in _tiled_families(problem, wish) if fixed]
        options = [c for f, fixed in tiled if (c := _complete(problem, f, fixed))]
        if options:
            return min(options, key=lambda c: math.inf if c.cost is None else c.cost)
    if demand.is_free or (not tiled and _tiled_elsewhere(problem, demand)):
        return None
    if not tiled:
        raise ValueError(
            f"{_words(demand)} cannot be honoured: no kernel for {problem.operation} on "
            f"{problem.device.name} has tiles or blocks; leave the argument out"
        )
    raise ValueError(_refusal(problem, replace(demand, fast_mode=False), tiled))


def _tiled_elsewhere(problem: Problem, demand: Demand) -> bool:
    """Whether another kernel of the backward pass takes the demand, which is for the pass as a whole."""
    if problem.operation not in _BACKWARD:
        return False
    others = (replace(problem, operation=o) for o in _BACKWARD)
    return any(_tiled_families(p, demand) for p in others)


def _complete(problem: Problem, f: Family, fixed: Parameters) -> Choice | None:
    """``fixed`` with the family's other parameters as near as possible to tuned or default values."""
    wanted: Parameters | None = None
    for distance, found in evidence(problem):
        if found.entry.family != f.name or _violates(problem, found):
            continue
        if _agrees(found.parameters, fixed):
            choice = _tuned_choice(problem, found, distance)
            return _choice(
                problem, f.name, choice.parameters, Tier.DEMANDED, choice.source,
                tuned_for=choice.tuned_for, cost=choice.cost,
            )  # fmt: skip
        wanted = wanted or found.parameters
    wanted = wanted or f.default(problem) or {}
    near = _nearest_completions(problem.layer, f, tuple(fixed.items()), tuple(wanted.items()))
    best = next((p for p in near if not f.violations(problem, p)), None)
    if best is None:
        return None
    return _choice(problem, f.name, best, Tier.DEMANDED, "what was left open as near to the default as fits")


_Items = tuple[tuple[str, Constant], ...]


@lru_cache(maxsize=256)
def _nearest_completions(layer: Layer, f: Family, fixed: _Items, wanted: _Items) -> list[Parameters]:
    """What may fit for some batch, by the number of steps from ``wanted``."""
    space, target = f.space(layer.operation), dict(wanted)
    return sorted(_fitting_completions(layer, f, fixed), key=lambda p: _steps(space, p, target))


@lru_cache(maxsize=256)
def _fitting_completions(layer: Layer, f: Family, fixed: _Items) -> list[Parameters]:
    return [p for p in _completions(layer, f, dict(fixed)) if not f.layer_violations(layer, p)]


def _completions(problem: Problem, f: Family, fixed: Parameters) -> Iterator[dict[str, Constant]]:
    """All points of the space that agree with ``fixed``; none when it asks for other values."""
    space = f.space(problem.operation)
    if any(value not in space.get(name, ()) for name, value in fixed.items()):
        return
    for values in product(*([fixed[n]] if n in fixed else values for n, values in space.items())):
        yield dict(zip(space, values, strict=True))


def _agrees(parameters: Parameters, fixed: Parameters) -> bool:
    return all(parameters.get(name) == value for name, value in fixed.items())


def _steps(space: Mapping[str, tuple[Constant, ...]], a: Parameters, b: Parameters) -> int:
    """How many steps along each parameter's list of values lie between two points."""
    return sum(
        abs(values.index(a[name]) - values.index(b[name])) for name, values in space.items() if name in b
    )


def _words(demand: Demand) -> str:
    given = {"tile size": demand.tile_size, "block size": demand.block_size}
    return " and ".join(f"{name} {value}" for name, value in given.items() if value is not None)


def _refusal(problem: Problem, demand: Demand, tiled: Iterable[tuple[Family, Parameters]]) -> str:
    """Which limits a demand breaks, and what would fit instead."""
    shape = problem.shape
    reasons: dict[str, None] = {}
    for f, fixed in tiled:
        points = list(_completions(problem, f, fixed))
        # the point that is wrong in the fewest ways says best what the demand itself breaks
        least = min((f.violations(problem, p) for p in points), key=len, default=[])
        reasons.update(dict.fromkeys(v.message for v in least))
        if not points:
            wanted = ", ".join(f"{k}={v}" for k, v in fixed.items())
            space = f.space(problem.operation)
            allowed = "; ".join(f"{k} in {', '.join(map(str, space[k]))}" for k in fixed if k in space)
            reasons[f"{f.name} is not made for {wanted} ({allowed})"] = None
    fitting = []
    if grids := _largest_grids(problem, demand):
        fitting.append(f"num_grids up to {grids} with it")
    if demands := _fitting_demands(problem, demand):
        fitting.append(f"{demands} with num_grids={shape.grids}")
    fitting.append("the tuned choice, which you get by leaving the argument out")
    return (
        f"{_words(demand)} does not fit {problem.operation} with input_dim={shape.inputs}, "
        f"output_dim={shape.outputs}, num_grids={shape.grids} on {problem.device.name}: "
        f"{'; '.join(reasons)}. What fits: {'; '.join(fitting)}."
    )


def _fits(problem: Problem, demand: Demand) -> bool:
    return any(
        not f.violations(problem, parameters)
        for f, fixed in _tiled_families(problem, demand)
        for parameters in _completions(problem, f, fixed)
    )


def _largest_grids(problem: Problem, demand: Demand) -> int | None:
    """The largest num_grids below the asked one that ``demand`` fits."""
    s = problem.shape
    for grids in range(s.grids - 1, 2, -1):
        smaller = LayerShape(s.inputs, s.outputs, grids, s.batch)
        if _fits(replace(problem, shape=smaller), demand):
            return grids
    return None


def _fitting_demands(problem: Problem, demand: Demand) -> str:
    """The seed's tile sizes (or blocks, when only a block was asked for) that would fit."""
    if demand.tile_size is not None:
        name = "tile size"
        options = [(t, Demand(t, demand.block_size, demand.fast_mode)) for t in (4, 8, 16)]
    else:
        name = "block size"
        options = [(b, Demand(None, b, demand.fast_mode)) for b in (128, 256, 512, 1024)]
    fitting = [str(value) for value, option in options if _fits(problem, option)]
    return f"{name} {', '.join(fitting)}" if fitting else ""


# --- telling the user -----------------------------------------------------------------------------


_announced: set[tuple[object, ...]] = set()


def _announce(choice: Choice) -> None:
    """Tell once per layer and tier; a batch that varies is no news."""
    p = choice.problem
    news = (p.operation, p.shape.inputs, p.shape.outputs, p.shape.grids, p.device, p.table, choice.tier)
    if news in _announced:
        return
    _announced.add(news)
    if choice.tier is Tier.REFERENCE:
        warnings.warn(f"{choice.describe()}; it is correct but slow", stacklevel=5)
    elif not logger.isEnabledFor(logging.INFO):
        pass  # whether it is stale takes long to find out
    elif p.operation in CALL_OPERATIONS and (choice.tier not in (Tier.EXACT, Tier.DEMANDED) or choice.stale):
        logger.info("%s; to tune it: %s", choice.describe(), tune_command(p))
