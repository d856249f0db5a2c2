"""The part of YAML that tuning files need, read fast and within bounds, and written.

libyaml parses and values are built here, without recursion. Refused are duplicate keys, keys that are no
text, anchors and aliases (a few lines of them can stand for gigabytes), tags, deep nesting, long texts,
numbers beyond 64 bits, control characters and several documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from lmkan_gen.text import quoted, unprintable

# PyYAML may be built without libyaml
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_DEEPEST = 16
_LONGEST = 1024
_LARGEST = 2**63


class PlainYamlError(ValueError):
    """Not YAML, or more than the part of it that is read; the message names the line."""


def parse(text: str) -> object:
    """What a YAML document holds: mappings, lists, texts, numbers, booleans, dates and None.

    Raises:
        PlainYamlError: it cannot be read.
    """
    try:
        return _build(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise PlainYamlError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise PlainYamlError(" ".join(str(error).split())) from error


def dump(value: object) -> str:
    """The YAML text of ``value``, with the innermost mappings on one line each."""
    text: str = yaml.dump(
        value, Dumper=_DUMPER, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )
    return text


def _build(events: Iterable[Any]) -> object:
    scalars = _Scalars()
    documents: list[object] = []
    container: list[object] | dict[str, object] = documents
    key: str | None = None
    outside: list[tuple[list[object] | dict[str, object], str | None]] = []
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            container, key = outside.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue  # where streams and documents begin and end
        if event.anchor is not None:  # an alias has that of what it stands for
            raise _error(event, "anchors and aliases are not read; write the value out")
        value: object
        if isinstance(event, yaml.ScalarEvent):
            value = scalars.value(event)
        else:
            assert isinstance(event, yaml.CollectionStartEvent)
            if event.tag is not None:
                raise _error(event, f"tags are not read, got {quoted(event.tag)}")
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        if isinstance(container, list):
            if container is documents and documents:
                raise _error(event, "there must be one document")
            container.append(value)
        elif key is None:
            if not isinstance(value, str):
                raise _error(event, f"a key must be text, got {quoted(value)}")
            if value in container:
                raise _error(event, f"the key {quoted(value)} occurs twice; keep one of them")
            key = value
            continue
        else:
            container[key] = value
            key = None
        if isinstance(value, list | dict):
            if len(outside) == _DEEPEST:
                raise _error(event, f"nested more than {_DEEPEST} levels deep")
            outside.append((container, key))
            container, key = value, None
    return documents[0] if documents else None


class _Scalars:
    """Values of scalars; those that stand there unquoted are remembered, since most occur many times."""

    def __init__(self) -> None:
        self._resolver = Resolver()
        self._constructor = SafeConstructor()
        self._plain: dict[str, object] = {}

    def value(self, event: Any) -> object:
        text: str = event.value
        if event.tag is not None:
            raise _error(event, f"tags are not read, got {quoted(event.tag)}")
        is_plain = event.implicit[0]
        if is_plain and text in self._plain:
            return self._plain[text]
        if len(text) > _LONGEST:
            raise _error(event, f"a text of {len(text)} characters; at most {_LONGEST} are read")
        if unprintable(text):
            raise _error(event, f"control characters are not allowed, got {quoted(text)}")
        if not is_plain:
            return text
        return self._plain.setdefault(text, self._constructed(event))

    def _constructed(self, event: Any) -> object:
        tag = self._resolver.resolve(yaml.ScalarNode, event.value, (True, False))  # type: ignore[no-untyped-call]
        construct = SafeConstructor.yaml_constructors.get(tag)
        try:
            if construct is None:
                raise ValueError("it has a meaning in YAML that is not read; quote it")
            value = construct(self._constructor, yaml.ScalarNode(tag, event.value))
            if isinstance(value, int) and abs(value) >= _LARGEST:
                raise ValueError("a number beyond 64 bits")
        except (ValueError, OverflowError) as error:
            raise _error(event, f"{quoted(event.value)}: {error}") from error
        return value


def _error(event: Any, message: str) -> PlainYamlError:
    return PlainYamlError(f"line {event.start_mark.line + 1}: {message}")
