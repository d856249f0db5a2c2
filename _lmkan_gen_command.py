"""Entry point of the ``lmkan-gen`` command.

It lies outside the package, whose import takes seconds (torch), so that Ctrl-C meanwhile gives no traceback.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; see `lmkan_gen.cli.main`."""
    try:
        from lmkan_gen.cli import main as run
    except KeyboardInterrupt:
        print("lmkan-gen: interrupted before it began", file=sys.stderr)
        sys.exit(130)
    run()
