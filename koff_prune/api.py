"""One function per command. Each opens the run directory, does its stage, and leaves files behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from koff_export.errors import KoffError
from koff_prune import ranks
from koff_prune.analyze import analyze as analyze
from koff_prune.arms import main_arm
from koff_prune.bundling import write_bundle
from koff_prune.chat import tokens
from koff_prune.compare import compare as _compare
from koff_prune.learn import check_processes
from koff_prune.needs import (
    check_context,
    check_formats,
    check_merge,
    check_steps,
    check_vocabulary,
    dry_plan,
)
from koff_prune.plan import even_plan
from koff_prune.progress import say
from koff_prune.quantise import check_installed
from koff_prune.reading import load_recipe
from koff_prune.recipe import Recipe
from koff_prune.run import Run, finished_run
from koff_prune.stages import cut_arm, learn_arm, plan_arm
from koff_prune.sweep import sweep as _sweep


def _open(recipe: Recipe | str | Path, out: str | Path | None, resume: bool) -> Run:
    if isinstance(recipe, Recipe):
        if out is None:
            raise KoffError("out: name a folder for the run")
        return Run(recipe, Path(out), resume=resume)
    return Run(load_recipe(recipe), Path(out or Path("runs") / Path(recipe).stem), resume=resume)


def learn(recipe: Recipe | str | Path, out: str | Path | None = None, *, resume: bool = False) -> Path:
    """Joint training of gates and memories: gates.safetensors, learned/<domain>/."""
    with _open(recipe, out, resume) as run:
        _prepare(run)
        learn_arm(run, main_arm(run), run.folder)
        return run.folder


def plan(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    dry_run: bool = False,
) -> Any:
    """Gates to plan.json (learning first where needed), or with `dry_run` what would be cut.

    Returns:
        The Plan; with `dry_run` a mapping of `units`, `plan` and `config`.
    """
    if dry_run:
        return dry_plan(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, check_files=False))
    with _open(recipe, out, resume) as run:
        _prepare(run)
        learn_arm(run, main_arm(run), run.folder)
        return plan_arm(run, main_arm(run), run.folder)


def cut(recipe: Recipe | str | Path, out: str | Path | None = None, *, resume: bool = False) -> Path:
    """Plan to backbone/ and settled memories/<domain>/ (earlier stages first where needed)."""
    with _open(recipe, out, resume) as run:
        _cut(run)
        if run.recipe.cut.recover is not None:
            say("what was recovered lies beside backbone/; the export puts it in: use bundle/")
        return run.folder


def _prepare(run: Run) -> None:
    # the cheap mistakes first: too short a text or a target out of reach is told before anything is trained
    check_processes(run.recipe.learn)
    if run.recipe.learn.base == "nf4":
        check_installed()
    check_steps(run.recipe.learn, run.recipe.step_batches)
    check_vocabulary(run.units, run.recipe.structure)
    even_plan(run.units, run.recipe.structure)
    check_formats(run.recipe, run.dense.config.to_dict())
    if "gguf" in run.recipe.export.formats:
        from koff_export.gguf import check_tokenizer

        check_tokenizer(run.dense.tokenizer)
    check_context(run.recipe, run.dense.config.max_position_embeddings)
    longest = max((row.kv_tokens or 0 for row in run.recipe.compare), default=0)
    for name, blocks in run.domains.items():
        if longest > (there := tokens(blocks.train).numel()):
            raise KoffError(
                f"compare: kv_tokens {longest} begins as so much training text, and domain {name} has {there}"
                " tokens of it: lower it, or raise learn.tokens"
            )


def _cut(run: Run) -> None:
    _prepare(run)
    arm = main_arm(run)
    learn_arm(run, arm, run.folder)
    plan_arm(run, arm, run.folder)
    cut_arm(run, arm, run.folder, keep_backbone=True)


def export(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    merge: str | None = None,
) -> Path:
    """Backbone and memories to bundle/, or with one memory merged to bundle-<domain>/."""
    with _open(recipe, out, resume) as run:
        check_merge(run.recipe, merge)
        _cut(run)
        with ranks.turn():
            return write_bundle(run, merge)


def compare(
    recipe: Recipe | str | Path, out: str | Path | None = None, *, resume: bool = False
) -> list[dict[str, Any]]:
    """Every row of the report: report.json and report.html (earlier stages first where needed)."""
    with _open(recipe, out, resume) as run:
        _cut(run)
        return _compare(run)


def sweep(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    sparsities: Sequence[float] = (),
    seeds: Sequence[int] = (),
    tokens: Sequence[int] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """`compare` at every combination of the lists; see `sweep.sweep`."""
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return _sweep(checked, Path(out), sparsities=sparsities, seeds=seeds, tokens=tokens, resume=resume)


def apply(recipe: Recipe | str | Path, out: str | Path | None = None, *, resume: bool = False) -> Path:
    """The whole road: learn, plan, cut, compare, export.

    Args:
        recipe: Checked, or the path of a YAML file.
        out: The run directory; default runs/<name of the recipe>.
        resume: Continue a run of the same recipe there.

    Returns:
        The run directory.

    Raises:
        KoffError: A mistake that the user can mend.
    """
    with _open(recipe, out, resume) as run:
        check_merge(run.recipe, None)
        _cut(run)
        _compare(run)
        with ranks.turn():
            write_bundle(run)
        return run.folder


def tasks(
    folder: str | Path,
    names: Sequence[str] = (),
    *,
    limit: int = 100,
    memories: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Scores multiple-choice and cloze tasks on a finished run; see `tasks.run_tasks`."""
    from koff_prune.tasks import TASKS, run_tasks

    with finished_run(Path(folder)) as run:
        around = cut_arm(run, main_arm(run), run.folder, keep_backbone=True)
        return run_tasks(run, around, list(names) or list(TASKS), limit=limit, who=memories)


def set_device(name: str | None) -> str:
    """Where models compute; see `device.use`. Returns what was chosen."""
    from koff_prune import device

    device.use(name)
    return str(device.device())


def set_threads(threads: int | None) -> None:
    """How many processor cores torch may use; results are repeatable for an equal number."""
    if threads is not None:
        torch.set_num_threads(threads)
