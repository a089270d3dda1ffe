"""What is wrong with a recipe, a line each: where it is, the key, the value and the mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from koff_prune.recipe import Recipe

Loc = tuple[int | str, ...]


class Where:
    """Names the place of a key: its YAML line, or the override that set it."""

    def __init__(self, path: Path, node: yaml.Node) -> None:
        self.path, self.node = path, node
        self.overrides: dict[Loc, str] = {}

    def __call__(self, loc: Loc) -> str:
        """In words."""
        for key, item in reversed(self.overrides.items()):
            above = loc == key[: len(loc)] and self._find(loc)[1] < len(loc)  # it made what holds its key
            if loc[: len(key)] == key or above:
                return f"--set {item}"
        line = self.line(loc)
        return f"recipe {self.path}, line {line}" if line else f"recipe {self.path}"

    def line(self, loc: Loc) -> int | None:
        """Line, from 1, of the deepest part of `loc` that the YAML text holds."""
        return self._find(loc)[0]

    def _find(self, loc: Loc) -> tuple[int | None, int]:
        """That line, and how many parts of `loc` the YAML text holds."""
        node: yaml.Node | None = self.node
        line = None
        for depth, part in enumerate(loc):
            found = None
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:  # the last wins: merged keys come first
                    if key.value == str(part):
                        line, found = key.start_mark.line + 1, value
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = node.value[part]
                line = found.start_mark.line + 1
            if found is None:
                return line, depth
            node = found
        return line, len(loc)


def explain(where: Where, error: ValidationError) -> list[str]:
    """One line per mistake, in the order of the file."""
    mistakes: dict[str, int] = {}
    meant: set[Loc] = set()
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    for e in errors:
        # Tags of unions and pydantic's own "[key]" are no part of what the user wrote.
        loc = tuple(p for p in e["loc"] if not (isinstance(p, str) and p[:1] + p[-1:] in ("<>", "[]")))
        if e["type"] == "missing" and loc in meant:
            continue
        if e["type"] == "extra_forbidden":
            text, near = _unknown_key(loc)
            meant.add(near)
        elif e["type"] == "missing":
            text = f"key `{dotted(loc)}` is missing{_described(loc)}"
        else:
            text = _wrong_value(loc, e)
        mistakes.setdefault(f"{where(loc)}: {text}", where.line(loc) or 0)
    return sorted(mistakes, key=mistakes.__getitem__)


def dotted(loc: Loc) -> str:
    """A key as the user would name it."""
    return ".".join(map(str, loc))


def _unknown_key(loc: Loc) -> tuple[str, Loc]:
    """The sentence, and the key that was probably meant."""
    name, here = str(loc[-1]), _known_keys(loc[:-1])
    text = f"unknown key `{dotted(loc)}`; "
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    if near:
        return text + f"did you mean `{dotted((*loc[:-1], near[0]))}`?", (*loc[:-1], near[0])
    elsewhere = [path for path in _all_keys(Recipe) if path[-1] == name]
    if elsewhere:
        return text + "did you mean " + " or ".join(f"`{dotted(path)}`" for path in elsewhere) + "?", ()
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.4)
    guess = f"the nearest is `{near[0]}`; " if near else ""
    return text + f"{guess}known here: {', '.join(here)}", ()


_WORDS = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping of keys",
    "model_type": "must be a mapping of keys",
    "finite_number": "must be a finite number",
}
_PATTERNS = {
    "package": "must be an exact version, name==version",
    "sha256": "must be 64 hexadecimal digits in lower case",
    "domains": "must be 1 to 64 letters, digits, `_`, `.` or `-`, the first a letter or digit",
}


def _wrong_value(loc: Loc, e: Any) -> str:
    value = e.get("input")
    text = _WORDS.get(e["type"]) or re.sub(r"^Value error, ", "", e["msg"]).replace("Input should", "must")
    if e["type"] == "string_type" and isinstance(value, int | float):
        text += ": put it in quotes"
    if e["type"] == "string_pattern_mismatch":
        text = next((rule for key, rule in _PATTERNS.items() if key in loc[-2:]), text)
    if e["type"] in ("too_short", "string_too_short"):
        text = "must not be empty"
    text += _mend(loc, e["type"], value)
    if not loc:
        return text
    shown = f" is {_yaml(value)}" if isinstance(value, str | int | float | bool | None) else ""
    return f"`{dotted(loc)}`{shown}: {text}"


def _mend(loc: Loc, kind: str, value: Any) -> str:
    """What was meant, where a beginner writes something else."""
    if kind == "string_type" and isinstance(value, dict):
        return ": put a template in quotes, since YAML takes braces for a mapping"
    if kind not in ("model_type", "dict_type") or not isinstance(value, str):
        return ""
    if loc in (("model",), ("domains", *loc[1:2])):
        return f"; write {{source: {value:.60}}}"
    if value == "none":
        parts = [key for key in _known_keys(loc) if key not in ("version", "seed")]
        return "; set its parts: " + ", ".join(f"{dotted((*loc, key))}=none" for key in parts[:3])
    return ""


def _yaml(value: Any) -> str:
    """A value as it would stand in YAML, cut when long."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return f"'{text}'"[:80] if isinstance(value, str) else text


def _enter(annotation: Any, loc: Loc) -> Any:
    """The annotation at `loc` below `annotation`, or None."""
    if not loc:
        return annotation
    part, rest = loc[0], loc[1:]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return _enter(field.annotation, rest) if field else None
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return _enter(arguments[1], rest)
    if get_origin(annotation) is list:
        return _enter(arguments[0], rest if isinstance(part, int) else loc)
    found = (_enter(a, loc) for a in arguments if not isinstance(a, str))
    return next((a for a in found if a is not None), None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _models(argument)


def _known_keys(loc: Loc) -> list[str]:
    """The keys that may stand at `loc`."""
    model = next(_models(_enter(Recipe, loc)), Recipe)
    return list(model.model_fields)


def _all_keys(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*path, name)
        inner = next(_models(field.annotation), None)
        if inner is not None:
            many = get_origin(field.annotation) is dict
            yield from _all_keys(inner, (*path, name, "NAME") if many else (*path, name))


def _described(loc: Loc) -> str:
    model = next(_models(_enter(Recipe, loc[:-1])), None)
    field = model.model_fields.get(str(loc[-1])) if model else None
    return f": {field.description}" if field and field.description else ""
