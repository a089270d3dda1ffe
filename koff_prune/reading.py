"""From a YAML file to a `Recipe`, and from every mistake to one line that says where it is and its mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from koff_export.errors import KoffError
from koff_prune.recipe import SEED, Recipe

Loc = tuple[int | str, ...]


def load_recipe(
    path: str | Path,
    overrides: list[str] | None = None,
    *,
    check_files: bool = True,
    text: str | None = None,
) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        path: YAML file. Relative paths in it are resolved against its folder.
        overrides: `dotted.key=value` strings; the value is parsed as YAML.
        check_files: Whether the local files that it names must exist.
        text: Read this instead of the file; `path` is where it is said to be from.

    Returns:
        The recipe, its local paths absolute, so that a saved copy means the same from anywhere.

    Raises:
        KoffError: One line per mistake, each with its YAML line, key, value and mend.
    """
    path = Path(path)
    data, node = read_yaml(path, text)
    if not isinstance(data, dict):
        raise KoffError(f"recipe {path}: must be a mapping of keys such as `model:` and `domains:`")
    where = _Where(path, node)
    for item in overrides or []:
        where.overrides[_override(data, item)] = item
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise KoffError("\n".join(_explain(where, error))) from error
    resolved, missing = _resolve(recipe, path.parent)
    if missing and check_files:
        raise KoffError("\n".join(f"{where(loc)}: {text}" for loc, text in missing))
    return resolved


