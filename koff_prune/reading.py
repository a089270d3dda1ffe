"""From a YAML file to a `Recipe`; what is wrong with it is told by `mistakes`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from koff_export.errors import KoffError
from koff_prune.mistakes import Loc, Where, dotted, explain
from koff_prune.recipe import SEED, Recipe


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
    where = Where(path, node)
    for item in overrides or []:
        where.overrides[_override(data, item)] = item
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise KoffError("\n".join(explain(where, error))) from error
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
    if r"'\t'" in str(problem):
        problem = f"{problem}; indent with spaces"
    return f"recipe {path}{at}: {problem}" if mark else f"recipe {path}: is not valid YAML ({problem})"


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


def _resolve(recipe: Recipe, folder: Path) -> tuple[Recipe, list[tuple[Loc, str]]]:
    """Makes local paths absolute; also returns a complaint per file that is missing."""
    data = recipe.model_dump()
    missing: list[tuple[Loc, str]] = []

    def local(holder: dict[str, Any], key: str, loc: Loc) -> None:
        try:
            found = (folder / Path(holder[key]).expanduser()).resolve()
            there = found.exists()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no such user, too long
            missing.append((loc, f"`{dotted(loc)}` is '{holder[key][:80]}': is no path ({str(error)[:80]})"))
            return
        if not there and SEED not in holder[key]:  # a sweep looks for its seeds' models itself
            missing.append(
                (loc, f"`{dotted(loc)}` is '{holder[key]}': there is no such file or folder ({found})")
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
