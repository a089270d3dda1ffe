"""Tiny random models, plans and memories: every family and shape whose units are known."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from koff_prune.memory import Memories
from koff_prune.plan import Plan, Scores, choose, removed_parameters
from koff_prune.recipe import Kv, Lora, Memory, Structure
from koff_prune.units import KINDS, Units

FAMILIES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
    "mistral": MistralConfig,
}
SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TIED, MHA = {"tie_word_embeddings": True}, {"num_key_value_heads": 4}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-mha-biases": ("llama", {**TIED, **MHA, "attention_bias": True, "mlp_bias": True}),
    "qwen2-tied": ("qwen2", TIED),
    "qwen2-mha": ("qwen2", MHA),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-mha-biases": ("qwen3", {**TIED, **MHA, "attention_bias": True}),
    "gemma3-tied": ("gemma3", {**TIED, **SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3-mha": ("gemma3", {**MHA, **SLIDING, "query_pre_attn_scalar": 8}),
}


def tiny_config(family: str = "llama", **options: Any) -> PretrainedConfig:
    return FAMILIES[family](**{**SIZES, **options})


def tiny_model(family: str = "llama", *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A frozen random model whose every weight, bias and norm counts."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **options), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        norm_base = 0.0 if family == "gemma3" else 1.0  # Gemma's norms scale by 1 + weight
        p.data = norm_base + 0.1 * noise if "norm" in name else 0.15 * noise
    return model.eval().requires_grad_(False)


def tiny_shape(name: str) -> PreTrainedModel:
    family, options = SHAPES[name]
    return tiny_model(family, **options)


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def random_scores(units: Units, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {k: [torch.rand(u.count(k), generator=generator) for u in units.layers] for k in KINDS}


def random_plan(units: Units, *, widths: str = "per_layer", sparsity: float = 0.41, **options: Any) -> Plan:
    """Both kinds of units, at whatever lies nearest to the target."""
    settings = {"units": list(KINDS), "of": "blocks", "round_to": 4, **options}
    structure = Structure(sparsity=sparsity, widths=widths, **settings)  # type: ignore[arg-type]
    kept = choose(random_scores(units), units, structure, sparsity)
    gone = removed_parameters(kept, units)
    return Plan(
        model={"source": "tiny", "revision": None, "config_sha256": "0"},
        method="random",
        ranking="global",
        of="blocks",
        target=sparsity,
        realised=gone / units.block_parameters,
        widths=widths,
        round_to=structure.round_to,
        parameters={"dense": units.parameters, "slim": units.parameters - gone},
        layers=kept,
    )


def tiny_memory(*, lora: bool = True, kv: bool = True) -> Memory:
    return Memory(lora=Lora(rank=3, alpha=6) if lora else None, kv=Kv(tokens=5) if kv else None)


def memories_on(
    model: PreTrainedModel, domains: tuple[str, ...] = ("law", "law2"), seed: int = 0, **parts: bool
) -> Memories:
    """Memories whose every tensor is random: no LoRA B is zero, no cache is a prefill's."""
    memories = Memories(
        model, tiny_memory(**parts), {d: token_ids(5, seed=i) for i, d in enumerate(domains)}, seed
    )
    generator = torch.Generator().manual_seed(seed + 1)
    for domain in domains:
        tensors = {
            part: {k: 0.3 * torch.randn(t.shape, generator=generator) for k, t in group.items()}
            for part, group in memories.tensors(domain).items()
        }
        memories.load(domain, tensors)
    return memories


@torch.no_grad()
def logits(memories: Memories, ids: torch.Tensor, domain: str | None) -> torch.Tensor:
    memories.activate(domain)
    result: torch.Tensor = memories.base(input_ids=ids, use_cache=False).logits
    memories.activate(None)
    return result
