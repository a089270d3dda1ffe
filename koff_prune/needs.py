"""The arithmetic of what learning needs: parameters, bytes, floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from koff_export.errors import KoffError
from koff_export.limits import check_fused, check_gguf, check_portable
from koff_prune.architecture import Units, config_of, native_dtype, units_of_config
from koff_prune.plan import TOLERANCE, Plan, even_plan
from koff_prune.recipe import Learn, Lora, Recipe, Structure

NOT_BOTH = "learn.base: {} cannot be shared out too; leave --shard away, or set full"
LOGITS = {"cpu": 2**24}  # bytes of float32 logits that exist at one time: on a CPU, as few as cost no speed
ROOMY = 2**27  # elsewhere, where a product of few rows wastes the device
FEWEST = 64  # rows, however large the vocabulary: every product reads the whole head
TRAINED = 16  # bytes of a trained number: itself, its gradient, Adam's two moments; float32
NF4 = 0.516  # bytes of a number in 4 bits and its share of a block's scale (Dettmers et al. 2023)
PROGRAM = 450 * 2**20  # bytes of the imported libraries, on the host
GATED = 40  # bytes of a gate: the same, and what re-estimated ones gather


def logit_rows(vocabulary: int, device: str = "cuda", teacher: bool = False) -> int:
    """Tokens whose logits, and a teacher's beside them, the loss computes at one time on such a device."""
    rows = LOGITS.get(device, ROOMY) / (4 * vocabulary * (1.5 if teacher else 1.0))
    return max(FEWEST, math.ceil(rows / 32) * 32)  # other counts are slower to multiply


def dry_plan(recipe: Recipe) -> dict[str, Any]:
    """`units`, an even `plan` and `config` (a mapping), from the model's config alone."""
    config = config_of(recipe.model)
    if isinstance(context := config.get("max_position_embeddings"), int):
        check_context(recipe, context)
    check_steps(recipe.learn, recipe.step_batches)
    check_formats(recipe, config)
    units = units_of_config(config)
    try:
        plan = even_plan(units, recipe.structure)
    except KoffError as error:
        if recipe.structure.vocabulary is None:
            raise
        raise KoffError(f"{error}; what structure.vocabulary takes is known when the text is read") from error
    return {"units": units, "plan": plan, "config": config}


def steps_of(tokens: int, learn: Learn, batches: int) -> int:
    """Optimizer steps of so many micro-batches that `tokens` over all domains make, to the nearest."""
    return int(tokens / (learn.window * learn.batch * batches) + 0.5)


def steps_of_both(learn: Learn, batches: int) -> tuple[int, int]:
    """Steps of joint learning and of settling, together as many as a rival's one training of all tokens."""
    joint = steps_of(learn.tokens, learn, batches)
    return joint, steps_of(learn.tokens + learn.settle_tokens, learn, batches) - joint


def check_steps(learn: Learn, batches: int) -> None:
    """Whether tokens that were asked for make a step at all.

    Raises:
        KoffError: They do not.
    """
    step = learn.window * learn.batch * batches
    asked = {"learn.tokens": learn.tokens, "learn.settle_tokens": learn.settle_tokens}
    for (key, tokens), steps in zip(asked.items(), steps_of_both(learn, batches), strict=True):
        if tokens and not steps:
            raise KoffError(
                f"{key}: {tokens} make no step of {step} tokens (learn.window {learn.window} x learn.batch"
                f" {learn.batch} x the {batches} that the domains' weights sum up to): raise it, lower one of"
                " these, or set 0"
            )


def check_vocabulary(units: Units, structure: Structure) -> None:
    """Raises KoffError where more leaves with tokens than is to be removed at all."""
    share = units.gone(structure.of) / units.denominator(structure.of)
    if share > structure.sparsity + TOLERANCE:
        raise KoffError(
            f"structure.sparsity {structure.sparsity}: {share:.4f} of {structure.of} leave with tokens alone"
            f" (structure.vocabulary {structure.vocabulary}); raise it, or the other, or set `of: blocks`"
        )


