"""The stages of a run: learn, plan, cut. Each reads files, writes files, and can be run again at any time.

A row of the comparison takes the same stages in a folder of its own; a baseline differs from koff in how its
plan is made and in nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from koff_export.errors import KoffError
from koff_export.files import read_json, staged_dir, write_json
from koff_prune import ranks
from koff_prune.arms import Arm
from koff_prune.chat import tokens
from koff_prune.checkpoints import newest_checkpoint, read_log, step_of
from koff_prune.compensate import Compensation
from koff_prune.cut import copy_tokenizer, cut, cut_on_disk, load_backbone, save_backbone, slice_memory
from koff_prune.device import on_device
from koff_prune.domains import learned_tokens
from koff_prune.evaluate import mean_nats, window_losses
from koff_prune.gates import RE_ESTIMATED, Gates
from koff_prune.learn import Phase, spends, train
from koff_prune.memory import Memories, load_memory, save_memory
from koff_prune.needs import steps_of, steps_of_both
from koff_prune.pages import finite, infinite
from koff_prune.plan import Plan, Scores, make_plan
from koff_prune.progress import bar, say
from koff_prune.recipe import COSTS, CompareRow, Learn, Memory, MemoryKind
from koff_prune.recipe import Gates as GatesSection
from koff_prune.scores import removal_costs, score_units
from koff_prune.seals import check_seal, seal
from koff_prune.tensor_file import load_tensors, save_tensors
from koff_prune.units import KINDS

if TYPE_CHECKING:
    from koff_prune.run import Run


def arm_of(row: CompareRow, run: Run) -> Arm:
    """What a row of `compare` asks for, the recipe filling the gaps."""
    recipe = run.recipe
    trained: Any = recipe.memory.kind if row.trained_with == "same" else row.trained_with
    if row.method == "dense":
        return Arm("dense", trained_with=trained)
    compensate = row.compensate or recipe.cut.compensate
    if row.method == "koff":
        gates = recipe.learn.gates.of_row(row)
        learned = recipe.memory.kind if row.learned_with is None else row.learned_with
        return Arm(
            "koff", None, gates.form, gates.learning_rate, gates.start, learned, trained, compensate,
            row.lora_rank, row.kv_tokens,
        )  # fmt: skip
    ranking: str = row.ranking or "global"
    if ranking == "better":
        ranking = better_ranking(run, row.method, compensate)
    return Arm(row.method, ranking, trained_with=trained, compensate=compensate)


def compensation(run: Run, arm: Arm) -> Compensation | None:
    """The closed-form solve of an arm, or None."""
    if arm.compensate == "none":
        return None
    return Compensation(run.statistics.second, run.recipe.cut.ridge, run.units)


def baseline_scores(run: Run, method: str) -> Scores:
    """Scores of the dense model's units."""
    statistics = None if method in ("magnitude", "random") else run.statistics
    dense, seed = run.dense, run.recipe.seed
    return score_units(
        method, dense.outline(), run.units, run.recipe.structure, statistics, seed, dense.weights
    )


def better_ranking(run: Run, method: str, compensate: str) -> str:
    """Global or per_layer: the one whose bare loss on the scoring text is lower; kept on disk."""
    path = run.folder / "rows" / f"{method}_{compensate}_rankings.json"
    with ranks.turn():
        if not path.exists():
            losses = {}
            total = 2 * sum(b.scoring.numel() for b in run.domains.values())
            with bar(f"ranking {method}", total) as progress:
                for ranking in ("global", "per_layer"):
                    arm = Arm(method, ranking, compensate=compensate)
                    model = _cut_model(run, arm, plan_arm(run, arm, run.folder / "rows" / arm.slug))
                    bare = Memories(
                        on_device(model), Memory(lora=None, kv=None), {}, 0, own=run.dense.own
                    )  # none has a memory; what a domain has is its own tokens
                    losses[ranking] = sum(
                        mean_nats(window_losses(bare, b.scoring, name, progress), learned_tokens(b.scoring))
                        for name, b in run.domains.items()
                    )
            write_json(path, finite(losses))
        found: dict[str, float] = infinite(read_json(path))
    if set(found) != {"global", "per_layer"}:
        raise KoffError(f"{path}: is damaged; remove it, and --resume makes it again")
    return min(found, key=found.__getitem__)


