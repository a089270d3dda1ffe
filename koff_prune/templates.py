"""The small template language of `text`, `key` and `where` in a recipe's sources.

`{doc.problem}` goes down into mappings, `{doc.choices[doc.gold]}` indexes by another field (or by a number),
`{doc.full_text|literal}` first parses a Python literal. Lists and mappings give the texts that they hold, a
line each; what is missing or null gives nothing. `{{` and `}}` are braces.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from typing import Any

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PATH = re.compile(r"[^.\[\]|\s]+(?:\.[^.\[\]|\s]+|\[[^\[\]|]+\])*")
_STEP = re.compile(r"\[([^\[\]]+)\]|([^.\[\]]+)")
_LITERAL_CHARS = 4 << 20  # longest Python literal that is parsed


def render(template: str, record: Mapping[str, Any]) -> str:
    """Fills a template from a record.

    Raises:
        ValueError: The template is malformed, a `|literal` field holds no Python literal, or a field holds
            bytes that are no text.
    """
    return "".join(text for text, _ in _filled(template, record))


_ABSENT = object()


def unknown_fields(template: str, record: Mapping[str, Any]) -> set[str]:
    """The paths of a template's fields that a record does not have; one that is null is there."""
    paths = {path for _, path, _ in parse(template) if path}
    return {path for path in paths if lookup(record, path, _ABSENT) is _ABSENT}


def named_by(template: str, record: Mapping[str, Any]) -> str:
    """A template as a record's name or text: nothing where it has fields, and none of them gives anything.

    Raises:
        ValueError: As for `render`.
    """
    parts = _filled(template, record)
    fields = [text for text, is_field in parts if is_field]
    return "".join(text for text, _ in parts) if any(fields) or not fields else ""


def _filled(template: str, record: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The texts of a template's parts, and whether a field gave each."""
    out = []
    for text, path, literal in parse(template):
        if path:
            value = lookup(record, path)
            text = "\n".join(_strings(_literal(value, path) if literal else value))
        out.append((text, bool(path)))
    return out


@functools.lru_cache(maxsize=256)
def parse(template: str) -> tuple[tuple[str, str, bool], ...]:
    """The parts of a template: (plain text, "", False) or ("", path, whether it is a literal).

    Raises:
        ValueError: A brace without its partner, or a field that is not a path.
    """
    parts: list[tuple[str, str, bool]] = []
    position = 0
    for match in _PART.finditer(template):
        parts.append((template[position : match.start()], "", False))
        position = match.end()
        if match[0] in ("{{", "}}"):
            parts.append((match[0][0], "", False))
        elif match[1] is None:
            raise ValueError(
                f"template '{template}' has a lone '{match[0]}'; write it twice to mean the brace itself"
            )
        else:
            path, _, name = match[1].partition("|")
            if not _PATH.fullmatch(path) or name not in ("", "literal"):
                raise ValueError(
                    f"template '{template}': '{match[0]}' is no field; "
                    "write {a.b}, {a[index]} or {a|literal}"
                )
            parts.append(("", path, name == "literal"))
    parts.append((template[position:], "", False))
    return tuple(part for part in parts if part != ("", "", False))


def lookup(record: Mapping[str, Any], path: str, absent: Any = None) -> Any:
    """The value at a path such as `doc.choices[doc.gold]`, or `absent` where the path ends early."""
    value: Any = record
    for index, name in _STEP.findall(path):
        step: Any = name
        if index:
            step = int(index) if re.fullmatch(r"-?\d+", index) else lookup(record, index)
            if isinstance(step, float) and step.is_integer():
                step = int(step)  # what a table makes of whole numbers where some are missing
            if step is None or isinstance(step, Mapping | list | tuple | set):
                return absent
        if isinstance(value, Mapping):
            value = value.get(step if step in value else str(step), absent)
        elif isinstance(value, list | tuple) and re.fullmatch(r"-?\d+", str(step)):
            value = value[int(step)] if -len(value) <= int(step) < len(value) else absent
        else:
            return absent
    return value


def _literal(value: Any, path: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    if len(value) > _LITERAL_CHARS:
        raise ValueError(
            f"field '{path}' is longer than the {_LITERAL_CHARS} characters that |literal parses"
        )
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"field '{path}' holds no Python literal; drop |literal") from error


def _strings(value: Any) -> list[str]:
    """Every text in a value, in order; numbers as they are written."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        items = sorted(value, key=str) if isinstance(value, set) else value
        return [text for item in items for text in _strings(item) if text]
    if isinstance(value, bytes):
        try:
            return [value.decode()]
        except UnicodeDecodeError as error:
            raise ValueError("a field holds bytes that are no UTF-8 text") from error
    return [] if value is None else [str(value)]
