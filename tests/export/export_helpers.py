"""Tiny random models and memories for the tests of koff_export, and their reference in torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(family: str = "llama", per_layer: bool = True, seed: int = 0, **kw: object) -> PreTrainedModel:
    """A random model; with `per_layer`, layer 1 has a narrower FFN and one KV group instead of two."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    extra: dict[str, object] = {}
    if per_layer:
        narrow = {"intermediate_size": 40, "num_key_value_heads": 1, "num_attention_heads": 2}
        extra = {"allow_global_per_layer_attribute_access": True, "per_layer_config": {1: narrow}}
    config = config_class(**{**SIZES, **extra, **kw})
    model = model_class(config)
    if per_layer:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = type(layer)(config.per_layer_config[i], i)
    for parameter in model.parameters():  # large enough for differences to show
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
    model.set_attn_implementation("sdpa")
    return model.eval()


def lora_modules(model: PreTrainedModel) -> list[str]:
    """Every linear layer inside the decoder layers."""
    return [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("model.layers")
    ]


Lora = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
Kv = list[tuple[torch.Tensor, torch.Tensor]]
BOS, WINDOW = 1, 16


@dataclass
class Exported:
    """A bundle on disk and what it was made of."""

    folder: Path
    model: PreTrainedModel
    memories: dict[str, tuple[Lora, Kv | None]]


def random_lora(model: PreTrainedModel, rank: int, seed: int, skip: str = "-") -> Lora:
    """LoRA of one rank on every linear layer whose name does not contain `skip`."""
    generator = torch.Generator().manual_seed(seed)
    result: Lora = {}
    for name in lora_modules(model):
        linear = model.get_submodule(name)
        if skip not in name:
            a = torch.randn(rank, linear.in_features, generator=generator) * 0.2
            result[name] = (a, torch.randn(linear.out_features, rank, generator=generator) * 0.2, 0.5)
    return result


def random_kv(model: PreTrainedModel, length: int, seed: int) -> Kv:
    """A key and a value [kv_heads, length, head_dim] for every layer."""
    generator = torch.Generator().manual_seed(seed)
    result: Kv = []
    for layer in model.model.layers:
        heads = layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
        shape = (heads, length, layer.self_attn.head_dim)
        result.append((torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)))
    return result


def torch_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    lora: Lora | None = None,
    kv: Kv | None = None,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference logits [batch, sequence, vocabulary], the memory as a DynamicCache, LoRA as hooks.

    `mask` [batch, sequence] marks left padding with 0; positions count real tokens only, behind the memory.
    """
    from transformers import DynamicCache

    batch = len(ids)
    mask = torch.ones_like(ids) if mask is None else mask
    size = kv[0][0].shape[1] if kv else 0
    positions = (mask.cumsum(1) - 1).clamp(min=0) + size if positions is None else positions
    handles = []
    for name, (a, b, scale) in (lora or {}).items():

        def hook(module, args, output, a=a, b=b, scale=scale):  # type: ignore[no-untyped-def]
            return output + (args[0] @ a.T) @ b.T * scale

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        kwargs: dict[str, object] = {}
        if kv:
            kwargs["past_key_values"] = DynamicCache(
                [tuple(t[None].repeat(batch, 1, 1, 1) for t in p) for p in kv]
            )
            mask = torch.cat([torch.ones(batch, size, dtype=mask.dtype), mask], dim=1)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=positions, **kwargs).logits
    finally:
        for handle in handles:
            handle.remove()
