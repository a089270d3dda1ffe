"""One recipe at several sparsities, budgets and seeds: sub-runs side by side, and what they say together.

Every sub-run is an ordinary run in `seed-S/sparsity-X[-tokens-T]/` of the sweep's folder. What a seed's
sub-runs have in common (token blocks, statistics, the dense model's losses, the ceiling) is made once and
linked into the others. A finished sub-run is read, not run again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_export.errors import KoffError
from koff_export.files import read_json, recover, staged_dir, write_json
from koff_prune import ranks
from koff_prune.lock import alone
from koff_prune.pages import finite, infinite
from koff_prune.places import is_moved, local_paths
from koff_prune.progress import say
from koff_prune.recipe import SEED, Recipe
from koff_prune.verdict import Row

if TYPE_CHECKING:
    from koff_prune.run import Run

ROWS = "rows.json"  # of a finished sub-run: its rows, with the losses of every window
# scoring text is where the training text begins, whatever the budget
_OF_THE_SEED = ("statistics.safetensors", "costs-surgeon.safetensors", "rows/dense_trained-none*")
_OF_THE_BUDGET = ("domains", "rows/dense_*")  # so much training text; the ceiling is trained on it


@dataclass(frozen=True)
class Point:
    """One sub-run of a sweep.

    Attributes:
        seed: Of the recipe.
        sparsity: Target.
        tokens: Training tokens over both phases; None for the recipe's own.
    """

    seed: int
    sparsity: float
    tokens: int | None

    @property
    def folder(self) -> str:
        """Path inside the sweep's folder."""
        budget = "" if self.tokens is None else f"-tokens-{self.tokens}"
        return f"seed-{self.seed}/sparsity-{self.sparsity:g}{budget}"

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe of this point: the base's split between joint phase and settling is kept."""
        data = base.model_dump(mode="json")
        data["seed"] = self.seed
        source = data["model"]["source"]
        if isinstance(source, str) and SEED in source:  # a dense model of each seed's own
            data["model"]["source"] = source.replace(SEED, str(self.seed))
            if not Path(data["model"]["source"]).exists():
                raise KoffError(
                    f"model.source '{source}': there is no {data['model']['source']}; make it first"
                )
        data["structure"]["sparsity"] = self.sparsity
        if self.tokens is not None:
            learn = data["learn"]
            whole = learn["tokens"] + learn["settle_tokens"]
            learn["settle_tokens"] = round(self.tokens * learn["settle_tokens"] / whole)
            learn["tokens"] = self.tokens - learn["settle_tokens"]
        return Recipe.model_validate(data)


def points(
    recipe: Recipe, sparsities: Sequence[float], seeds: Sequence[int], tokens: Sequence[int]
) -> list[Point]:
    """Every combination, seed by seed; what a list leaves open is the recipe's own.

    Raises:
        KoffError: A sparsity, seed or budget that cannot be, or one named twice.
    """
    for name, values, low, high in (
        ("--sparsity", sparsities, 0.0, 1.0),
        ("--seed", seeds, -1.0, 2.0**31),
        ("--tokens", tokens, 0.0, 2.0**62),
    ):
        for value in values:
            if not low < value < high:
                raise KoffError(f"{name}: {value} is out of range; name values between {low:g} and {high:g}")
        if len(set(values)) != len(values):
            raise KoffError(f"{name}: {', '.join(map(str, values))} names a value twice; name each once")
    if tokens and not recipe.learn.tokens + recipe.learn.settle_tokens:
        raise KoffError("--tokens: is divided as learn.tokens and learn.settle_tokens are; both are 0")
    budgets: Sequence[int | None] = tokens or [None]
    if len({f"{value:g}" for value in sparsities}) != len(sparsities):
        raise KoffError(
            f"--sparsity: {', '.join(map(str, sparsities))} are too near to one another; name what six digits"
            " tell apart"
        )
    return [
        Point(seed, sparsity, budget)
        for seed in (seeds or [recipe.seed])
        for budget in budgets
        for sparsity in (sparsities or [recipe.structure.sparsity])
    ]


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
        resume: Continue a sweep of the same recipe; more points may be asked for than before.

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
        found = []
        for n, point in enumerate(asked, 1):
            say(f"sweep {n} of {len(asked)}: seed {point.seed}, sparsity {point.sparsity:g}"
                + ("" if point.tokens is None else f", {point.tokens:,} tokens"))  # fmt: skip
            found.append((point, *_compare_at(recipe, point, out, asked[: n - 1])))
        summary = summarise([(point, rows) for point, rows, _ in found], [w for *_, ws in found for w in ws])
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
            raise KoffError(f"{out}: holds a sweep of another recipe; choose another --out")
        if not resume:
            raise KoffError(
                f"{out}: holds a sweep of this recipe; continue it with --resume, or choose --out"
            )
    elif any(p.name != ".lock" for p in out.iterdir()):
        raise KoffError(f"{out}: is not empty and holds no sweep; choose another --out")
    write_json(stamp, {"format": 1, "recipe": recipe.digest(), "paths": local_paths(recipe)})