def memories_around(run: Run, model: Any, arm: Arm, kind: MemoryKind) -> Memories:
    """Untrained memories of the named kind for every domain of the recipe, and what they recover together."""
    memory = arm.memory(run.recipe, kind)
    count = memory.kv.tokens if memory.kv else 0
    prefills = {
        # an arm's own longer cache begins with more of the same text
        name: b.prefill[:count] if count <= len(b.prefill) else tokens(b.train).reshape(-1)[:count]
        for name, b in run.domains.items()
    }
    recover = run.recipe.cut.recover if kind != "none" else None
    return Memories(on_device(model), memory, prefills, run.recipe.seed, recover, run.dense.own)


def train_windows(run: Run) -> dict[str, torch.Tensor]:
    """Training windows per domain."""
    return {name: blocks.train for name, blocks in run.domains.items()}


def start_of(arm: Arm) -> str | None:
    """What an arm's gates begin from: without compensation, `curvature` is what is left of `surgeon`."""
    return "curvature" if arm.compensate == "none" and arm.gates_start == "surgeon" else arm.gates_start


def learn_arm(run: Run, arm: Arm, folder: Path) -> None:
    """Joint training: writes gates.safetensors and learned/<domain>/ (around the dense model)."""
    if ranks.agree((folder / "gates.safetensors").exists()):
        return
    recipe = run.recipe
    update = {"form": arm.gates, "learning_rate": arm.gates_rate, "start": arm.gates_start}
    gates_section = recipe.learn.gates.model_copy(update=update)
    learn = recipe.learn.model_copy(update={"gates": gates_section})
    gates_section = gates_section.model_copy(update={"start": start_of(arm)})
    start, prior, information = _start(run, gates_section)
    scored = sum(int((b.scoring >= 0).sum()) for b in run.domains.values())  # not what is read alone
    gates = Gates(
        run.units, recipe.structure, gates_section.form, start, recipe.seed, prior, scored, information
    )
    kind = arm.learned_with or "none"
    memories = None
    if kind != "none" or steps_of(learn.tokens, learn, recipe.step_batches):  # else nobody needs the model
        memories = memories_around(run, run.fresh(), arm, kind)
        train_logged(
            run, memories, train_windows(run), learn, Phase(learn.tokens, 0.0, _joint_share(learn)), folder,
            "learning", gates=gates, compensation=compensation(run, arm),
        )  # fmt: skip
    with ranks.turn():
        if not (folder / "gates.safetensors").exists():
            _save_learned(run, arm, folder, gates, memories, start)


def _save_learned(
    run: Run, arm: Arm, folder: Path, gates: Gates, memories: Memories | None, start: Scores | None
) -> None:
    """gates.safetensors, last of all, says that the joint training is finished."""
    tensors = {"alpha": gates.alpha.detach(), "start": torch.empty(0)}
    if start is not None:
        before = Gates(run.units, run.recipe.structure, gates.form, start, run.recipe.seed)
        tensors["start"] = before.alpha.detach()
        shared = overlap(before, gates)
        say(f"learning moved the mask: {shared:.1%} of the removed units were the start's choice")
    if memories is not None and memories.memory.kind != "none":
        _save_memories(run, memories, folder / "learned")
    save_tensors(tensors, folder / "gates.safetensors")
    _drop_checkpoints(folder)


def _load_learned(memories: Memories, name: str, run: Run, folder: Path, plan: Plan) -> None:
    place = folder / "learned" / name
    try:
        memories.load(name, slice_memory(load_memory(place), plan, run.units))
    except KoffError as error:
        gates = folder / "gates.safetensors"
        raise KoffError(
            f"{place}: is missing or damaged; remove {gates}, and --resume learns it again"
        ) from error


