"""The search of one problem's space, an Optuna study that survives a kill and may be shared."""

from __future__ import annotations

import json
import os
import platform
import random
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain

import optuna
import psutil
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from lmkan_gen.tuner import model
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.space import Candidate, Space
from lmkan_gen.tuner.worker import Rejected

#: draws of what was seen before until all candidates are looked through
_PATIENCE = 20
#: candidates that the model chooses from: drawn ones, and all steps around so many of the best
_POOL, _CENTRES = 512, 5
#: candidates after which some are drawn, and how often: the model may be wrong about a family or a corner
_CERTAIN, _DRAWN_EVERY = 16, 8
_SAMPLES, _REASON, _MESSAGE, _OWNER = "samples_us", "rejected", "message", "owner"
#: seconds since 1970: databases keep Optuna's own times in the time zone of who wrote them
_BEGAN = "began"
#: how long another machine may take for a batch of candidates before it counts as gone
_LEASE_S = 3600.0


class Study:
    """Suggests candidates and remembers how they did.

    Every candidate is suggested once when there are no more than ``trials``. Otherwise the space's seeds come
    first, then what a `model` of the times says may be the fastest: of some at random, and of the steps
    around the best so far. After a while some are drawn whatever the model says.

    Processes whose studies have the same name and storage share the work: none is suggested what another
    has measured or is at. What a process that died was at is suggested again.

    Args:
        space: what may be suggested.
        trials: how many candidates the search will try.
        storage: where results are kept; those that are there already count.
        shared: whether others may be at work.
        seed: of what is drawn at random; processes that share a search have their own.
    """

    def __init__(
        self, space: Space, trials: int, storage: BaseStorage, *, shared: bool = False, seed: int = 0
    ) -> None:
        self._space = space
        self._pending: dict[Candidate, Trial] = {}
        #: candidates that other processes are at
        self._elsewhere: set[Candidate] = set()
        #: how each candidate did, here and elsewhere
        self.results: dict[Candidate, Timing | Rejected] = {}
        self._shared = shared
        self._owner = _this_process()
        if shared:  # processes that draw alike would suggest alike
            seed = zlib.crc32(self._owner.encode())
        name = study_name(space)
        with _no_news_from_optuna():
            self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self._storage = storage
        self._id = storage.get_study_id_from_name(name)
        self._closed: set[int] = set()
        self.refresh()
        self._queue = deque(c for c in space.seeds if space.allows(c))
        self._random = random.Random(seed)
        self._drawn: list[Candidate] = []
        if space.size(trials + 1) <= trials:
            everything = list(space.candidates())
            self._random.shuffle(everything)  # a search cut short has then seen a fair sample
            self._queue.extend(everything)

    @property
    def taken(self) -> int:
        """How many candidates are being tried, here or elsewhere."""
        return len(self._pending) + len(self._elsewhere)

    @property
    def elsewhere(self) -> int:
        """How many candidates other processes are at."""
        return len(self._elsewhere)

    def ask(self) -> Candidate | None:
        """A candidate not suggested before; None when there are no more."""
        while True:
            if self._shared:
                self.refresh()
            candidate, trial = self._propose()
            if candidate is None or trial is None:
                return None
            if self._shared and self._was_faster(candidate, trial):
                self._finish(trial, None)
                continue
            self._pending[candidate] = trial
            return candidate

    def tell(self, candidate: Candidate, result: Timing | Rejected) -> None:
        """Record how a suggested candidate did."""
        trial = self._pending.pop(candidate)
        self.results[candidate] = result
        self._closed.add(trial.number)
        with suppress(RuntimeError):  # closed by another process, as in `_finish`
            if isinstance(result, Rejected):
                trial.set_user_attr(_REASON, result.reason)
                trial.set_user_attr(_MESSAGE, str(result))
            else:
                trial.set_user_attr(_SAMPLES, list(result.samples))
        self._finish(trial, result)

    def release(self) -> None:
        """Give back what was suggested and will not be measured."""
        for trial in self._pending.values():
            self._finish(trial, None)
        self._pending.clear()

    def refresh(self) -> None:
        """Read what other processes, now or before, have measured and are at."""
        mine = {trial.number for trial in self._pending.values()}
        self._elsewhere.clear()
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number in mine or trial.number in self._closed:
                continue
            result, candidate = _result(trial), _candidate(trial)
            if result is not None and self._space.limit(candidate) in (None, "wasted"):
                self.results.setdefault(candidate, result)
            if trial.state is TrialState.RUNNING:
                if _is_alive(trial, self._owner):  # it will close the trial, if it is not just doing so
                    if result is None and self._space.allows(candidate):
                        self._elsewhere.add(candidate)
                    continue
                # its process died, perhaps after it had written the result
                self._finish(trial.number, result)
            self._closed.add(trial.number)

    def _finish(self, trial: Trial | int, result: Timing | Rejected | None) -> None:
        """Close a trial; None: without a result."""
        try:
            if isinstance(result, Timing):
                self._study.tell(trial, result.median)
            else:
                self._study.tell(trial, state=TrialState.FAIL if result is None else TrialState.PRUNED)
        except (RuntimeError, ValueError):
            # another process did it, having taken the owner for dead; what matters is the result
            pass

    def timings(self) -> Iterator[tuple[Candidate, Timing]]:
        """The candidates that ran, with their times."""
        return ((c, r) for c, r in self.results.items() if isinstance(r, Timing))

    def best(self) -> tuple[Candidate, Timing] | None:
        """The fastest candidate so far, with its time; None before one ran."""
        return min(self.timings(), key=lambda item: item[1].median, default=None)

    def _propose(self) -> tuple[Candidate | None, Trial | None]:
        while self._queue:
            if self._is_new(candidate := self._queue.popleft()):
                return candidate, self._begin(candidate)
        hoped_for = self._hoped_for() if self._is_to_learn() else None
        drawn = (self._space.draw(self._random) for _ in range(_PATIENCE))
        for other in chain((hoped_for,), drawn, self._space.candidates()):
            if other is not None and self._is_new(other):
                return other, self._begin(other)
        return None, None

    def _is_to_learn(self) -> bool:
        """Whether the model is asked about the next candidate."""
        number = len(self.results) + self.taken
        return self.best() is not None and (number < _CERTAIN or number % _DRAWN_EVERY != 0)

    def _hoped_for(self) -> Candidate | None:
        """The most promising candidate of a few hundred."""
        if not self._drawn:
            draws = (self._space.draw(self._random) for _ in range(_POOL))
            self._drawn = [c for c in dict.fromkeys(draws) if c is not None]
        ranked = sorted(self.timings(), key=lambda item: item[1].median)
        around = (c for best, _ in ranked[:_CENTRES] for c in self._space.steps(best))
        pool = [c for c in dict.fromkeys((*self._drawn, *around)) if self._is_new(c)]
        if not pool:
            return None
        return model.most_promising(pool, self.results, [*self._pending, *self._elsewhere])

    def _was_faster(self, candidate: Candidate, own: Trial) -> bool:
        """Whether another process took up the candidate in the same moment, and before."""
        return any(
            trial.number < own.number
            and trial.number not in self._closed
            and _candidate(trial) == candidate
            and (_result(trial) is not None or _is_alive(trial, self._owner))
            for trial in self._study.get_trials(deepcopy=False)
        )

    def _is_new(self, candidate: Candidate) -> bool:
        return not (candidate in self.results or candidate in self._pending or candidate in self._elsewhere)

    def _begin(self, candidate: Candidate) -> Trial:
        """Open a trial for a candidate of our own choice."""
        chosen = {f"{candidate.family}.{name}": value for name, value in candidate.settings}
        distributions: dict[str, BaseDistribution] = {
            f"{candidate.family}.{name}": CategoricalDistribution(values)
            for name, values in self._space.values[candidate.family].items()
        }
        template = create_trial(
            state=TrialState.RUNNING,
            params={"family": candidate.family, **chosen},
            distributions={"family": CategoricalDistribution(sorted(self._space.values)), **distributions},
            user_attrs={_OWNER: self._owner, _BEGAN: time.time()},
        )
        # unlike an enqueued one, it is nobody else's to take
        return Trial(self._study, self._storage.create_new_trial(self._id, template))


