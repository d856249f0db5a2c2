"""The command line as ``python -m lmkan_gen``."""

from lmkan_gen.cli import main

main()
