"""Give back what compiled kernels hold of a long-lived process."""

from __future__ import annotations

import sys


def clear() -> None:
    """Unload compiled kernels, and forget what was chosen, prepared and read from tuning files.

    Layers go on to work: what they need is found in the store and loaded again. No layer may be running
    meanwhile in another thread, and CUDA graphs that were captured of layers must be captured again. The
    native launcher stays.

    Raises:
        RuntimeError: the CUDA driver refuses.
    """
    from lmkan_gen import dispatch, selection, toolchain

    dispatch.clear_caches()
    selection.clear_caches()
    toolchain.forget()
    for name in ("cpu", "cuda"):  # those that were needed
        if (launcher := sys.modules.get(f"lmkan_gen.launch.{name}")) is not None:
            launcher.unload()
