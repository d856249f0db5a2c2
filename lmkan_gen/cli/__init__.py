"""The ``lmkan-gen`` command: one module per verb.

Modules here import nothing heavy at the top (`--help` must answer at once, without a GPU or a
compiler); each verb imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated, Any, NoReturn, cast

import typer

from lmkan_gen.cli.build import build_command
from lmkan_gen.cli.cache import cache_app
from lmkan_gen.cli.configs import configs_app
from lmkan_gen.cli.doctor import doctor_command
from lmkan_gen.cli.inspect import inspect_command
from lmkan_gen.cli.limits import limits_command
from lmkan_gen.cli.plot import plot_command
from lmkan_gen.cli.report import report_command
from lmkan_gen.cli.tune import tune_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="lmkan-gen",
    help="Generate, tune and inspect kernels of lookup multivariate Kolmogorov-Arnold networks.\n\n"
    "\b\nExamples:\n"
    "  lmkan-gen doctor\n"
    "  lmkan-gen tune --shape 128,128,26,1024\n"
    "  lmkan-gen inspect --target sm_90 --shape 128,128,26,1024",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from lmkan_gen import __version__

        typer.echo(f"lmkan-gen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("tune", no_args_is_help=True)(tune_command)
app.command("report")(report_command)
app.command("build", no_args_is_help=True)(build_command)
app.command("inspect", no_args_is_help=True)(inspect_command)
app.command("limits", no_args_is_help=True)(limits_command)
app.command("plot", no_args_is_help=True)(plot_command)
app.add_typer(configs_app, name="configs")
app.add_typer(cache_app, name="cache")
app.command("doctor")(doctor_command)


#: exit code after Ctrl-C, as shells have it
INTERRUPTED = 130
#: base of what typer raises for wrong usage: click's class, or that of typer's own copy of click
_UsageError = cast(type[Any], typer.BadParameter.__mro__[2])


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        error.show()  # plain text: a frame would break paths that are longer than a line
        sys.exit(error.exit_code)
    except typer.Abort:  # how some releases of typer report Ctrl-C
        code = INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever reads the output has seen enough
            sys.exit(1)
        _fail(_of_file(error))
    except (ValueError, RuntimeError, ImportError) as error:  # how this package reports what went wrong
        _fail(str(error) or type(error).__name__)
    if code == INTERRUPTED:
        print("lmkan-gen: interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    from lmkan_gen.text import printable

    print("lmkan-gen:", "\n".join(map(printable, message.splitlines())), file=sys.stderr)
    sys.exit(1)


def _of_file(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error) or type(error).__name__
    return f"{error.filename}: {error.strerror}"