def _start(run: Run, gates: GatesSection) -> tuple[Scores | None, float | None, Scores | None]:
    """What gates begin from, and of re-estimated ones prior_tokens and information (None where they stay)."""
    if gates.start == "constant":
        return None, None, None
    if gates.start not in COSTS:
        return baseline_scores(run, gates.start), None, None

    start = _costs(run, gates.start)
    if gates.form != RE_ESTIMATED or gates.learning_rate == 0:
        return start, None, None
    return start, gates.prior_tokens, _costs(run, "curvature") if gates.start == "surgeon" else None


def _costs(run: Run, method: str) -> Scores:
    """Costs of removal; the surgeon's take minutes, and are kept on disk for all arms and sparsities."""
    structure, ridge, statistics = run.recipe.structure, run.recipe.cut.ridge, run.statistics
    if method != "surgeon":
        return removal_costs(method, run.dense.model, run.units, structure, statistics, ridge)
    path = run.folder / "costs-surgeon.safetensors"
    with ranks.turn():
        if not path.exists():
            say("surgeon: the cost of every unit at its turn …")
            with run.timed("surgeon"):
                found = removal_costs(method, run.dense.model, run.units, structure, statistics, ridge)
            save_tensors({f"{kind}.{i}": t for kind in KINDS for i, t in enumerate(found[kind])}, path)
        flat = load_tensors(path)
    layers = range(len(run.units.layers))
    return {kind: [flat[f"{kind}.{i}"] for i in layers if kind in structure.units] for kind in KINDS}


def _joint_share(learn: Learn) -> float:
    """Share of all training tokens that the joint phase takes."""
    return learn.tokens / max(1, learn.tokens + learn.settle_tokens)


def overlap(a: Gates, b: Gates) -> float:
    """Share of the units removed under b that are removed under a too."""
    gone_a, gone_b = ~a.mask(a.kept()), ~b.mask(b.kept())
    return float((gone_a & gone_b).sum() / gone_b.sum().clamp_min(1))


def load_gates(run: Run, arm: Arm, folder: Path, which: str = "alpha") -> Gates:
    """The gates that `learn_arm` left: `alpha` as learned, or `start` as they began."""
    gates = Gates(run.units, run.recipe.structure, str(arm.gates), None, run.recipe.seed)
    with torch.no_grad():
        gates.alpha.copy_(load_tensors(folder / "gates.safetensors")[which])
    return gates


def plan_arm(run: Run, arm: Arm, folder: Path) -> Plan:
    """Gates or a baseline's scores to plan.json."""
    path, structure = folder / "plan.json", run.recipe.structure
    with ranks.turn():
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            ranking = arm.ranking or ("per_layer" if structure.widths == "uniform" else "global")
            if arm.method == "koff":
                scores = load_gates(run, arm, folder).scores()
            else:
                scores = baseline_scores(run, arm.method)
            plan = make_plan(
                scores, run.units, structure, model=run.model_identity, method=arm.method, ranking=ranking
            )
            plan.save(path)
        plan = Plan.load(path)
    plan.check_made_for(path, structure, run.model_identity, arm.method)
    plan.check_fits(run.units)
    return plan


def _write_backbone(run: Run, arm: Arm, plan: Plan, folder: Path) -> None:
    """Layer by layer where the dense weights can be read so, else through memory."""
    dense, solve, limit = run.dense, compensation(run, arm), run.recipe.export.shard_bytes
    if dense.weights is None:
        save_backbone(cut(dense.take(), plan, solve), folder, limit)
    else:
        cut_on_disk(dense.skeleton, dense.weights, plan, folder, solve, limit)
    copy_tokenizer(dense.tokenizer, folder)
    dense.copy_licences(folder)


def _cut_model(run: Run, arm: Arm, plan: Plan | None) -> Any:
    solve = None if plan is None else compensation(run, arm)
    model = run.fresh()
    return model if plan is None else cut(model, plan, solve)


