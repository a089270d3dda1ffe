"""Slim is masked; saved is loaded; without compensation the backbone is nothing but slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_helpers import (
    SHAPES,
    logits,
    memories_on,
    random_plan,
    tiny_memory,
    tiny_model,
    tiny_shape,
    token_ids,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from koff_export.errors import KoffError
from koff_prune.compensate import Compensation, PredictionHooks
from koff_prune.cut import cut, load_backbone, save_backbone, slice_memory
from koff_prune.gates import GateHooks, Gates
from koff_prune.memory import Memories, load_memory, save_memory
from koff_prune.plan import Plan
from koff_prune.recipe import Structure
from koff_prune.scores import collect
from koff_prune.units import KINDS, Units, read_units

DOMAINS = ("law", "law2")  # one name begins with the other
BOTH = Structure(units=list(KINDS))


def compensation_of(model: PreTrainedModel, units: Units) -> Compensation:
    return Compensation(collect(model, units, KINDS, token_ids(6, 16, seed=9)).second, 0.01, units)


def masked_logits(
    memories: Memories, plan: Plan, units: Units, compensation: Compensation | None, ids: torch.Tensor
) -> dict[str | None, torch.Tensor]:
    """The dense model with the plan's gates closed, closed units predicted where it is compensated."""
    gates = Gates(units, BOTH, "straight_through", None, 0)
    hooks = GateHooks(memories.model, units)
    hooks.set(gates, gates.mask(plan.layers).float())
    predictions = PredictionHooks(memories.model, compensation) if compensation else None
    if predictions:
        predictions.refresh(plan.layers, torch.zeros(()))
        predictions.z = hooks.z
    found = {domain: logits(memories, ids, domain) for domain in (None, *memories.domains)}
    hooks.remove()
    if predictions:
        predictions.remove()
    return found


def slim_of(
    dense: PreTrainedModel, shape: str, plan: Plan, compensation: Compensation | None
) -> PreTrainedModel:
    copy = tiny_shape(shape)
    copy.load_state_dict(dense.state_dict())
    return cut(copy, plan, compensation)


@pytest.mark.parametrize("compensate", [False, True], ids=["exact", "compensated"])
@pytest.mark.parametrize("widths", ["per_layer", "uniform"])
@pytest.mark.parametrize("shape", SHAPES)
def test_slim_is_masked_with_memories_off_and_each_on(shape: str, widths: str, compensate: bool) -> None:
    dense = tiny_shape(shape)
    units = read_units(dense)
    plan = random_plan(units, widths=widths)
    assert any(
        len(layer["kv_groups"]) < u.kv_groups for layer, u in zip(plan.layers, units.layers, strict=True)
    )
    assert plan.realised > 0.2
    compensation = compensation_of(dense, units) if compensate else None
    slim = slim_of(dense, shape, plan, compensation)
    assert read_units(slim).parameters == plan.parameters["slim"]
    ids = token_ids(2, 20, seed=3)
    memories = memories_on(dense, DOMAINS)
    expected = masked_logits(memories, plan, units, compensation, ids)
    tensors = {d: slice_memory(memories.tensors(d), plan, units) for d in DOMAINS}
    around = memories_on(slim, DOMAINS, seed=5)
    for domain in DOMAINS:
        around.load(domain, tensors[domain])
    for domain, wanted in expected.items():
        found = logits(around, ids, domain)
        assert (found - wanted).abs().max() < 1e-4, domain
    assert all((expected[None] - expected[d]).abs().max() > 1e-2 for d in DOMAINS)
    assert (expected["law"] - expected["law2"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "parts", [{"lora": True, "kv": False}, {"lora": False, "kv": True}], ids=["lora", "kv"]
)
def test_slim_is_masked_with_half_a_memory(parts: dict[str, bool]) -> None:
    dense = tiny_shape("llama")
    units = read_units(dense)
    plan = random_plan(units)
    slim = slim_of(dense, "llama", plan, None)
    memories = memories_on(dense, ("law",), **parts)
    ids = token_ids(1, 12)
    expected = masked_logits(memories, plan, units, None, ids)
    around = memories_on(slim, ("law",), seed=5, **parts)
    around.load("law", slice_memory(memories.tensors("law"), plan, units))
    assert (logits(around, ids, "law") - expected["law"]).abs().max() < 1e-4
    assert (expected["law"] - expected[None]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_memories_off_and_gates_open_is_the_dense_model_bit_for_bit(shape: str) -> None:
    dense, wrapped = tiny_shape(shape), tiny_shape(shape)
    units = read_units(wrapped)
    ids = token_ids(2, 20)
    with torch.no_grad():
        expected = dense(input_ids=ids, use_cache=False).logits
    memories = memories_on(wrapped)
    hooks = GateHooks(memories.model, units)
    assert torch.equal(logits(memories, ids, None), expected)
    gates = Gates(units, BOTH, "straight_through", None, 0)
    hooks.set(gates, torch.ones_like(gates.cost))
    assert torch.equal(logits(memories, ids, None), expected)
    hooks.remove()
    plain = memories.unwrap()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids, use_cache=False).logits, expected)


