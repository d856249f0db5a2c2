"""The search of one problem's space, an Optuna study in a journal file that survives a kill."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from lmkan_gen.plan import Constant
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.space import Candidate, Space
from lmkan_gen.tuner.worker import Rejected

#: fruitless suggestions (seen before, or infeasible) before an unseen candidate is drawn instead
_PATIENCE = 20
_SAMPLES, _REASON, _MESSAGE = "samples_us", "rejected", "message"


class Study:
    """Suggests candidates and remembers how they did.

    Every feasible candidate is suggested once when there are no more than ``trials``. Otherwise the
    space's seeds come first, then what differs from the best so far by one step of one parameter (most of
    a kernel's speed is found that way), and when that is exhausted Optuna's TPE sampler suggests the rest.

    Args:
        space: what may be suggested.
        trials: how many candidates the search will try.
        directory: where journals lie.
        resume: continue what an earlier, killed run of the same search left there.
    """

    def __init__(self, space: Space, trials: int, directory: Path, resume: bool) -> None:
        self._space = space
        self._feasible = frozenset(space.feasible)
        self._choices = _choices(space.feasible)
        self._pending: dict[Candidate, Trial] = {}
        #: how each candidate did
        self.results: dict[Candidate, Timing | Rejected] = {}
        problem = space.problem
        name = f"{problem.operation}-{problem.shape}-{space.fingerprint()[:16]}".replace(",", "x")
        directory.mkdir(parents=True, exist_ok=True)
        journal = directory / f"{name}.journal"
        if not resume:
            journal.unlink(missing_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=name,
            sampler=optuna.samplers.TPESampler(seed=0),
            load_if_exists=True,
        )
        self._restore()
        self._queue = deque(space.seeds)
        shuffled = list(space.feasible)
        self._random = random.Random(0)
        self._random.shuffle(shuffled)  # a search cut short has then seen a fair sample
        self._spare = iter(shuffled)
        if len(space.feasible) <= trials:
            self._queue.extend(shuffled)

    def ask(self) -> Candidate | None:
        """A candidate not suggested before; None when there are no more."""
        while self._queue:
            if self._is_new(candidate := self._queue.popleft()):
                return self._begin(candidate)
        if (neighbour := self._next_to_best()) is not None:
            return self._begin(neighbour)
        if len(self.results) + len(self._pending) < len(self._feasible):
            for _ in range(_PATIENCE):
                trial = self._study.ask()
                candidate = self._suggested(trial)
                if candidate in self._feasible and self._is_new(candidate):
                    self._pending[candidate] = trial
                    return candidate
                self._dismiss(trial, candidate)
            for candidate in self._spare:
                if self._is_new(candidate):
                    return self._begin(candidate)
        return None

    def tell(self, candidate: Candidate, result: Timing | Rejected) -> None:
        """Record how a suggested candidate did."""
        trial = self._pending.pop(candidate)
        self.results[candidate] = result
        if isinstance(result, Rejected):
            trial.set_user_attr(_REASON, result.reason)
            trial.set_user_attr(_MESSAGE, str(result))
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_user_attr(_SAMPLES, list(result.samples))
            self._study.tell(trial, result.median)

    def timings(self) -> Iterator[tuple[Candidate, Timing]]:
        """The candidates that ran, with their times."""
        return ((c, r) for c, r in self.results.items() if isinstance(r, Timing))

    def best(self) -> tuple[Candidate, Timing] | None:
        """The fastest candidate so far, with its time; None before one ran."""
        return min(self.timings(), key=lambda item: item[1].median, default=None)

    def _next_to_best(self) -> Candidate | None:
        """A new candidate one step of one parameter away from the fastest."""
        if (best := self.best()) is None:
            return None
        family, parameters = best[0].family, best[0].parameters
        steps = []
        for name, values in self._choices[family].items():
            at = values.index(parameters[name])
            for value in values[max(0, at - 1) : at] + values[at + 1 : at + 2]:
                neighbour = Candidate.make(family, {**parameters, name: value})
                if neighbour in self._feasible and self._is_new(neighbour):
                    steps.append(neighbour)
        return self._random.choice(steps) if steps else None

    def _is_new(self, candidate: Candidate) -> bool:
        return candidate not in self.results and candidate not in self._pending

    def _begin(self, candidate: Candidate) -> Candidate:
        """Open a trial for a candidate of our own choice."""
        chosen = {f"{candidate.family}.{name}": value for name, value in candidate.settings}
        self._study.enqueue_trial({"family": candidate.family, **chosen})
        trial = self._study.ask()
        candidate = self._suggested(trial)
        self._pending[candidate] = trial
        return candidate

    def _suggested(self, trial: Trial) -> Candidate:
        family = trial.suggest_categorical("family", sorted(self._choices))
        parameters: dict[str, Constant] = {}
        for name, values in self._choices[family].items():
            chosen = trial.suggest_categorical(f"{family}.{name}", values)
            assert isinstance(chosen, int | str)
            parameters[name] = chosen
        return Candidate.make(family, parameters)

    def _dismiss(self, trial: Trial, candidate: Candidate) -> None:
        """Close a trial that is not worth running, such that the sampler learns from it."""
        known = self.results.get(candidate)
        if isinstance(known, Timing):
            self._study.tell(trial, known.median)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _restore(self) -> None:
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state is TrialState.RUNNING:  # in flight when it was killed
                if _SAMPLES in trial.user_attrs:
                    self._study.tell(trial.number, Timing(tuple(trial.user_attrs[_SAMPLES])).median)
                elif _MESSAGE in trial.user_attrs:
                    self._study.tell(trial.number, state=TrialState.PRUNED)
                else:
                    self._study.tell(trial.number, state=TrialState.FAIL)
                    continue
            if trial.state is TrialState.WAITING:  # killed before that; only a begun trial can be closed
                self._study.tell(self._study.ask(), state=TrialState.FAIL)
                continue
            family = trial.params.get("family")
            prefix = f"{family}."
            settings = {n.removeprefix(prefix): v for n, v in trial.params.items() if n.startswith(prefix)}
            candidate = Candidate.make(str(family), settings)
            if _SAMPLES in trial.user_attrs:
                self.results[candidate] = Timing(tuple(trial.user_attrs[_SAMPLES]))
            elif _MESSAGE in trial.user_attrs:
                self.results[candidate] = Rejected(trial.user_attrs[_REASON], trial.user_attrs[_MESSAGE])


def _choices(candidates: Iterable[Candidate]) -> dict[str, dict[str, list[Constant]]]:
    """Per family, the values that each parameter takes among ``candidates``, in order."""
    values: dict[str, dict[str, set[Constant]]] = {}
    for candidate in candidates:
        of_family = values.setdefault(candidate.family, {})
        for name, value in candidate.settings:
            of_family.setdefault(name, set()).add(value)
    return {
        family: {name: sorted(allowed, key=_order) for name, allowed in of_family.items()}
        for family, of_family in values.items()
    }


def _order(value: Constant) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, value)