def cut_arm(run: Run, arm: Arm, folder: Path, *, keep_backbone: bool = False) -> Memories:
    """Cuts the dense model, slices the memories, settles them, and saves them as memories/<domain>/.

    Args:
        run: The run.
        arm: Which way.
        folder: Of the arm.
        keep_backbone: Write backbone/ too.

    Returns:
        The backbone with the arm's trained memories, none active.
    """
    learn = run.recipe.learn
    plan = None if arm.method == "dense" else plan_arm(run, arm, folder)
    backbone = folder / "backbone"
    with ranks.turn():
        if keep_backbone and backbone.exists():
            check_seal(backbone, str(backbone))
        elif keep_backbone and plan is not None:
            with staged_dir(backbone) as aside:
                _write_backbone(run, arm, plan, aside)
                seal(aside, backbone.name)

    def untrained() -> Memories:
        model = load_backbone(backbone) if keep_backbone else _cut_model(run, arm, plan)
        return memories_around(run, model, arm, arm.trained_with)

    memories = untrained()
    if arm.trained_with == "none":
        return memories
    done = folder / "memories"
    if not ranks.agree(done.exists()):
        if arm.method == "koff" and arm.learned_with == arm.trained_with and plan is not None:
            check_seal(folder / "learned", str(folder / "gates.safetensors"))
            for name in memories.names:
                _load_learned(memories, name, run, folder, plan)
            first, settling = steps_of_both(learn, batches := run.recipe.step_batches)
            phase = Phase(settling * learn.window * learn.batch * batches, _joint_share(learn), 1.0)
            label = "settling"
        else:
            phase, first, label = Phase(learn.tokens + learn.settle_tokens, 0.0, 1.0), 0, "training memories"
        train_logged(run, memories, train_windows(run), learn, phase, folder, label, first=first)
        with ranks.turn():
            if not done.exists():
                _save_memories(run, memories, done)
        if spends(learn):
            del memories
            memories = untrained()  # around the model as it was
    if not ranks.rank():
        _drop_checkpoints(folder)  # also after a kill between the memories and this line
    check_seal(done, str(done))
    for name in memories.names:
        memories.load(name, load_memory(done / name))
    return memories


def _save_memories(run: Run, memories: Memories, place: Path) -> None:
    with staged_dir(place) as aside:
        for name in memories.names:
            save_memory(aside / name, memories.tensors(name), memories.section(name), run.dense.source)
        seal(aside, place.name)


def _drop_checkpoints(folder: Path) -> None:
    """What a finished stage no longer needs; its log stays."""
    for pattern in ("*/checkpoint-*", "*/.writing"):
        for old in (folder / "checkpoints").glob(pattern):
            shutil.rmtree(old)


def train_logged(
    run: Run,
    memories: Memories,
    windows: Mapping[str, torch.Tensor],
    learn: Learn,
    phase: Phase,
    folder: Path,
    label: str,
    **options: Any,
) -> list[dict[str, Any]]:
    """`learn.train` with a progress bar, a log (log.json in the arm's folder) and its seconds."""
    place = folder / "checkpoints" / label.replace(" ", "-")
    steps = steps_of(phase.tokens, learn, batches := run.recipe.step_batches)
    step_tokens = learn.window * learn.batch * batches
    with ranks.turn():
        newest = newest_checkpoint(place)
    begun = step_of(newest) if newest else 0
    log = [entry for entry in read_log(place) if entry["step"] <= begun]
    with bar(label, steps * step_tokens) as progress, run.timed(label, folder):
        progress.start_at(begun * step_tokens)

        def report(step: int, loss: float, sparsity: float | None) -> None:
            note = f"loss {loss:.3f}" + (f" sparsity {sparsity:.3f}" if sparsity is not None else "")
            progress(step_tokens, note)
            log.append({"phase": label, "step": step, "loss": round(loss, 5), "sparsity": sparsity,
                        "tokens_per_second": round(progress.rate, 1)})  # fmt: skip
            if step % learn.checkpoint_steps == 0:
                save()

        def save() -> None:
            if log and not ranks.rank():
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / "log.json", log)

        try:
            train(
                memories, windows, learn, phase, place, report=report, seed=run.recipe.seed,
                sparsity=run.recipe.structure.sparsity,
                weights={n: d.weight for n, d in run.recipe.domains.items()}, **options,
            )  # fmt: skip
        finally:
            save()  # an interruption saves its step too
    return log
