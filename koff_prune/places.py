"""Where a recipe's local files lie; whether it is the same one in a project that was moved; finished runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from koff_export.errors import KoffError
from koff_prune.recipe import Recipe


def _holders(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The mappings that hold a local path, in a fixed order, each with its key."""
    model = data["model"]
    if isinstance(model["source"], str) and Path(model["source"]).is_absolute():
        yield model, "source"
    for domain in data["domains"].values():
        source = domain["source"]
        for one in source if isinstance(source, list) else [source]:
            if one["path"]:
                yield one, "path"


def local_paths(recipe: Recipe) -> list[str]:
    """The absolute paths that a recipe's digest covers, in a fixed order."""
    return [holder[key] for holder, key in _holders(recipe.model_dump(mode="json"))]


def is_moved(recipe: Recipe, digest: Any, paths: Any) -> bool:
    """Whether `recipe` is the one of `digest` with all that changed place moved from one folder to one other.

    What is still where it was has not moved: a recipe that names another version of a text is another recipe.

    Args:
        recipe: As read from where it lies now.
        digest: Of the recipe as it was.
        paths: `local_paths` of the recipe as it was, from a file: anything at all.
    """
    data = recipe.model_dump(mode="json")
    holders = list(_holders(data))
    if not isinstance(paths, list) or len(paths) != len(holders):
        return False
    roots = set()
    for (holder, key), old in zip(holders, paths, strict=True):
        if not isinstance(old, str):
            return False
        if old != holder[key]:
            if Path(old).name != Path(holder[key]).name or Path(old).exists():
                return False
            roots.add(_roots(old, holder[key]))
        holder[key] = old
    return len(roots) == 1 and Recipe.model_validate(data).digest() == digest


def _roots(old: str, new: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is left of two paths without the end that they share."""
    one, other = Path(old).parts, Path(new).parts
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return one[: len(one) - shared], other[: len(other) - shared]


def differences(known: Path, recipe: Recipe) -> str:
    """The first keys whose values are not those of a resolved recipe on the disk, in words; else nothing."""
    try:
        before = yaml.safe_load(known.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    then, now = _flat(before), _flat(recipe.model_dump(mode="json"))
    keys = [
        k for k in {**now, **then} if then.get(k) != now.get(k) and not k.startswith(("compare", "export"))
    ]
    more = f" and {len(keys) - 3} keys more" if len(keys) > 3 else ""
    told = [f"{key} is {now.get(key)!r:.60} here and {then.get(key)!r:.60} there" for key in keys[:3]]
    return f" ({', '.join(told)}{more})" if told else ""


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    if not isinstance(value, dict) or not value:
        return {place: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{place}.{key}".lstrip(".")).items()}


def check_finished(folder: Path) -> list[str]:
    """Of what a finished run's folder holds, what is not there: nothing, or `memories`, which may be none.

    Raises:
        KoffError: It is no finished run.
    """
    if (folder / "sweep-of.json").exists():
        runs = sorted(folder.glob("seed-*/sparsity-*"))
        inside = runs[0] if runs else folder / "seed-S" / "sparsity-X"
        raise KoffError(f"{folder}: is a sweep; name one of its runs, such as {inside}")
    needed = ("recipe.yaml", "run.json", "plan.json", "memories")
    missing = [name for name in needed if not (folder / name).exists()]
    if missing and missing != ["memories"]:
        raise unfinished(folder, missing[0])
    return missing


def unfinished(folder: Path, name: str) -> KoffError:
    """What to say of a folder that is no finished run, for lack of `name`."""
    if (folder / "run.json").exists():
        mend = f"go on with `koff-prune apply RECIPE --out {folder} --resume`"
    elif (folder / "koff.json").exists():
        mend = "it is a bundle: name the folder of the run that made it"
    else:
        mend = "name the folder of one, as --out had it"
    return KoffError(f"{folder}: holds no finished run ({name} is missing); {mend}")
