"""koff_sdpa: sdpa without a memory, a cache of learned tokens with one."""

from __future__ import annotations

import pytest
import torch
from export_helpers import Kv, random_kv, tiny_model, torch_logits
from transformers import DynamicCache, PreTrainedModel

from koff_export.attention import ATTENTION, set_attention


def attach(model: PreTrainedModel, kv: Kv | None) -> None:
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.koff_kv = None if kv is None else tuple(t[None] for t in kv[i])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_without_memory_it_is_sdpa_bit_for_bit(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 250, (2, 9))
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    wanted = [(mask, model(ids, attention_mask=mask).logits) for mask in (None, padded)]
    set_attention(model)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {ATTENTION}
    for mask, want in wanted:
        assert torch.equal(model(ids, attention_mask=mask).logits, want)
        attach(model, None)
        assert torch.equal(model(ids, attention_mask=mask).logits, want)
        attach(model, random_kv(model, 0, 0))
        assert torch.equal(model(ids, attention_mask=mask).logits, want)
        attach(model, None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("length", [1, 6])
def test_memory_is_a_cache_in_front(family: str, length: int) -> None:
    model = tiny_model(family)
    kv = random_kv(model, 5, 1)
    ids = torch.randint(3, 250, (2, length))
    padded = torch.ones_like(ids)
    padded[1, : length // 2] = 0
    want = torch_logits(model, ids, kv=kv)
    want_padded = torch_logits(model, ids, kv=kv, mask=padded)
    set_attention(model)
    attach(model, kv)
    positions = torch.arange(5, 5 + length)[None]
    for mask in (None, torch.ones_like(ids)):
        got = model(ids, position_ids=positions, attention_mask=mask).logits
        assert (got - want).abs().max() < 1e-4
    got = model(ids, position_ids=(padded.cumsum(1) - 1).clamp(min=0) + 5, attention_mask=padded).logits
    assert (got - want_padded)[padded.bool()].abs().max() < 1e-4


def test_cache_holds_text_only() -> None:
    model = tiny_model()
    kv = random_kv(model, 5, 1)
    ids = torch.randint(3, 250, (1, 8))
    want = torch_logits(model, ids, kv=kv)
    set_attention(model)
    attach(model, kv)
    cache = DynamicCache()
    steps = []
    for start, end in ((0, 4), (4, 5), (5, 8)):
        positions = torch.arange(5 + start, 5 + end)[None]
        steps.append(model(ids[:, start:end], position_ids=positions, past_key_values=cache).logits)
    assert (torch.cat(steps, 1) - want).abs().max() < 1e-4
    assert cache.get_seq_length() == 8


def test_memory_is_visible_beyond_a_sliding_window() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config).eval()
    set_attention(model)
    kv = random_kv(model, 4, 2)
    ids = torch.randint(3, 90, (1, 10))
    positions = torch.arange(4, 14)[None]
    attach(model, kv)
    with torch.no_grad():
        before = model(ids, position_ids=positions).logits
        kv[0][1][:] += 3.0  # values of the sliding layer's memory
        after = model(ids, position_ids=positions).logits
    assert ((after - before).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_memory_with_and_without_checkpointing(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype).requires_grad_(False)
    set_attention(model)
    kv = [tuple(t.requires_grad_() for t in pair) for pair in random_kv(model, 5, 1)]
    attach(model, kv)  # float32 under bfloat16 weights
    ids = torch.randint(3, 250, (2, 7))
    with torch.inference_mode():  # must not poison the mask that the training step uses
        model(ids, position_ids=torch.arange(5, 12)[None])

    def gradients() -> list[torch.Tensor]:
        loss = model(ids, position_ids=torch.arange(5, 12)[None], labels=ids, use_cache=False).loss
        return list(torch.autograd.grad(loss, [t for pair in kv for t in pair]))

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in plain)
