"""Memories: files, positions, generation, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_helpers import logits, memories_on, tiny_memory, tiny_model, tiny_shape, token_ids
from transformers import DynamicCache

from koff_export.errors import KoffError
from koff_prune.attach import attach_memory
from koff_prune.memory import KvMemory, Memories, kind_of, load_memory, memory_of_folder, prefill, save_memory
from koff_prune.recipe import Memory

SHAPES = ("llama", "qwen2-tied", "qwen3", "gemma3-tied")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_caches_prefill_stands_for_the_text_itself(shape: str) -> None:
    """A memory that starts from a prefill continues as if its text had been read."""
    if shape.startswith("gemma3"):
        pytest.skip("in sliding layers the memory stays visible where the text would not")
    model = tiny_shape(shape)
    text = token_ids(14)
    with torch.no_grad():
        whole = model(input_ids=text[None], use_cache=False).logits[0]
    memories = Memories(model, tiny_memory(lora=False), {"law": text[:5]}, 0)
    assert torch.allclose(logits(memories, text[None, 5:], "law")[0], whole[5:], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_learned_cache_is_a_past_at_the_first_positions(shape: str) -> None:
    """Against transformers' own cache: the memory as past, text from position P on."""
    model = tiny_shape(shape)
    memories = memories_on(model, ("law",), lora=False)
    kv = memories.kv["law"]
    ids = token_ids(2, 6)
    found = logits(memories, ids, "law")
    cache = DynamicCache(
        [tuple(t.detach()[None].expand(2, -1, -1, -1) for t in kv.layer(i)) for i in range(3)]
    )
    memories.unwrap()
    with torch.no_grad():
        wanted = model(
            input_ids=ids,
            past_key_values=cache,
            position_ids=torch.arange(5, 11)[None],
            attention_mask=torch.ones(2, 11, dtype=torch.long) if not shape.startswith("gemma3") else None,
        ).logits
    if not shape.startswith("gemma3"):
        assert torch.allclose(found, wanted, atol=1e-4)
    assert found.shape == wanted.shape