def _check_targets(recipe: Recipe, out: Path, asked: Sequence[Point]) -> None:
    """Refuses a sparsity that the model cannot have, before hours go into those in front of it."""
    first = asked[0]
    others = {point.sparsity for point in asked if not (out / point.folder / ROWS).exists()}
    if not others - {first.sparsity}:
        return
    from koff_prune.plan import even_plan
    from koff_prune.run import Run

    with ranks.turn(), Run(first.recipe(recipe), out / first.folder, resume=True) as run:
        for sparsity in sorted(others):
            even_plan(run.units, Point(first.seed, sparsity, None).recipe(recipe).structure)


def _compare_at(
    recipe: Recipe, point: Point, out: Path, before: Sequence[Point]
) -> tuple[list[Row], list[str]]:
    """The rows of one sub-run, and what its report warns of."""
    folder = out / point.folder
    finished = folder / ROWS
    asked = [row.model_dump(mode="json", exclude_none=True) for row in recipe.compare]

    def there() -> tuple[list[Row], list[str]] | None:
        """The rows, if they are those that the recipe asks for by now."""
        found = read_json(finished) if finished.exists() else None
        if not isinstance(found, dict) or found.get("compare") != asked or found.get("point") != vars(point):
            return None
        for row in found["rows"]:
            row.update({key: infinite(row[key]) for key in ("perplexity", "nll")})
        return found["rows"], found.get("warnings", [])

    if not ranks.agree(there() is not None):
        from koff_prune.api import compare
        from koff_prune.run import Run

        mine = point.recipe(recipe)
        with ranks.turn(), Run(mine, folder, resume=True) as run:
            # of the same budget first: their texts need not be read again
            for other in sorted(before, key=lambda other: other.tokens != point.tokens):
                if other.seed == point.seed and _is_of(run, out, other, point):
                    share(out / other.folder, folder, same_budget=other.tokens == point.tokens)
        rows = compare(mine, folder, resume=True)
        with ranks.turn():
            if there() is None:
                warnings = read_json(folder / "report.json")["warnings"]
                write_json(
                    finished,
                    finite({"point": vars(point), "compare": asked, "rows": rows, "warnings": warnings}),
                )
    found = there()
    assert found is not None
    return found


def _is_of(run: Run, out: Path, other: Point, point: Point) -> bool:
    """Whether a sub-run's files hold for `run` too: they are of its weights, its texts, its versions.

    Raises:
        KoffError: The model or a text has changed since the sub-run began: one sweep is of one.
    """
    source = out / other.folder
    theirs, mine = read_json(source / "run.json"), {"weights": run.dense.fingerprint}
    changed = ["model.source"] if theirs.get("weights", mine["weights"]) != mine["weights"] else []
    if other.tokens != point.tokens:  # else the texts, as they were read there, are shared too
        from koff_prune.domains import load_blocks

        for name, blocks in run.domains.items():
            path = source / "domains" / f"{name}.safetensors"
            if path.exists() and load_blocks(path).digest != blocks.digest:
                changed.append(f"domains.{name}.source")
    if changed:
        raise KoffError(
            f"{out}: what {' and '.join(changed)} names has changed since {other.folder} began; choose"
            " another --out"
        )
    mine = read_json(run.folder / "run.json")
    return all(theirs.get(key) == mine.get(key) for key in ("dtype", "versions"))


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
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(path, place)
            elif path.is_dir():
                recover(place)
                if not place.exists():
                    with staged_dir(place) as aside:
                        shutil.copytree(path, aside, copy_function=_link, dirs_exist_ok=True)


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
