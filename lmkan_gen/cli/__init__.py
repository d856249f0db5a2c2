"""The ``lmkan-gen`` command: one module per verb.

Modules here import nothing heavy at the top (`--help` must answer at once, without a GPU or a
compiler); each verb imports what it needs when it runs.
"""

from __future__ import annotations

import sys

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
app.command("tune", no_args_is_help=True)(tune_command)
app.command("report")(report_command)
app.command("build", no_args_is_help=True)(build_command)
app.command("inspect", no_args_is_help=True)(inspect_command)
app.command("limits", no_args_is_help=True)(limits_command)
app.command("plot", no_args_is_help=True)(plot_command)
app.add_typer(configs_app, name="configs")
app.add_typer(cache_app, name="cache")
app.command("doctor")(doctor_command)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    try:
        app()
    except (
        ValueError,
        RuntimeError,
        OSError,
        ImportError,
    ) as error:  # how this package reports what went wrong
        print(f"lmkan-gen: {error}", file=sys.stderr)
        sys.exit(1)
