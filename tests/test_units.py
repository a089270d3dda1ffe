"""The units of a model, and what leaves with each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from model_helpers import FAMILIES, SHAPES, tiny_config, tiny_model, tiny_shape
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from koff_export.errors import KoffError
from koff_prune.architecture import config_of, units_of_config
from koff_prune.cut import cut
from koff_prune.memory import Memories
from koff_prune.plan import Plan, all_kept
from koff_prune.recipe import Memory, ModelSection
from koff_prune.units import UnitKind, decoder_layers, ffn_group, head_channels, read_units

RECIPES = Path(__file__).parents[1] / "recipes"


def plan_without(units, lost: dict[tuple[int, UnitKind], int]) -> Plan:  # type: ignore[no-untyped-def]
    kept = all_kept(units)
    for (layer, kind), unit in lost.items():
        kept[layer][kind].remove(unit)
    identity = {"source": "tiny", "revision": None, "config_sha256": "0"}
    sizes = {"dense": units.parameters, "slim": 0}
    return Plan(identity, "random", "global", "total", 0.1, 0.1, "per_layer", 1, sizes, kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_units_cost_is_what_leaves_with_it_biases_included(shape: str) -> None:
    units = read_units(tiny_shape(shape))
    for kind in ("ffn_neurons", "kv_groups"):
        model = tiny_shape(shape)
        before = sum(p.numel() for p in model.parameters())
        cut(model, plan_without(units, {(1, kind): 1}))
        assert before - sum(p.numel() for p in model.parameters()) == units.layers[1].cost(kind)


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_and_parameters(shape: str) -> None:
    model = tiny_shape(shape)
    units = read_units(model)
    config = model.config
    assert len(units.layers) == config.num_hidden_layers
    for layer in units.layers:
        assert (layer.ffn_neurons, layer.kv_groups) == (config.intermediate_size, config.num_key_value_heads)
        assert layer.queries * layer.kv_groups == config.num_attention_heads
        assert layer.head_dim == config.head_dim
    assert units.parameters == sum(
        p.numel() for p in model.parameters()
    )  # torch too counts tied tensors once
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    assert units.denominator("blocks") == blocks < units.denominator("total") == units.parameters


def test_reading_leaves_the_model_frozen_and_unchanged() -> None:
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    read_units(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_alone_tells_the_same(shape: str) -> None:
    model = tiny_shape(shape)
    family, options = SHAPES[shape]
    assert units_of_config(tiny_config(family, **options).to_dict()) == read_units(model)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/config.json")), ids=lambda p: p.parent.name)
def test_the_config_of_a_large_model_tells_the_same(path: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent))
    told = units_of_config(config_of(ModelSection(source="nobody/nothing", config=str(path))))
    assert told == read_units(model)


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("llama", "num_key_value_heads"), *itertools.product(FAMILIES, ["tie_word_embeddings", "head_dim"])],
)
def test_what_a_config_leaves_out_is_filled_in(family: str, left_out: str, tmp_path: Path) -> None:
    data = tiny_config(family).to_dict()
    del data[left_out]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert units_of_config(config_of(ModelSection(source=str(tmp_path)))) == read_units(model)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"num_hidden_layers": 10**9},
        {"num_key_value_heads": 3},
        {"vocab_size": -1},
        {"model_type": "bert"},
    ],
)
def test_a_config_that_cannot_be_is_one_sentence(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config().to_dict(), **change}))
    with pytest.raises(KoffError, match="no model has the sizes|no known units"):
        config_of(ModelSection(source=str(tmp_path)))


def test_layers_are_found_inside_peft() -> None:
    model = tiny_model()
    inside = Memories(model, Memory(), {"d": torch.arange(32)}, 0).model
    assert decoder_layers(inside) is decoder_layers(model)


def test_the_group_is_torch_prunings_own() -> None:
    mlp = tiny_model().model.layers[0].mlp
    group = ffn_group(mlp, [3, 5])
    touched = {
        (dep.target.module, dep.handler) for dep, _ in group if isinstance(dep.target.module, nn.Linear)
    }
    out, into = tp.prune_linear_out_channels, tp.prune_linear_in_channels
    assert touched == {(mlp.gate_proj, out), (mlp.up_proj, out), (mlp.down_proj, into)}


def test_head_channels() -> None:
    assert head_channels([0, 2], 2) == [0, 1, 4, 5]
    assert head_channels([1], 2, queries=3) == [6, 7, 8, 9, 10, 11]


def test_an_unknown_architecture_is_told() -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(KoffError, match="no decoder layers.*Llama, Qwen2"):
        read_units(gpt2)
    model = tiny_model()
    model.model.layers[0].mlp = nn.Linear(32, 32)
    with pytest.raises(KoffError, match="no gate_proj, up_proj and down_proj"):
        read_units(model)