def study_name(space: Space) -> str:
    """Of the study that searches ``space``: the same wherever it is the same search."""
    problem = space.problem
    return f"{problem.operation}-{problem.shape}-{space.fingerprint()[:16]}".replace(",", "x")


@contextmanager
def _no_news_from_optuna() -> Iterator[None]:
    """Optuna tells of every study that it makes; how much it tells otherwise is the caller's choice."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _this_process() -> str:
    pid = os.getpid()
    return json.dumps([platform.node(), pid, psutil.Process(pid).create_time()])


def _is_alive(trial: FrozenTrial, own: str) -> bool:
    """Whether the process that began a trial may still end it."""
    owner = trial.user_attrs.get(_OWNER)
    if owner is None or trial.state is not TrialState.RUNNING:
        return False  # not begun in earnest
    if owner == own:
        return False  # of an earlier search of this process: its own trials are known to be open
    host, pid, started = json.loads(owner)
    if host != platform.node():
        return bool(time.time() - trial.user_attrs.get(_BEGAN, 0.0) < _LEASE_S)
    try:
        return abs(psutil.Process(pid).create_time() - float(started)) < 2  # clocks get adjusted
    except psutil.Error:
        return False


def _candidate(trial: FrozenTrial) -> Candidate:
    family = str(trial.params.get("family"))
    prefix = f"{family}."
    settings = {n.removeprefix(prefix): v for n, v in trial.params.items() if n.startswith(prefix)}
    return Candidate.make(family, settings)


def _result(trial: FrozenTrial) -> Timing | Rejected | None:
    attributes = trial.user_attrs
    if _SAMPLES in attributes:
        return Timing(tuple(attributes[_SAMPLES]))
    if _MESSAGE in attributes:
        return Rejected(attributes[_REASON], attributes[_MESSAGE])
    return None
