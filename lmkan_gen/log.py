"""``LMKAN_GEN_LOG=1``: each decision on standard error as it happens.

Decisions are messages of the logger ``lmkan_gen``, at level DEBUG; programs may listen to it by themselves.
"""

from __future__ import annotations

import logging
import os

VARIABLE = "LMKAN_GEN_LOG"

logger = logging.getLogger("lmkan_gen")


def follow_environment() -> None:
    """Print decisions if the environment asks for it."""
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("lmkan-gen %(asctime)s: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # a program that prints what reaches the root would repeat it