def _no_word(key: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which keys are always text, 1e5 is a number and 2024-01-01 is not a date."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _no_word(key)
        # As text, `no:` is the language code and not false, and `1:` is a name.
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


_MOST = 100_000  # values of a recipe


def _compose(path: Path, text: str | None = None) -> yaml.Node:
    try:
        text = path.read_text(encoding="utf-8") if text is None else text
    except OSError as error:
        raise KoffError(
            f"recipe {path}: cannot be read ({(error.strerror or str(error)).lower()})"
        ) from error
    except UnicodeDecodeError as error:
        raise KoffError(f"recipe {path}: is not UTF-8 text") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise KoffError(f"recipe {path}: is empty; it needs at least `model:` and `domains:`")
        _refuse_duplicates(node, set())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise KoffError(_yaml_mistake(path, error)) from error
    return node


def _refuse_duplicates(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, perhaps of itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _no_word(key)
            if key.value in first:
                problem = (
                    f"`{key.value}` is named twice, first in line {first[key.value]}; keep one or rename it"
                )
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first[key.value] = key.start_mark.line + 1
            _refuse_duplicates(value, seen)


def _yaml_mistake(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    at = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or (
        "it nests too deeply" if isinstance(error, RecursionError) else error
    )
    return f"recipe {path}{at}: {problem}" if mark else f"recipe {path}: is not valid YAML ({problem})"


class _Where:
    """Names the place of a key: its YAML line, or the override that set it."""

    def __init__(self, path: Path, node: yaml.Node) -> None:
        self.path, self.node = path, node
        self.overrides: dict[Loc, str] = {}

    def __call__(self, loc: Loc) -> str:
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


def read_yaml(path: Path, text: str | None = None) -> tuple[Any, yaml.Node]:
    """What a YAML file, or `text` in its place, holds, and where.

    Raises:
        KoffError: It is no YAML, or names a key twice.
    """
    node = _compose(path, text)
    try:
        return _unshared(_Loader("").construct_document(node), [0]), node
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise KoffError(_yaml_mistake(path, error)) from error


def _unshared(data: Any, count: list[int]) -> Any:
    """A copy in which what YAML names twice by an alias stands twice, so that one can be overridden alone."""
    count[0] += 1
    if count[0] > _MOST:
        raise ValueError(f"its aliases stand for more than {_MOST:,} values")
    if isinstance(data, dict):
        return {key: _unshared(value, count) for key, value in data.items()}
    return [_unshared(value, count) for value in data] if isinstance(data, list) else data


def _override(data: dict[str, Any], item: str) -> Loc:
    """Writes one `dotted.key=value` into `data`; returns where."""
    name, sign, text = item.partition("=")
    parts = name.strip().split(".")
    if not sign or not all(parts):
        raise KoffError(f"--set {item}: write it as key.key=value, such as learn.tokens=100000")
    try:
        value = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise KoffError(
            f"--set {item}: the value is not valid YAML; a text with braces or colons wants quotes:"
            f" --set '{name}=\"…\"'"
        ) from error
    place: Any = data
    loc: list[int | str] = []
    while True:
        part, parts = _next_part(place, parts)
        if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            loc.append(int(part))
        elif isinstance(place, dict):
            loc.append(part)
        else:
            holder = ".".join(map(str, loc))
            raise KoffError(
                f"--set {item}: `{holder}` is {place!r}, which has no `{part}`; set `{holder}` as a whole"
            )
        if not parts:
            place[loc[-1]] = value
            return tuple(loc)
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = place[loc[-1]]


def _next_part(place: Any, parts: list[str]) -> tuple[str, list[str]]:
    """The longest run of `parts` that is a key here, since a name may hold dots; else the first part."""
    for end in range(len(parts), 1, -1):
        if isinstance(place, dict) and ".".join(parts[:end]) in place:
            return ".".join(parts[:end]), parts[end:]
    return parts[0], parts[1:]


def _explain(where: _Where, error: ValidationError) -> list[str]:
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
            text = f"key `{_dotted(loc)}` is missing{_described(loc)}"
        else:
            text = _wrong_value(loc, e)
        mistakes.setdefault(f"{where(loc)}: {text}", where.line(loc) or 0)
    return sorted(mistakes, key=mistakes.__getitem__)


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


def _unknown_key(loc: Loc) -> tuple[str, Loc]:
    """The sentence, and the key that was probably meant."""
    name, here = str(loc[-1]), _known_keys(loc[:-1])
    text = f"unknown key `{_dotted(loc)}`; "
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    if near:
        return text + f"did you mean `{_dotted((*loc[:-1], near[0]))}`?", (*loc[:-1], near[0])
    elsewhere = [path for path in _all_keys(Recipe) if path[-1] == name]
    if elsewhere:
        return text + "did you mean " + " or ".join(f"`{_dotted(path)}`" for path in elsewhere) + "?", ()
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
    if not loc:
        return text
    shown = f" is {_yaml(value)}" if isinstance(value, str | int | float | bool | None) else ""
    return f"`{_dotted(loc)}`{shown}: {text}"


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


def _resolve(recipe: Recipe, folder: Path) -> tuple[Recipe, list[tuple[Loc, str]]]:
    """Makes local paths absolute; also returns a complaint per file that is missing."""
    data = recipe.model_dump()
    missing: list[tuple[Loc, str]] = []

    def local(holder: dict[str, Any], key: str, loc: Loc) -> None:
        try:
            found = (folder / Path(holder[key]).expanduser()).resolve()
            there = found.exists()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no such user, too long
            missing.append((loc, f"`{_dotted(loc)}` is '{holder[key][:80]}': is no path ({str(error)[:80]})"))
            return
        if not there and SEED not in holder[key]:  # a sweep looks for its seeds' models itself
            missing.append(
                (loc, f"`{_dotted(loc)}` is '{holder[key]}': there is no such file or folder ({found})")
            )
        holder[key] = str(found)

    model = data["model"]
    if isinstance(model["source"], str) and _is_local(model["source"], folder):
        local(model, "source", ("model", "source"))
    if model["config"]:
        local(model, "config", ("model", "config"))
    for name, domain in data["domains"].items():
        many = isinstance(domain["source"], list)
        for i, source in enumerate(domain["source"] if many else [domain["source"]]):
            if source["path"]:
                loc: Loc = ("domains", name, "source", *((i,) if many else ()), "path")
                local(source, "path", loc)
    return Recipe.model_validate(data), missing


def _is_local(source: str, folder: Path) -> bool:
    """Whether a model source is a path: it exists, or it cannot be a hub id."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.gguf)", source):
        return True
    try:
        return (folder / source).exists()
    except OSError:
        return True
