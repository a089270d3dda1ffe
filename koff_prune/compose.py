"""Several memories as one: their LoRA added with weights, their caches side by side.

Nothing is trained, and the sum is a memory like any other: it can be attached, saved, exported and shipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_prune.memory import KvMemory
from koff_prune.recipe import Kv, Lora, Memory

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
_MOST_RANK, _MOST_TOKENS = 512, 8192  # what a recipe's memory may have
# Their frequencies depend on the length of the text, so a key cannot be moved once it is rotated.
_NOT_MOVABLE = ("dynamic", "longrope")


def compose(
    model: PreTrainedModel, parts: Sequence[tuple[Tensors, Memory]], weights: Sequence[float] | None = None
) -> tuple[dict[str, dict[str, torch.Tensor]], Memory]:
    """One memory that acts as all of `parts` at once.

    LoRA: the weighted sum of the parts' updates, exactly, as one adapter whose rank is the sum of theirs. KV:
    all of their positions, each key moved so that the text is as far from it as in training; every part ends
    where the text begins, and attention does not mind that they overlap.

    Args:
        model: The backbone that the parts belong to.
        parts: What `load_memory` and `memory_of_folder` give of each.
        weights: Of each part's LoRA; default: `equal_weights`. A cache has no weight: attention weighs it.

    Returns:
        Tensors as of `load_memory`, and the section that describes them.

    Raises:
        KoffError: Weights that do not fit, a sum that is too large, or positions that cannot be moved.
    """
    if any("tokens" in tensors for tensors, _ in parts):
        raise KoffError("memories with tokens of their own read text in ways of their own: attach one alone")
    if weights is None:
        weights = equal_weights([memory.lora is not None for _, memory in parts])
    if len(weights) != len(parts):
        raise KoffError(f"weights: {list(weights)} must be {len(parts)} numbers, one for each memory")
    if not all(math.isfinite(w) for w in weights) or not any(weights):
        raise KoffError(f"weights: {list(weights)} must be finite, and not all of them 0")
    result: dict[str, dict[str, torch.Tensor]] = {}
    loras = [(t["lora"], m.lora, w) for (t, m), w in zip(parts, weights, strict=True) if m.lora is not None]
    rank = sum(lora.rank for _, lora, _ in loras)
    tokens = sum(m.kv.tokens for _, m in parts if m.kv is not None)
    if rank > _MOST_RANK or tokens > _MOST_TOKENS:
        raise KoffError(
            f"together these memories have rank {rank} and {tokens} KV tokens, more than {_MOST_RANK} and"
            f" {_MOST_TOKENS}; compose fewer"
        )
    lora_section = kv_section = None
    if loras:
        result["lora"] = _sum_lora(loras)
        leaves = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in result["lora"]})
        lora_section = Lora(rank=rank, alpha=rank, target=leaves)  # scale 1: the parts' are in B
    if tokens:
        caches = [KvMemory.from_tensors(t["kv"]) for t, m in parts if m.kv is not None]
        result["kv"] = _join_kv(model, caches, tokens)
        kv_section = Kv(tokens=tokens)
    return result, Memory(lora=lora_section, kv=kv_section)


def equal_weights(loras: Sequence[bool]) -> list[float]:
    """1 in sum over the parts that have a LoRA, which weigh alike; of those without, nothing is weighed."""
    return [1 / (sum(loras) or len(loras))] * len(loras)


def _sum_lora(parts: Sequence[tuple[Mapping[str, torch.Tensor], Lora, float]]) -> dict[str, torch.Tensor]:
    """Stacks A [r, in] below one another and weighted B [out, r] beside; a module that one lacks is zero."""
    result: dict[str, torch.Tensor] = {}
    for name in sorted({n.removesuffix(".lora_A.weight") for t, _, _ in parts for n in t if ".lora_A." in n}):
        name_a, name_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        like = next(t for t, _, _ in parts if name_a in t)
        columns, rows = like[name_a].shape[1], like[name_b].shape[0]
        a, b = [], []
        for tensors, lora, weight in parts:
            scale = weight * lora.alpha / lora.rank
            a.append(tensors.get(name_a, torch.zeros(lora.rank, columns)).float())
            b.append(tensors.get(name_b, torch.zeros(rows, lora.rank)).float() * scale)
        result[name_a], result[name_b] = torch.cat(a, 0), torch.cat(b, 1)
    return result


def _join_kv(model: PreTrainedModel, caches: Sequence[KvMemory], tokens: int) -> dict[str, torch.Tensor]:
    result = {}
    for i in range(len(caches[0].keys)):
        pairs = [cache.layer(i) for cache in caches]
        keys = [move(model, i, k, tokens - k.shape[1]) for k, _ in pairs]
        result[f"layers.{i}.key"] = torch.cat(keys, 1).detach()
        result[f"layers.{i}.value"] = torch.cat([v for _, v in pairs], 1).detach()
    return result


def move(model: PreTrainedModel, layer: int, key: torch.Tensor, by: int) -> torch.Tensor:
    """Keys [kv_heads, P, head_dim] of a layer, rotated already, as if they stood `by` positions later.

    Rotations add up (Su et al. 2021, RoFormer, section 3.2), so the same rotation by the difference does it.

    Raises:
        KoffError: The model's rotation depends on the length of the text.
    """
    if by == 0:
        return key
    rotary, prefix = model.model.rotary_emb, ""
    kind = rotary.rope_type
    if isinstance(kind, dict):  # Gemma has one for each type of layer
        layer_type = model.config.layer_types[layer]
        kind, prefix = kind[layer_type], f"{layer_type}_"
    if kind in _NOT_MOVABLE:
        raise KoffError(f"memories around a model with {kind} positions cannot be composed; attach one")
    angles = by * getattr(rotary, f"{prefix}inv_freq").float()
    cos, sin = (torch.cat([f, f]) for f in (angles.cos(), angles.sin()))
    first, second = key.float().chunk(2, dim=-1)
    return (key.float() * cos + torch.cat([-second, first], -1) * sin).to(key.dtype)
