"""Kernel families, discovered: every module here with a ``FAMILY`` is one."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from pkgutil import iter_modules

from lmkan_gen.families.base import Demand, Family, Parameters, Violation
from lmkan_gen.problem import Operation, TableDtype

__all__ = ["Demand", "Family", "Parameters", "Violation", "families", "family"]


@cache
def _registry() -> dict[str, Family]:
    modules = (import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__))
    found = [m.FAMILY for m in modules if hasattr(m, "FAMILY")]
    return {f.name: f for f in found}


def families(
    device_kind: str, operation: Operation, table: TableDtype = TableDtype.FLOAT32
) -> tuple[Family, ...]:
    """Families that compute ``operation`` on a ``"cpu"`` or ``"cuda"`` device with tables of a dtype."""
    return _computing(tuple(_registry().values()), device_kind, operation, table)


@lru_cache(maxsize=256)
def _computing(
    some: tuple[Family, ...], device_kind: str, operation: Operation, table: TableDtype
) -> tuple[Family, ...]:
    return tuple(f for f in some if f.device_kind == device_kind and f.computes(operation, table))


def family(name: str) -> Family:
    """The family called ``name``.

    Raises:
        ValueError: there is none.
    """
    try:
        return _registry()[name]
    except KeyError:
        raise ValueError(
            f"unknown kernel family {name!r}; there are {', '.join(sorted(_registry()))}"
        ) from None