@pytest.mark.parametrize("parts", [{}, {"lora": False}, {"kv": False}], ids=["both", "kv", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_generate_equals_full_forwards(shape: str, parts: dict[str, bool]) -> None:
    model = tiny_shape(shape)
    memories = memories_on(model, **parts)
    memories.activate("law2")
    ids = token_ids(2, 7)
    with torch.no_grad():
        found = memories.base.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1
        )
        grown = ids
        for _ in range(12):
            step = memories.base(input_ids=grown, use_cache=False).logits[:, -1].argmax(-1)
            grown = torch.cat([grown, step[:, None]], 1)
    assert torch.equal(found, grown)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_read_in_two_parts_is_the_text(shape: str) -> None:
    """Without position_ids, the second part stands behind the memory and the cached first part."""
    memories = memories_on(tiny_shape(shape))
    memories.activate("law")
    ids, cache = token_ids(1, 9), DynamicCache()
    with torch.no_grad():
        whole = memories.base(input_ids=ids, use_cache=False).logits
        memories.base(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        rest = memories.base(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(rest, whole[:, 4:], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_left_padding_changes_nothing(shape: str) -> None:
    model = tiny_shape(shape)
    memories = memories_on(model)
    memories.activate("law")
    ids = token_ids(1, 6)
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = memories.base(input_ids=ids, use_cache=False).logits
        behind = memories.base(
            input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        assert torch.allclose(behind[:, 4:], alone, atol=1e-4)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        short = memories.base.generate(ids, **options)
        long = memories.base.generate(padded, attention_mask=mask, **options)
    assert torch.equal(long[:, 4:], short)


def test_saved_is_loaded(tmp_path: Path) -> None:
    memories = memories_on(tiny_model())
    tensors = memories.tensors("law")
    save_memory(tmp_path / "law", tensors, tiny_memory(), "base")
    again = load_memory(tmp_path / "law")
    assert {p: set(t) for p, t in again.items()} == {p: set(t) for p, t in tensors.items()}
    assert all(torch.equal(again[p][k], t) for p, group in tensors.items() for k, t in group.items())
    assert kind_of(again) == "lora+kv" and kind_of({}) == "none"
    memory = memory_of_folder(tmp_path / "law")
    assert memory.kv is not None and memory.kv.tokens == 5
    assert memory.lora is not None and (memory.lora.rank, memory.lora.alpha) == (3, 6)
    assert {p.name for p in (tmp_path / "law").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "kv.safetensors",
    }  # fmt: skip
    ids = token_ids(1, 9)
    expected = logits(memories, ids, "law")
    attached = attach_memory(tiny_model(), tmp_path / "law")
    with torch.no_grad():
        assert torch.equal(attached.base(input_ids=ids, use_cache=False).logits, expected)
    config = json.loads((tmp_path / "law" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["inference_mode"]
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["v1.5", "weight", "lora_A", "default", "base_layer", "model", "kv", "0"])
def test_any_name_that_a_recipe_allows(name: str, tmp_path: Path) -> None:
    memories = memories_on(tiny_model(), (name, f"{name}2"))
    ids = token_ids(1, 9)
    expected = logits(memories, ids, name)
    tensors = memories.tensors(name)
    assert len(tensors["lora"]) == 3 * 7 * 2 and len(tensors["kv"]) == 3 * 2
    save_memory(tmp_path / name, tensors, tiny_memory(), "base")
    attached = attach_memory(tiny_model(), tmp_path / name)
    with torch.no_grad():
        assert torch.equal(attached.base(input_ids=ids, use_cache=False).logits, expected)
    assert not torch.equal(logits(memories, ids, f"{name}2"), expected)


def test_equal_seeds_give_equal_starts_and_an_untrained_lora_is_nothing() -> None:
    prefills = {"a": token_ids(5), "b": token_ids(5, seed=1)}
    one, two = (Memories(tiny_model(), Memory(kv=None), prefills, 4) for _ in range(2))
    for name in prefills:
        a, b = one.tensors(name)["lora"], two.tensors(name)["lora"]
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert all(torch.count_nonzero(t) == 0 for k, t in a.items() if "lora_B" in k)
    ids = token_ids(1, 8)
    assert torch.equal(logits(one, ids, "a"), logits(one, ids, None))


def test_switching_leaves_every_memory_trainable() -> None:
    memories = memories_on(tiny_model())
    for domain in ("law", None, "law2", "law"):
        memories.activate(domain)
        assert all(p.requires_grad for p in [*memories.lora_parameters(), *memories.kv_parameters()])
    own = {id(p) for p in [*memories.lora_parameters(), *memories.kv_parameters()]}
    assert not any(p.requires_grad for p in memories.base.parameters() if id(p) not in own)


def test_off_and_back() -> None:
    memories = memories_on(tiny_model())
    memories.activate("law")
    with memories.off():
        assert memories.active is None and memories.tokens == 0
    assert memories.active == "law" and memories.tokens == 5


def test_counts() -> None:
    memories = memories_on(tiny_model())
    tensors = memories.tensors("law")
    assert memories.count("law") == sum(t.numel() for part in tensors.values() for t in part.values())


def test_a_memory_of_another_plan_or_model_is_refused(tmp_path: Path) -> None:
    memories = memories_on(tiny_model("llama", intermediate_size=40))
    save_memory(tmp_path / "law", memories.tensors("law"), tiny_memory(), "base")
    with pytest.raises(KoffError, match="trained for another plan"):
        attach_memory(tiny_model(), tmp_path / "law")
    save_memory(tmp_path / "two", memories_on(tiny_model("llama", num_hidden_layers=2)).tensors("law"),
                tiny_memory(), "base")  # fmt: skip
    with pytest.raises(KoffError, match="trained for another model"):
        attach_memory(tiny_model(), tmp_path / "two")
    with pytest.raises(KoffError, match="holds no memory"):
        load_memory(tmp_path / "nothing")
    file = tmp_path / "law" / "kv.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(KoffError, match="not a whole safetensors file"):
        load_memory(tmp_path / "law")
    with pytest.raises(KoffError, match="one P in all"):
        KvMemory.from_tensors({"layers.0.key": torch.zeros(1, 3, 2), "layers.0.value": torch.zeros(1, 4, 2)})
    with pytest.raises(KoffError, match="missing"):
        KvMemory.from_tensors({"layers.0.key": torch.zeros(1, 3, 2), "layers.1.value": torch.zeros(1, 3, 2)})


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_of_a_lora_is_no_memory(half: str, tmp_path: Path) -> None:
    tensors = memories_on(tiny_model()).tensors("law")
    gone = next(name for name in tensors["lora"] if f"layers.1.mlp.up_proj.{half}" in name)
    del tensors["lora"][gone]
    save_memory(tmp_path / "law", tensors, tiny_memory(), "base")
    with pytest.raises(KoffError, match=f"memory law: LoRA: tensor .*up_proj.{half}.* is missing"):
        attach_memory(tiny_model(), tmp_path / "law")


def test_prefill_is_what_the_model_computes() -> None:
    model = tiny_model()
    layers = prefill(model, token_ids(6))
    assert len(layers) == 3 and all(t.shape == (2, 6, 8) for pair in layers for t in pair)
