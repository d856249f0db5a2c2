"""What a tuning run tells while it goes on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from lmkan_gen.problem import Problem
from lmkan_gen.tuner.space import Candidate
from lmkan_gen.tuner.worker import Rejected
from lmkan_gen.tuning_file import Entry

logger = logging.getLogger("lmkan_gen")

Phase = Literal["compiling", "measuring", "waiting", "ranking"]


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``done`` of ``total`` candidates of problem ``index`` (from 0) of ``count``."""

    problem: Problem
    index: int
    count: int
    phase: Phase
    done: int
    total: int
    best_us: float | None


class Observer:
    """Hears what a tuning run does; this one logs what must not pass unnoticed, and ignores the rest."""

    def progress(self, progress: Progress) -> None:
        """Something moved."""

    def rejected(self, problem: Problem, candidate: Candidate, rejected: Rejected) -> None:
        """A candidate failed; the run goes on."""

    def skipped(self, problem: Problem, why: str) -> None:
        """Nothing could be tuned for ``problem``."""

    def cut_short(self, problem: Problem, tried: int, total: int) -> None:
        """The time budget ended the search for ``problem``, after ``tried`` of ``total`` candidates."""
        self.noted(
            f"{problem.operation} {problem.shape}: the time budget ended the search after {tried} of {total} "
            "candidates; a larger one, with resume, goes on"
        )

    def noted(self, text: str) -> None:
        """Something about the results that a user has to know."""
        logger.warning("%s", text)

    def finished(self, problem: Problem, entry: Entry) -> None:
        """``problem`` is done and its entry saved."""
