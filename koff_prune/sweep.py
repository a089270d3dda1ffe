"""One recipe at several sparsities, budgets and seeds: sub-runs side by side, and what they say together.

Every sub-run is an ordinary run in `seed-S/sparsity-X[-tokens-T]/` of the sweep's folder. What a seed's
sub-runs have in common (token blocks, statistics, the dense model's losses, the ceiling) is made once and
linked into the others. A finished sub-run is read, not run again, and is on the page whether it was asked for
again or not: a sweep grows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from koff_export.errors import KoffError
from koff_export.files import disk_errors, fsync_path, read_json, recover, staged_dir, write_json, write_text
from koff_prune import ranks
from koff_prune.lock import alone
from koff_prune.needs import check_steps, check_vocabulary
from koff_prune.pages import finite, infinite
from koff_prune.places import differences, is_moved, local_paths
from koff_prune.points import Point, points
from koff_prune.progress import say
from koff_prune.recipe import SEED, Recipe
from koff_prune.tensor_file import is_whole
from koff_prune.verdict import Row

if TYPE_CHECKING:
    from koff_prune.run import Run

ROWS = "rows.json"  # of a finished sub-run: its rows, with the losses of every window
# scoring text is where the training text begins, whatever the budget
_OF_THE_SEED = (
    "vocabulary", "statistics.safetensors", "costs-surgeon.safetensors", "rows/dense_trained-none*",
    "rows/vocabulary",
)  # fmt: skip
_OF_THE_BUDGET = ("domains", "rows/dense_*")  # so much training text; the ceiling is trained on it


def sweep(
    recipe: Recipe,
    out: Path,
    *,
    sparsities: Sequence[float] = (),
    seeds: Sequence[int] = (),
    tokens: Sequence[int] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Compares at every point, then writes sweep.json, sweep.md and sweep.html into `out`.

    Args:
        recipe: Checked; its seed, sparsity and tokens hold wherever a list is empty.
        out: The sweep's folder.
        sparsities: Targets, each in (0, 1).
        seeds: Of data order, memories and draws.
        tokens: Training tokens in all, divided between the phases as the recipe divides its own.
        resume: Continue a sweep of the same recipe; other points may be asked for than before.

    Returns:
        What sweep.json holds.

    Raises:
        KoffError: The folder holds something else, or a point cannot be reached.
    """
    from koff_prune.sweep_report import summarise, write_sweep

    asked = points(recipe, sparsities, seeds, tokens)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise KoffError(f"{out}: cannot be made a folder; choose another --out") from error
    with alone(out):
        with ranks.turn():
            _enter(recipe, out, resume or ranks.rank() > 0)
        _check_targets(recipe, out, asked)
        there = _finished(out)
        _check_alike(recipe, out, _told_of(out, there))
        found = []
        for n, point in enumerate(asked, 1):
            say(f"sweep {n} of {len(asked)}: seed {point.seed}, sparsity {point.sparsity:g}"
                + ("" if point.tokens is None else f", {point.tokens:,} tokens"))  # fmt: skip
            before = [*asked[: n - 1], *(other for other in there if other not in asked)]
            found.append((point, *_compare_at(recipe, point, out, before)))
        for point in there:
            if point in asked:
                continue
            if (rows := _rows_at(recipe, point, out)) is not None:
                found.append((point, *rows))
            else:
                say(f"{point.folder}: lacks rows that are asked for by now, and is left out; name it too")
        found.sort(key=lambda one: (one[0].seed, one[0].tokens or 0, one[0].sparsity))
        warned = [(point, warning) for point, _, warnings in found for warning in warnings]
        summary = summarise([(point, rows) for point, rows, _ in found], warned)
        with ranks.turn():
            if not ranks.rank():
                write_sweep(out, summary)
        return summary


def _enter(recipe: Recipe, out: Path, resume: bool) -> None:
    stamp = out / "sweep-of.json"
    if stamp.exists():
        seen = read_json(stamp)
        if not isinstance(seen, dict):
            raise KoffError(f"{stamp}: is damaged; choose another --out")
        same = seen.get("recipe") == recipe.digest()
        if not same and not is_moved(recipe, seen.get("recipe"), seen.get("paths")):
            raise KoffError(
                f"{out}: holds a sweep of another recipe{differences(out / 'recipe.yaml', recipe)};"
                " choose another --out"
            )
        if not resume:
            raise KoffError(
                f"{out}: holds a sweep of this recipe; continue it with --resume, or choose --out"
            )
    elif any(p.name != ".lock" for p in out.iterdir()):
        raise KoffError(f"{out}: is not empty and holds no sweep; choose another --out")
    write_json(stamp, {"format": 1, "recipe": recipe.digest(), "paths": local_paths(recipe)})
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _check_targets(recipe: Recipe, out: Path, asked: Sequence[Point]) -> None:
    """Refuses what cannot be run, a budget or a sparsity, before hours go into what stands in front of it."""
    first = asked[0]
    new = [point for point in asked if not (out / point.folder / ROWS).exists()]
    for point in new:
        its = point.recipe(recipe)  # whether its dense model is there
        try:
            check_steps(its.learn, its.step_batches)
        except KoffError as error:
            if point.tokens is None:
                raise
            raise KoffError(f"--tokens: of {point.tokens}, {error}") from error
    others = {point.sparsity for point in new}
    if not others - {first.sparsity}:
        return
    from koff_prune.plan import even_plan
    from koff_prune.run import Run

    with ranks.turn(), Run(first.recipe(recipe), out / first.folder, resume=True) as run:
        for sparsity in sorted(others):
            structure = Point(first.seed, sparsity, None).recipe(recipe).structure
            check_vocabulary(run.units, structure)
            even_plan(run.units, structure)


