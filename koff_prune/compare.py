"""The rows of the report: what the recipe's `compare` asks for, each through the same stages as koff."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koff_export.files import read_json
from koff_prune import ranks
from koff_prune.arms import Arm, main_arm
from koff_prune.checkpoints import read_log
from koff_prune.evaluate import perplexities
from koff_prune.leaks import sentences, shared_text
from koff_prune.losses import heldout_counts, losses_of, trimmed_losses
from koff_prune.memory import kind_of, load_memory
from koff_prune.needs import steps_of_both
from koff_prune.report import render_table, write_report
from koff_prune.run import versions
from koff_prune.stages import (
    arm_of,
    learn_arm,
    load_gates,
    overlap,
    plan_arm,
    start_of,
)  # fmt: skip
from koff_prune.units import token_parameters

if TYPE_CHECKING:
    from pathlib import Path

    from koff_prune.run import Run


def compare(run: Run) -> list[dict[str, Any]]:
    """Finishes every row that is not finished yet and writes report.json and report.html.

    Returns:
        The rows, in the order of the report: dense, koff, koff with its memories off, then what `compare`
        asks for.
    """
    rows = [
        _row(run, Arm("dense"), _place(run, Arm("dense")), attached=False),
        _row(run, main_arm(run), run.folder, attached=run.recipe.memory.kind != "none"),
    ]
    if run.recipe.memory.kind != "none":
        rows.append(_row(run, main_arm(run), run.folder, attached=False))
    seen = {(main_arm(run), True), (main_arm(run), False), (Arm("dense"), False)}
    answers: dict[tuple[Arm, bool], list[str]] = {}
    for asked in run.recipe.compare:
        arm = arm_of(asked, run)
        attached = arm.trained_with != "none"
        ranking = asked.ranking or arm.ranking
        if ranking is not None and ranking not in answers.setdefault((arm, attached), []):
            answers[arm, attached].append(ranking)
        if (arm, attached) in seen:
            continue
        seen.add((arm, attached))
        place = _place(run, arm)
        if arm.method == "koff":
            learn_arm(run, arm, place)
        rows.append(_row(run, arm, place, attached=attached))
        if (arm, attached) in answers:
            rows[-1]["asked"] = answers[arm, attached]  # one list, which later rows add to
        if arm.method == "dense" and run.recipe.cut.recover is not None:  # what `offloaded` begins from
            rows.append(_row(run, arm, place, attached=False))
    with ranks.turn():
        if not ranks.rank():
            _write(run, rows)
    return rows


def _place(run: Run, arm: Arm) -> Path:
    return run.folder if arm == main_arm(run) else run.folder / "rows" / arm.slug


def _row(run: Run, arm: Arm, folder: Path, *, attached: bool) -> dict[str, Any]:
    """One row of report.json, computed or read back."""
    recipe = run.recipe
    losses = losses_of(run, arm, folder, attached, main=folder == run.folder)
    plan = None if arm.method == "dense" else plan_arm(run, arm, folder)
    learn, batches = recipe.learn, recipe.step_batches
    joint_steps, settling = steps_of_both(learn, batches)
    learned, settled, alone = (
        steps * learn.window * learn.batch * batches
        for steps in (joint_steps, settling, joint_steps + settling)
    )
    joint = arm.method == "koff" and arm.learned_with == arm.trained_with
    size = 0
    kind = "none"
    if attached:
        first = load_memory(folder / "memories" / next(iter(run.domains)))
        kind = kind_of(first)
        size = sum(t.numel() for part in first.values() for t in part.values()) + own_parameters(run)
    needs_scores = arm.method not in ("dense", "magnitude", "random") or arm.compensate != "none"
    counts = heldout_counts(run)
    times = read_json(folder / "times.json") if (folder / "times.json").exists() else {}
    tokens = {
        "score": sum(b.scoring.numel() for b in run.domains.values()) if needs_scores else 0,
        "learn": learned if arm.method == "koff" else 0,
        "settle": 0 if arm.trained_with == "none" else settled if joint else alone,
    }
    units, of = run.units, recipe.structure.of
    gone, backbone = units.gone(of) / units.denominator(of), units.parameters
    if arm == Arm("dense"):  # this row alone has every token
        gone, backbone = 0.0, units.denominator("total")
    row: dict[str, Any] = {
        "method": arm.method,
        "ranking": arm.ranking,
        "gates": arm.gates,
        "compensate": arm.compensate,
        "learned_with": arm.learned_with,
        "trained_with": None if arm.method == "dense" and arm.trained_with == "none" else arm.trained_with,
        "memory": kind,
        "swap": None,
        "sparsity": {
            "target": plan.target if plan else 0.0,
            "realised": plan.realised if plan else gone,
            "of": of,
        },
        "plan": plan.digest if plan else None,
        "seed": recipe.seed,
        "tokens": tokens,
        "perplexity": perplexities(losses, counts),
        "eval": {"window": recipe.evaluate.window,
                 "tokens_per_domain": min(b.heldout.numel() for b in run.domains.values())},
        "parameters": {"backbone": plan.parameters["slim"] if plan else backbone, "memory": size},
        "seconds": round(sum(times.values()), 1),
        "nll": losses,
        "counts": counts,
        "documents": {name: b.heldout_documents for name, b in run.domains.items()},
    }  # fmt: skip
    if arm.gates:
        said = []
        if arm.gates_start != recipe.learn.gates.start:
            said.append(f"from {arm.gates_start}")
        if arm.gates_rate != recipe.learn.gates.learning_rate:
            said.append(
                "gates not learned" if arm.gates_rate == 0 else f"gate learning rate {arm.gates_rate:g}"
            )
        said += [f"LoRA rank {arm.lora_rank}"] if arm.lora_rank else []
        said += [f"KV of {arm.kv_tokens}"] if arm.kv_tokens else []
        if said:
            row["note"] = ", ".join(said)
    return row


def own_parameters(run: Run) -> int:
    """What a memory's own tokens weigh, in the mean over the domains."""
    own, dense = run.dense.own, run.dense.config
    return round(own.mean_count() * token_parameters(dense)) if own is not None else 0


