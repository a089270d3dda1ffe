"""Attention with a memory in front: the learned key/value cache as a transformers attention function.

A layer's attention module carries `koff_kv`: None, or (key, value), each [1 or batch, kv_heads, P, head_dim]
of any float dtype, post-RoPE, at positions 0…P-1. Its text starts at position P, so callers pass
`position_ids + P`; a cache, if any, holds text only. The memory is visible to every token, in sliding-window
layers too.

`koff_kv` is read again when gradient checkpointing recomputes a layer: leave it until backward is done.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "koff_sdpa"


@lru_cache(maxsize=8)
def _causal_mask(queries: int, memory: int, device: torch.device) -> torch.Tensor:
    """Bool [1, 1, queries, memory + queries]: all of the memory, and the text up to oneself."""
    with torch.inference_mode(
        False
    ):  # a tensor made in inference mode could not be saved for a later backward
        mask = torch.ones(queries, memory + queries, dtype=torch.bool, device=device).tril(memory)
        return mask[None, None]


def koff_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention over the layer's memory and its own keys and values.

    Without a memory (`koff_kv` absent, None, or of length 0) this *is* transformers' sdpa, bit for bit.

    Args:
        module: The attention module, with `koff_kv` as described at the top of this file.
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim], cached text included.
        value: As `key`.
        attention_mask: Bool or additive [batch or 1, 1, queries, keys], or None where `sdpa_mask`
            could drop it: a single query that sees all keys, or plain causal attention.
        **kwargs: Passed on to sdpa.

    Returns:
        [batch, queries, heads, head_dim] and None.
    """
    memory: Any = getattr(module, "koff_kv", None)
    if memory is None or memory[0].shape[2] == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length, queries = memory[0].shape[2], query.shape[2]
    if attention_mask is not None:
        shape = (*attention_mask.shape[:-1], length)
        visible = (
            attention_mask.new_ones(shape)
            if attention_mask.dtype == torch.bool
            else attention_mask.new_zeros(shape)
        )
        attention_mask = torch.cat([visible, attention_mask], dim=-1)
    elif queries > 1:
        # As in sdpa, a longer key without a mask is the still empty end of a static cache.
        key, value = key[:, :, :queries], value[:, :, :queries]
        attention_mask = _causal_mask(queries, length, query.device)
    if memory[0].device != key.device:  # the model was moved with the memory on it, which is no module's
        memory = tuple(t.to(key.device) for t in memory)
        module.koff_kv = memory
    memory_key, memory_value = (t.to(key.dtype).expand(key.shape[0], -1, -1, -1) for t in memory)
    key = torch.cat([memory_key, key], dim=2)
    value = torch.cat([memory_value, value], dim=2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# The mask is sdpa's own, skips included: without them, memory off would take another kernel than sdpa does,
# and no longer reproduce the dense model bit for bit. What a skip left out, `koff_attention` puts back.
AttentionInterface.register(ATTENTION, koff_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def set_attention(model: PreTrainedModel) -> None:
    """Makes every layer use `koff_attention`, also layers that have a config of their own."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = ATTENTION