def _finished(out: Path) -> list[Point]:
    """The points whose rows are there, or are but for those that the recipe has come to ask for."""
    found = []
    for path in sorted(out.glob(f"seed-*/sparsity-*/{ROWS}")):
        told = _read_object(path).get("point")
        if isinstance(told, dict) and told.keys() == {"seed", "sparsity", "tokens"}:
            point = Point(**told)
            if out / point.folder == path.parent:
                found.append(point)
    return found


def _rows_at(recipe: Recipe, point: Point, out: Path) -> tuple[list[Row], list[str]] | None:
    """The rows of a finished sub-run and what its report warns of; None if others are asked for by now."""
    found = _read_object(out / point.folder / ROWS)
    rows = found.get("rows")
    if found.get("compare") != _asked_rows(recipe) or found.get("point") != vars(point) or not rows:
        return None
    for row in rows:
        row.update({key: infinite(row[key]) for key in ("perplexity", "nll")})
    return rows, found.get("warnings", [])


def _asked_rows(recipe: Recipe) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json", exclude_none=True) for row in recipe.compare]


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; none of a file that is damaged or not there: what it holds can be made again."""
    try:
        found = read_json(path)
    except KoffError:
        return {}
    return found if isinstance(found, dict) else {}


def _compare_at(
    recipe: Recipe, point: Point, out: Path, before: Sequence[Point]
) -> tuple[list[Row], list[str]]:
    """The rows of one sub-run, and what its report warns of."""
    folder = out / point.folder
    if not ranks.agree(_rows_at(recipe, point, out) is not None):
        from koff_prune.api import compare
        from koff_prune.run import Run

        its_recipe = point.recipe(recipe)
        with ranks.turn(), Run(its_recipe, folder, resume=True) as run:
            # of the same budget first: their texts need not be read again
            for other in sorted(before, key=lambda other: other.tokens != point.tokens):
                same_budget = other.tokens == point.tokens
                if other.seed == point.seed and _is_alike(run, out / other.folder, same_budget):
                    share(out / other.folder, folder, same_budget=same_budget)
            if before:  # else there is nothing to be like, and both are read once, where they are needed
                mine = {"weights": run.whole.fingerprint, "texts": _digests(run)}
                _check_alike(recipe, out, {**_told_of(out, before), point.folder: mine})
        rows = compare(its_recipe, folder, resume=True)
        with ranks.turn():
            if _rows_at(recipe, point, out) is None:
                told = {"point": vars(point), "compare": _asked_rows(recipe), "rows": rows,
                        "warnings": read_json(folder / "report.json")["warnings"]}  # fmt: skip
                write_json(folder / ROWS, finite(told))
    found = _rows_at(recipe, point, out)
    assert found is not None
    return found


def _is_alike(run: Run, source: Path, same_budget: bool) -> bool:
    """Whether a sub-run's files hold for `run` too: they are of its weights, dtype, versions and texts.

    Of the same budget the texts, as they were read there, are shared themselves.
    """
    mine = {**_read_object(run.folder / "run.json"), "weights": run.whole.fingerprint}
    if not same_budget:
        mine["texts"] = _digests(run)
    theirs = _read_object(source / "run.json")
    keys = mine.keys() & {"weights", "dtype", "versions", "texts"}
    return all(theirs.get(key, mine[key]) == mine[key] for key in keys)


def _digests(run: Run) -> dict[str, str]:
    return {name: blocks.digest for name, blocks in run.domains.items()}


def _told_of(out: Path, of: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """What run.json tells, by sub-run."""
    return {point.folder: _read_object(out / point.folder / "run.json") for point in of}


def _check_alike(recipe: Recipe, out: Path, told: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether sub-runs, of whatever seed, are of one model and one text.

    Raises:
        KoffError: They are not: a mean over them would be a figure of nothing.
    """
    each_its_own = SEED in str(recipe.model.source)  # every seed has a model of its own
    first: dict[str, tuple[str, str]] = {}
    for folder, run in told.items():
        texts = run.get("texts")
        texts = texts if isinstance(texts, dict) else {}
        named = {f"domains.{name}.source": digest for name, digest in texts.items()}
        if "weights" in run and not each_its_own:
            named["model.source"] = run["weights"]
        for key, digest in named.items():
            other, was = first.setdefault(key, (folder, digest))
            if was != digest:
                raise KoffError(
                    f"{out}: what {key} names has changed between {other} and {folder}; choose another --out"
                )


def share(source: Path, target: Path, *, same_budget: bool) -> None:
    """Links into `target` what `source` has finished and what does not depend on the sparsity.

    Args:
        source: A run of the same seed.
        target: The run that lacks it.
        same_budget: Whether both train for the same tokens.
    """
    for pattern in _OF_THE_SEED + (_OF_THE_BUDGET if same_budget else ()):
        for path in source.glob(pattern):
            place = target / path.relative_to(source)
            if path.is_file() and not place.exists():
                if is_whole(path):
                    _link(path, place)
                else:
                    say(f"{path}: is damaged, so that {target.name} makes one of its own")
            elif path.is_dir():
                recover(place)
                if not place.exists():
                    with staged_dir(place) as aside:
                        shutil.copytree(path, aside, copy_function=_link, dirs_exist_ok=True)


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(target):
        try:
            try:
                os.link(source, aside)
            except OSError:
                shutil.copy2(source, aside)
                fsync_path(aside)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
