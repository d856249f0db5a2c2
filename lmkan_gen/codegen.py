"""KernelSpec -> source text."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmkan_gen.plan import KernelSpec
from lmkan_gen.resources import resource_directory

_NAME = re.compile(r"[a-z_][a-z0-9_]*")


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(resource_directory("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(spec: KernelSpec) -> str:
    """The source of ``spec``: a pure function of it and of the templates.

    Raises:
        ValueError: a constant is neither an integer nor a lower-case identifier.
        jinja2.UndefinedError: the template wants a constant that the family did not give.
    """
    for name, value in spec.constants:
        if type(value) is int or (isinstance(value, str) and _NAME.fullmatch(value)):
            continue
        raise ValueError(
            f"constant {name}={value!r} for {spec.template} is neither an integer nor an identifier"
        )
    return _environment().get_template(spec.template).render(spec.context)
