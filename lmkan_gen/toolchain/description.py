"""What ``entry.json`` says of a compiled kernel, checked whenever it is read: it may come from elsewhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FILE = "entry.json"
#: the names that binaries have, and those of their sources: nothing else is ever loaded
SOURCES = {"kernel.cubin": "kernel.cu", "kernel.so": "kernel.cpp", "launcher.so": "launcher.cpp"}
#: far more than is ever written
MAX_BYTES = 1 << 18
_MAX_BINARY_BYTES = 1 << 30

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Words = Annotated[str, Field(max_length=1 << 14)]
_Name = Annotated[str, Field(max_length=200)]


class Description(BaseModel):
    """One compiled kernel: how it was made, and the hash of its binary."""

    model_config = ConfigDict(strict=True, frozen=True)

    key: _Hash
    abi: Annotated[int, Field(ge=0, lt=1 << 31)]
    sha256: _Hash
    bytes: Annotated[int, Field(ge=0, le=_MAX_BINARY_BYTES)]
    output: Literal["kernel.cubin", "kernel.so", "launcher.so"]
    source: Literal["kernel.cu", "kernel.cpp", "launcher.cpp"]
    template: _Name
    arch: _Name
    constants: dict[_Name, Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | _Name]
    compiler: _Words
    flags: list[_Words]
    created: _Name

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if SOURCES[self.output] != self.source:
            raise ValueError(f"{self.output} is not made of {self.source}")
        return self

    @property
    def is_cuda(self) -> bool:
        return self.output.endswith(".cubin")


def read(directory: Path) -> Description:
    """The description in a kernel's directory.

    Raises:
        OSError: there is none that can be read.
        ValueError: it is no description.
    """
    try:
        return Description.model_validate_json(read_regular(directory / FILE, MAX_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{FILE} is no description: {where + ': ' if where else ''}{first['msg']}") from None


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; links are not followed.

    Raises:
        OSError: there is none that can be read.
        ValueError: it is something else, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is no regular file")
        if status.st_size > limit:
            raise ValueError(f"{path.name} has {status.st_size} bytes, more than {limit}")
        return stream.read(limit)