def check_merge(recipe: Recipe, merge: str | None) -> None:
    """Whether there is such a memory to bake in, and what is asked for holds memories as they are without.

    Raises:
        KoffError: There is not, or it does not.
    """
    if merge is None and recipe.memory.tokens:
        asked = {"export.formats: gguf": "gguf" in recipe.export.formats,
                 "export.onnx.javascript": recipe.export.onnx.javascript}  # fmt: skip
        if key := next((key for key, there in asked.items() if there), None):
            raise KoffError(
                f"{key} takes no memories with tokens of their own (memory.tokens); leave it out, or export"
                " one merged memory with --merge"
            )
    if merge is not None and recipe.memory.kind == "none":
        raise KoffError(f"--merge {merge}: the recipe has no memories (`memory`); leave --merge out")
    if merge is not None and merge not in recipe.domains:
        known = ", ".join(recipe.domains)
        raise KoffError(f"--merge {merge}: the recipe has no such domain; it has {known}")


def check_formats(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Whether the formats that are asked for can hold the model.

    Args:
        recipe: Checked.
        config: The dense model's config.json.

    Raises:
        KoffError: One cannot; names the key.
    """
    export, structure = recipe.export, recipe.structure
    if "onnx" in export.formats:
        check_portable(config)
        if "fused" in export.onnx.profiles:
            check_fused(config)
    if "gguf" in export.formats:
        check_gguf(
            config,
            per_layer=structure.widths == "per_layer",
            whole_heads="kv_groups" not in structure.units,
        )


def check_context(recipe: Recipe, context: int) -> None:
    """Whether windows, and learned caches in front of them, have positions.

    Raises:
        KoffError: They have not; names the key.
    """
    windows = {
        "learn.window": recipe.learn.window,
        "evaluate.window": recipe.evaluate.window,
        "scoring.window": recipe.scoring.window,
    }
    for key, window in windows.items():
        if window > context:
            raise KoffError(f"{key}: {window} is more than the model's {context} positions; lower it")
    kv = {"memory.kv.tokens": recipe.memory.kv.tokens if recipe.memory.kv else 0}
    kv |= {"compare: kv_tokens": max((row.kv_tokens or 0 for row in recipe.compare), default=0)}
    longest = max(recipe.learn.window, recipe.evaluate.window)
    for key, count in kv.items():
        if count + longest > context:
            raise KoffError(
                f"{key}: a cache of {count} and a window of {longest} are more than the model's {context}"
                " positions; lower it, or learn.window and evaluate.window"
            )


@dataclass(frozen=True)
class Needs:
    """What learning needs on each of several devices that share every batch.

    Attributes:
        parts: Name, arithmetic in words, and bytes.
        windows: That a device learns from at a time.
        whole: Bytes of the dense model as it is scored and cut.
        second_moments: Bytes of the statistics of scoring, float32: in the host's memory while they are
            collected, then in a file.
        flops: Per token: forward, and back through weights that get no gradient of their own.
        work: The arithmetic of `flops` in words.
    """

    parts: tuple[tuple[str, str, int], ...]
    windows: int
    whole: int
    second_moments: int
    flops: float
    work: str

    @property
    def device(self) -> int:
        """Bytes on each device."""
        return sum(size for _, _, size in self.parts)

    @property
    def host(self) -> int:
        """Bytes on a machine that scores, then learns, on its processor."""
        return PROGRAM + max(self.device, self.whole + self.second_moments)


def needs(
    recipe: Recipe, config: dict[str, Any], units: Units, plan: Plan, devices: int = 1, shard: bool = False
) -> Needs:
    """What `recipe` needs around a model of this config, on each of `devices`.

    Args:
        recipe: Checked.
        config: The model's, as a dictionary.
        units: Of the model.
        plan: Any of the recipe's sparsity.
        devices: That share every batch.
        shard: They share the dense model's layers too.
    """
    learn, first, hidden, layers = recipe.learn, units.layers[0], units.hidden_size, len(units.layers)
    each = 4 if native_dtype(recipe.model.dtype) == "float32" else 2
    windows = -(-learn.batch // devices)
    tokens, vocabulary, inner = learn.window * windows, config["vocab_size"], first.ffn_neurons
    memory, domains = memory_parameters(recipe, units, plan), len(recipe.domains)
    gated = sum(layer.count(kind) for layer in units.layers for kind in recipe.structure.units)
    kept = hidden * 14 + inner * 5  # numbers that one layer keeps of a token for the way back
    saved = f"{layers} layers x (14 x {hidden:,} + 5 x {inner:,})"
    if learn.gradient_checkpointing:
        saved = f"({layers} layers x {hidden:,} + 14 x {hidden:,} + 5 x {inner:,} of one)"
    count = hidden * layers + kept if learn.gradient_checkpointing else kept * layers
    rows = min(tokens, logit_rows(vocabulary))
    parts = [
        ("dense model", *_dense(units, each, recipe.learn.base == "nf4", devices if shard else 1)),
        ("memories", f"{domains} x {memory:,} parameters x {TRAINED} bytes (float32 with gradient and Adam)",
         domains * memory * TRAINED),
        ("gates", f"{gated:,} units x {GATED} bytes", gated * GATED),
        ("activations", f"{windows} x {learn.window:,} tokens x {saved} x {each} bytes",
         tokens * count * each),
        ("logits", f"{rows} tokens x {vocabulary:,} words x 12 bytes", rows * vocabulary * 12),
    ]  # fmt: skip
    shared = lora_parameters(recipe.cut.recover, units, plan)
    if shared:
        parts.insert(2, ("recovery", f"{shared:,} parameters x {TRAINED} bytes", shared * TRAINED))
    memory += shared  # as far as work goes: both are multiplied with every token
    passes = 4 + 2 * learn.gradient_checkpointing + 2 * (learn.loss.kl > 0)
    attention = layers * learn.window * first.kv_groups * first.queries * first.head_dim
    work = units.block_parameters + vocabulary * hidden + attention
    said = f"{work / 1e9:.2f} G (blocks, head, attention"
    # consumers' inputs, and gradients at their outputs
    sides = {"ffn_neurons": inner, "kv_groups": first.kv_groups * first.queries * first.head_dim}
    moments = sum(layers * (sides[kind] ** 2 + hidden**2) * 4 for kind in recipe.structure.units)
    if recipe.cut.compensate != "none":
        closed = layers * inner - sum(plan.widths_of("ffn_neurons"))
        parts.append(("predictions", f"{closed:,} closed neurons x {inner:,} x {each} bytes",
                      closed * inner * each))  # fmt: skip
        work += closed * inner
        said = f"{work / 1e9:.2f} G (blocks, head, attention, predictions"
    return Needs(
        tuple(parts), windows, units.parameters * each, moments, passes * work + 6 * memory,
        f"{passes} x {said}) + 6 x {memory / 1e9:.2f} G",
    )  # fmt: skip


def _dense(units: Units, each: int, nf4: bool, shares: int) -> tuple[str, int]:
    """Arithmetic in words and bytes of the dense model while memories are trained around it."""
    blocks, rest = units.block_parameters, units.parameters - units.block_parameters
    if not nf4 and shares == 1:
        return f"{units.parameters:,} parameters x {each} bytes", units.parameters * each
    size = NF4 if nf4 else each
    said = f"{blocks:,} in blocks x {size:g} bytes"
    share = 1.0
    if shares > 1:  # one layer is whole at a time, and the next is on its way
        said += f" x (1 / {shares} + 2 / {len(units.layers)} layers)"
        share = min(1.0, 1 / shares + 2 / len(units.layers))
    return f"{said} + {rest:,} others x {each} bytes", round(blocks * size * share) + rest * each


def memory_parameters(recipe: Recipe, units: Units, plan: Plan) -> int:
    """Parameters of one domain's memory around the backbone."""
    kv, head = recipe.memory.kv, units.layers[0].head_dim
    cache = 2 * sum(plan.widths_of("kv_groups")) * kv.tokens * head if kv is not None else 0
    return lora_parameters(recipe.memory.lora, units, plan) + cache


def lora_parameters(lora: Lora | None, units: Units, plan: Plan) -> int:
    """Parameters of one LoRA around the backbone."""
    if lora is None:
        return 0
    hidden, head, queries = units.hidden_size, units.layers[0].head_dim, units.layers[0].queries
    total = 0
    for neurons, groups in zip(plan.widths_of("ffn_neurons"), plan.widths_of("kv_groups"), strict=True):
        widths = {
            "q_proj": hidden + groups * queries * head, "k_proj": hidden + groups * head,
            "v_proj": hidden + groups * head, "o_proj": hidden + groups * queries * head,
            "gate_proj": hidden + neurons, "up_proj": hidden + neurons, "down_proj": hidden + neurons,
        }  # fmt: skip
        names = list(widths) if lora.target == "all-linear" else lora.target
        total += lora.rank * sum(widths.get(name, 0) for name in names)
    return total