def _expected_slice(name: str, tensor: torch.Tensor, plan: Plan, units: Units) -> torch.Tensor:
    """By hand: which rows and columns of a dense tensor a plan keeps."""
    parts = name.split(".")
    if "layers" not in parts:
        return tensor
    i, module = int(parts[2]), parts[-2]
    have = units.layers[i]
    neurons = torch.tensor(plan.layers[i]["ffn_neurons"])
    heads = torch.tensor(plan.layers[i]["kv_groups"])
    if module in ("gate_proj", "up_proj"):
        return tensor[neurons]
    if module == "down_proj":
        return tensor[:, neurons] if tensor.ndim == 2 else tensor
    if module in ("k_proj", "v_proj"):
        return tensor.view(have.kv_groups, have.head_dim, -1)[heads].reshape(-1, *tensor.shape[1:])
    if module == "q_proj":
        grouped = tensor.view(have.kv_groups, have.queries * have.head_dim, -1)
        return grouped[heads].reshape(-1, *tensor.shape[1:])
    if module == "o_proj" and tensor.ndim == 2:
        return tensor.view(len(tensor), have.kv_groups, -1)[:, heads].reshape(len(tensor), -1)
    return tensor


@pytest.mark.parametrize("shape", SHAPES)
def test_without_compensation_every_tensor_is_a_byte_exact_slice(shape: str, tmp_path: Path) -> None:
    dense = tiny_shape(shape).to(torch.bfloat16)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    units = read_units(dense)
    plan = random_plan(units)
    save_backbone(cut(dense, plan), tmp_path)
    after = load_backbone(tmp_path).state_dict()
    assert set(after) == set(before)
    for name, tensor in after.items():
        wanted = _expected_slice(name, before[name], plan, units)
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted), name


@pytest.mark.parametrize("widths", ["per_layer", "uniform"])
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_is_loaded(shape: str, widths: str, tmp_path: Path) -> None:
    slim = tiny_shape(shape)
    plan = random_plan(read_units(slim), widths=widths)
    cut(slim, plan)
    save_backbone(slim, tmp_path)
    loaded = [load_backbone(tmp_path)]
    if widths == "uniform":
        loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    ids = token_ids(2, 20)
    with torch.no_grad():
        expected = slim(input_ids=ids, use_cache=False).logits
        tokens = slim.generate(ids, max_new_tokens=8, do_sample=False)
        for model in loaded:
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert tied == bool(SHAPES[shape][1].get("tie_word_embeddings"))
    text = (tmp_path / "config.json").read_text()
    assert ("per_layer_config" in json.loads(text)) == (widths == "per_layer")
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


def test_dtype_and_rope_survive(tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 100_000.0})
    cut(model, random_plan(read_units(model)))
    save_backbone(model.to(torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 100_000.0
    assert config["dtype"] == "bfloat16"
    assert next(load_backbone(tmp_path).parameters()).dtype == torch.bfloat16
    assert next(load_backbone(tmp_path, torch.float32).parameters()).dtype == torch.float32


def test_peft_opens_the_lora_folder_on_a_uniform_backbone(tmp_path: Path) -> None:
    dense = tiny_shape("llama")
    units = read_units(dense)
    plan = random_plan(units, widths="uniform")
    slim = slim_of(dense, "llama", plan, None)
    memories = memories_on(dense, ("law",), kv=False)
    save_backbone(slim, tmp_path / "backbone")
    sliced = slice_memory(memories.tensors("law"), plan, units)
    save_memory(tmp_path / "law", sliced, tiny_memory(kv=False), "somewhere")
    around = memories_on(slim, ("law",), kv=False, seed=5)
    around.load("law", load_memory(tmp_path / "law"))
    ids = token_ids(1, 16)
    expected = logits(around, ids, "law")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    opened = PeftModel.from_pretrained(stock, tmp_path / "law")
    with torch.no_grad():
        assert torch.allclose(opened(input_ids=ids).logits, expected, atol=1e-5)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = random_plan(read_units(tiny_model("llama", num_hidden_layers=2)))
    with pytest.raises(KoffError, match="2 layers, but the model has 3"):
        cut(tiny_model(), plan)
    plan = random_plan(read_units(tiny_model("llama", intermediate_size=64)), sparsity=0.1)
    with pytest.raises(KoffError, match="keeps unit 63, but there are 48"):
        cut(tiny_model(), plan)


def test_a_damaged_backbone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(KoffError, match="holds no backbone"):
        load_backbone(tmp_path)
    model = tiny_model()
    save_backbone(cut(model, random_plan(read_units(model))), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    with pytest.raises(KoffError, match="does not fit config.json"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KoffError, match="config.json"):
        load_backbone(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(KoffError, match="safetensors"):
        load_backbone(tmp_path)
