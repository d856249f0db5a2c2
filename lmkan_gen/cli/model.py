"""What `tune --model MODULE:FACTORY` names: imported and run, its errors told in the user's terms."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lmkan_gen.problem import LayerShape

_OPTION = "--model"


def shapes_of_model(path: str, batches: str | None) -> list[LayerShape]:
    """Shapes of the layer calls of the model that the function at ``path`` makes.

    Args:
        path: ``MODULE:FACTORY``; the module is looked for in the current directory first.
        batches: samples that layers see, with commas; None: the factory returns a sample input as well.

    Raises:
        typer.BadParameter: what was named does not give a model with lmKAN layers; says where and why.
    """
    from lmkan_gen.model_tuning import layer_calls, layer_shapes

    counts = None if batches is None else _counts(batches)
    with _current_directory_at(0):
        factory = _factory(path)
        with _telling(f"{path} raised", _file(factory)):
            made = factory()
    model, *sample = made if isinstance(made, tuple) else (made,)
    if not hasattr(model, "modules") or len(sample) > 1:
        raise typer.BadParameter(
            f"{path} returned {made!r:.80}; it must return a model, or a model and its sample input",
            param_hint=_OPTION,
        )
    if sample and counts is not None:
        raise typer.BadParameter(f"{path} returns a sample input; leave it out", param_hint="--batch")
    if sample:
        # layers import compilers' modules when they first run
        with (
            _current_directory_at(len(sys.path)),
            _telling(f"the model of {path}, run on its sample input, raised", _file(factory)),
        ):
            shapes = layer_calls(model, sample[0])
        if not shapes:
            raise typer.BadParameter(
                f"the model of {path} calls no lmKAN layer in float32 or half precision for its sample input",
                param_hint=_OPTION,
            )
        return shapes
    if counts is None:
        raise typer.BadParameter(
            f"give the samples that layers see; or let {path} return (model, sample input)",
            param_hint="--batch",
        )
    try:
        return layer_shapes(model, counts)
    except ValueError as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint=_OPTION) from None


def _counts(batches: str) -> list[int]:
    fields = [f.strip() for f in batches.split(",")]
    if not all(f.isdecimal() and int(f) for f in fields):
        raise typer.BadParameter(
            f"{batches!r} is not a list of positive numbers such as 64,1024", param_hint="--batch"
        )
    return [int(f) for f in fields]


@contextmanager
def _current_directory_at(position: int) -> Iterator[None]:
    """Let modules there be imported, as in a script; a console script does not see them."""
    directory = os.getcwd()
    sys.path.insert(position, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


def _factory(path: str) -> Callable[[], Any]:
    name, _, attribute = path.partition(":")
    if not attribute or not all(part.isidentifier() for part in name.split(".")):
        raise typer.BadParameter(
            f"{path!r} is not MODULE:FACTORY, such as my_package.networks:make_model", param_hint=_OPTION
        )
    try:
        with _telling(f"{path}: importing {name} raised", None):
            found: Any = import_module(name)
    except ModuleNotFoundError:
        raise typer.BadParameter(
            f"{path}: there is no module {name} in the current directory or among those installed",
            param_hint=_OPTION,
        ) from None
    module = found
    for part in attribute.split("."):
        if not hasattr(found, part):
            where = getattr(module, "__file__", None) or "its package"
            raise typer.BadParameter(
                f"{path}: module {name} ({where}) has no {attribute}", param_hint=_OPTION
            )
        found = getattr(found, part)
    if not callable(found):
        raise typer.BadParameter(
            f"{path} is no function but {found!r:.80}; name a function that returns the model",
            param_hint=_OPTION,
        )
    if required := _required(found):
        raise typer.BadParameter(
            f"{path} takes arguments ({', '.join(required)}), but is called with none; name a function that "
            f"needs none, such as one that calls {attribute} with the values you mean",
            param_hint=_OPTION,
        )
    factory: Callable[[], Any] = found
    return factory


def _required(factory: Callable[..., Any]) -> list[str]:
    """Parameters of a function without which it cannot be called."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in functions do not tell
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _file(factory: Callable[..., Any]) -> str | None:
    try:
        return inspect.getsourcefile(factory)
    except TypeError:
        return None


@contextmanager
def _telling(what: str, file: str | None) -> Iterator[None]:
    """Turn whatever the user's code raises into one line: type, message, file and line.

    Args:
        what: was done.
        file: whose lines are of most interest; None: those of the innermost call.

    Raises:
        typer.BadParameter: the code within raised something.
        ModuleNotFoundError: passed on where the module that was asked for is what does not exist.
    """
    try:
        yield
    except typer.BadParameter:
        raise
    except (Exception, SystemExit) as error:  # a model may raise anything, and some modules exit
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
        frames = [f for f in frames if f.filename != __file__]
        if isinstance(error, ModuleNotFoundError) and file is None and not _own(frames):
            raise
        raise typer.BadParameter(
            f"{what} {_words(error)}{_place(error, frames, file)}", param_hint=_OPTION
        ) from error


def _own(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Without those of Python's import machinery."""
    return [f for f in frames if Path(f.filename).parent.name != "importlib"]


def _words(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _place(error: BaseException, frames: list[traceback.FrameSummary], file: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = _own(frames)
    at = [f for f in frames if f.filename == file] or frames
    return f" ({at[-1].filename}, line {at[-1].lineno}, in {at[-1].name})" if at else ""
