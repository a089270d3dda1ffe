"""The points of a sweep: which seeds, sparsities and budgets one recipe is run at. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from koff_export.errors import KoffError
from koff_prune.recipe import SEED, Recipe


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
    for name, values, low, high, allowed in (
        ("--sparsity", sparsities, 0.0, 1.0, "above 0 and below 1"),
        ("--seed", seeds, -1.0, 2.0**31, "from 0 to 2,147,483,647"),
        ("--tokens", tokens, 0.0, 2.0**62, "from 1 on"),
    ):
        for value in values:
            if not low < value < high:
                raise KoffError(f"{name}: {value} is out of range; name values {allowed}")
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
