"""The measuring process: a candidate that crashes, hangs or lies costs itself, not the run.

The parent sends problems and candidates through a pipe and waits with a time-out. A process that
does not answer is killed and another one started when there is more to measure.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import torch

from lmkan_gen.families import Family
from lmkan_gen.machine import available_memory
from lmkan_gen.plan import Constant
from lmkan_gen.problem import Problem
from lmkan_gen.toolchain import ToolchainError
from lmkan_gen.tuner.bench import Bench
from lmkan_gen.tuner.measure import Timing
from lmkan_gen.tuner.roofline import Peaks, measure_peaks
from lmkan_gen.tuner.verify import Mismatch

#: starting Python, torch and a device, and computing right answers, which is nobody's fault
_SETUP_S = 600.0
CANDIDATE_S = 60.0
#: why a candidate may fail
FAILURES = ("compile", "spills", "verify", "memory", "timeout", "crash", "error")


class Rejected(Exception):
    """A candidate failed: ``reason`` is one of `FAILURES`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WorkerFailed(RuntimeError):
    """The measuring process cannot even be set up for a problem."""


class NotGuarded(RuntimeError):
    """The measuring process cannot import the script that tunes; the message says what the script needs."""


#: exit code of a measuring process in which the script, imported again, came to tune
_CAME_TO_TUNE = 77
_GUARD = (
    "tuning starts a measuring process, which imports the script again; so what the script does has to stand "
    'under `if __name__ == "__main__":`'
)


def refuse_in_measuring_process() -> None:
    """End this process if it is a measuring one that only imports the script; the other one says why."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_CAME_TO_TUNE)


def _require_script() -> None:
    """A script on standard input is nothing that another process could import."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is not None and getattr(main, "__spec__", None) is None and not os.path.exists(path):
        raise NotGuarded(f"{path} is no file, so save the script: {_GUARD}")


@dataclass(frozen=True)
class _Setup:
    problem: Problem


@dataclass(frozen=True)
class _Measure:
    family: Family
    parameters: dict[str, Constant]
    check: bool
    best_us: float | None


@dataclass(frozen=True)
class _Reference:
    pass


@dataclass(frozen=True)
class _Peaks:
    pass


@dataclass(frozen=True)
class _Failure:
    reason: str
    message: str
    #: whether the device may be unusable for this process from now on
    fatal: bool


#: how torch's allocator on CPUs and the CUDA driver say it
_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)

_Request = _Setup | _Measure | _Reference | _Peaks
_Reply = Timing | float | Peaks | None | _Failure


class Worker:
    """A measuring process for one device; use it as a context manager.

    Entering it, and what asks the process, raises `NotGuarded` where the process cannot import the script.

    Args:
        device: where candidates run.
        candidate_s: seconds after which a candidate counts as hanging.
    """

    def __init__(self, device: torch.device, candidate_s: float = CANDIDATE_S) -> None:
        self._device = device
        self._candidate_s = candidate_s
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._problem: Problem | None = None

    def __enter__(self) -> Worker:
        _require_script()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def measure(
        self,
        problem: Problem,
        family: Family,
        parameters: dict[str, Constant],
        *,
        check: bool,
        best_us: float | None = None,
    ) -> Timing:
        """Check (if asked to) and time a candidate.

        Raises:
            Rejected: it failed, for the reason in the exception.
            WorkerFailed: the process cannot be set up for this problem.
        """
        self._set_up(problem)
        reply = self._ask(_Measure(family, parameters, check, best_us), self._candidate_s)
        if isinstance(reply, _Failure):
            raise Rejected(reply.reason, reply.message)
        assert isinstance(reply, Timing)
        return reply

    def time_reference(self, problem: Problem) -> float | None:
        """Microseconds of the torch reference, or None when it takes too long or fails."""
        self._set_up(problem)
        reply = self._ask(_Reference(), self._candidate_s)
        return reply if isinstance(reply, float) else None

    def measure_peaks(self) -> Peaks | None:
        """What the device reaches at its best; None when that cannot be measured."""
        if self._process is None:
            self._start()
        reply = self._ask(_Peaks(), _SETUP_S)
        return reply if isinstance(reply, Peaks) else None

    def stop(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = self._problem = None

    def _set_up(self, problem: Problem) -> None:
        if self._problem == problem:
            return
        if self._process is None:
            self._start()
        reply = self._ask(_Setup(problem), _SETUP_S)
        if isinstance(reply, _Failure):
            self.stop()
            raise WorkerFailed(f"cannot measure {problem.operation} {problem.shape}: {reply.message}")
        self._problem = problem

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self._device)), daemon=True)
        with _no_interrupts(), _safe_path():
            self._process.start()
        theirs.close()

    def _ask(self, request: _Request, seconds: float) -> _Reply:
        assert self._connection is not None
        assert self._process is not None
        try:
            self._connection.send(request)
            if not self._connection.poll(seconds):
                self.stop()
                return _Failure("timeout", f"no answer within {seconds:g} s", fatal=True)
            reply: _Reply = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            if code == _CAME_TO_TUNE:
                raise NotGuarded(_GUARD) from None
            return _Failure("crash", f"the measuring process died ({_exit(code)})", fatal=True)
        if isinstance(reply, _Failure) and reply.fatal:
            self.stop()
        return reply


def _exit(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL: the system may have run out of memory"
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let processes that start within not hear of Ctrl-C, on which they would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keep Python processes that start within from taking files of the current directory for modules."""
    name, before = "PYTHONSAFEPATH", os.environ.get("PYTHONSAFEPATH")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _serve(connection: Connection, device_name: str) -> None:
    """The process: answer requests until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _limit_memory()
    bench: Bench | None = None
    while True:
        try:
            request: _Request = connection.recv()
        except EOFError:
            return
        try:
            if isinstance(request, _Setup):
                bench = None  # free its memory first
                if device.type == "cpu":
                    torch.set_num_threads(request.problem.device.multiprocessors)
                bench = Bench(request.problem, device)
                connection.send(None)
            elif isinstance(request, _Peaks):
                connection.send(measure_peaks(device))
            else:
                assert bench is not None
                connection.send(_answer(bench, request))
        except Exception as error:
            connection.send(_failure(error, device))


def _limit_memory() -> None:
    """Let allocations fail when memory is used up, instead of having the system end some process.

    On a GPU the driver reserves far more addresses than it uses, so that no limit would be right.
    """
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * available_memory()), hard))


def _answer(bench: Bench, request: _Measure | _Reference) -> Timing | float | None:
    if isinstance(request, _Reference):
        return bench.time_reference()
    if request.check:
        bench.check(request.family, request.parameters)
    return bench.time(request.family, request.parameters, request.best_us)


def _failure(error: Exception, device: torch.device) -> _Failure:
    if isinstance(error, Mismatch):
        return _Failure("verify", str(error), fatal=False)
    if isinstance(error, ToolchainError):
        return _Failure("compile", str(error), fatal=False)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)):
        return _Failure("memory", str(error) or type(error).__name__, fatal=True)
    # on a GPU, an error of a kernel makes all that follows in its process fail
    return _Failure("error", f"{type(error).__name__}: {error}", fatal=device.type == "cuda")