def _write(run: Run, rows: list[dict[str, Any]]) -> None:
    recipe, arm = run.recipe, main_arm(run)
    gates = load_gates(run, arm, run.folder)
    shared = None
    if recipe.learn.gates.start != "constant":
        start = load_gates(run, arm, run.folder, "start")
        removed = int((~gates.mask(gates.kept())).sum())
        shared = {"start": start_of(arm), "share": overlap(start, gates), "removed": removed}
    plans = {"dense": [layer.ffn_neurons for layer in run.units.layers],
             "koff": plan_arm(run, arm, run.folder).widths_of("ffn_neurons")}  # fmt: skip
    for asked in recipe.compare:
        other = arm_of(asked, run)
        if other.method not in ("dense", "koff"):
            name = f"{other.method} ({other.ranking})"
            plans.setdefault(name, plan_arm(run, other, _place(run, other)).widths_of("ffn_neurons"))
    log: list[dict[str, Any]] = []
    for phase in ("learning", "settling"):
        log += read_log(run.folder / "checkpoints" / phase)
    begun, now = read_json(run.folder / "run.json")["versions"], versions()
    changed = [f"{name} {begun.get(name)} to {v}" for name, v in now.items() if begun.get(name) != v]
    notes = sentences(shared_text(run.domains, run.dense.in_common))
    notes += [f"Rows were made under different versions: {', '.join(changed)}."] if changed else []
    write_report(
        run.folder,
        model=run.model_identity,
        recipe_digest=run.digest,
        versions=begun,
        rows=rows,  # type: ignore[arg-type]
        notes=notes,
        remarks=[_vocabulary(run, rows[0])] if recipe.structure.vocabulary is not None else [],
        overlap=shared,
        plans=plans,
        log=log,
    )


def _vocabulary(run: Run, dense: dict[str, Any]) -> str:
    """How many tokens stay, and what those that leave cost alone."""
    whole, kept, own = run.whole.config.vocab_size, run.dense.config.vocab_size, run.dense.own
    counts = heldout_counts(run)
    found = perplexities(trimmed_losses(run, attached=own is not None), counts)["gmean"]
    share = f"{run.units.trimmed / run.units.denominator('total'):.1%} of all parameters"
    told, bare = f"{kept:,} of {whole:,} tokens stay ({share} leave with the others): that alone", ""
    if own is not None:
        each = ", ".join(f"{name} {own.count(name):,}" for name in own.spans)
        told = (
            f"{own.shared:,} of {whole:,} tokens stay in the backbone ({share} leave it with the others), and"
            f" memories have tokens of their own ({each}): having these alone"
        )
        bare = f", and the backbone's alone {perplexities(trimmed_losses(run), counts)['gmean']:.2f}"
    return (
        f"{told} makes the dense model's perplexity {found:.2f} instead of"
        f" {dense['perplexity']['gmean']:.2f}{bare}. Perplexities are by the dense model's own tokens."
    )


__all__ = ["compare", "render_table"]
