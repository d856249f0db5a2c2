"""Compile one CUDA file with NVRTC: ``python nvrtc_main.py [FLAG ...] -o OUTPUT SOURCE``.

A script of its own that imports nothing of this package, so that it starts fast. The compiler's
output goes to standard output; the exit code is 1 when it refuses the source.
"""

import sys
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc


def _call(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise SystemExit(f"fatal error: NVRTC says {status.name}")
    return values[0] if values else None


def main(arguments: list[str]) -> int:
    """Compile; returns the exit code."""
    *flags, _, output, source = arguments
    text = Path(source).read_bytes()
    program = _call(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
    options = [flag.encode() for flag in flags]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(_call(nvrtc.nvrtcGetProgramLogSize(program)))
    _call(nvrtc.nvrtcGetProgramLog(program, log))
    print(log.rstrip(b"\0").decode(errors="replace"))
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        print(f"fatal error: NVRTC says {status.name}")
        return 1
    cubin = bytearray(_call(nvrtc.nvrtcGetCUBINSize(program)))
    _call(nvrtc.nvrtcGetCUBIN(program, cubin))
    Path(output).write_bytes(cubin)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
