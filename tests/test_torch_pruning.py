"""Inside a torch-pruning user's script: grouped-query models are cut, and equal the masked model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from model_helpers import SHAPES, tiny_config, tiny_shape, token_ids
from run_helpers import koff_prune, recipe_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from koff_export.errors import KoffError
from koff_prune.cut import load_backbone, save_backbone
from koff_prune.gates import GateHooks
from koff_prune.plan import Plan, choose
from koff_prune.recipe import Structure
from koff_prune.scores import collect, score_units
from koff_prune.torch_pruning import GroupedQueryPruner, KVGroup, LearnedImportance, UnitImportance
from koff_prune.units import KINDS, UnitKind, read_units


def masked_logits(
    model: PreTrainedModel, gone: dict[tuple[int, str], list[int]], ids: torch.Tensor
) -> torch.Tensor:
    """Logits of the uncut model with the inputs of the named units' consumers set to zero."""
    hooks, units = GateHooks(model, read_units(model)), read_units(model)
    for (i, kind), idxs in gone.items():
        have = units.layers[i]
        z = torch.ones(have.count(kind))  # type: ignore[arg-type]
        z[idxs] = 0
        wide = z.repeat_interleave(have.queries * have.head_dim) if kind == "kv_groups" else z
        hooks.z[(i, kind)] = wide  # type: ignore[index]
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    hooks.remove()
    return result


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shape", SHAPES)
def test_interactive_steps_cut_what_they_yield(shape: str, tmp_path: Path) -> None:
    """Every yielded group names what leaves; the cut model equals the masked one, generates, and is saved."""
    model, whole, ids = tiny_shape(shape), tiny_shape(shape), token_ids(2, 9)
    units = read_units(model)
    importance = UnitImportance("curvature", model, units, collect(model, units, KINDS, token_ids(4, 12)))
    pruner = GroupedQueryPruner(model, ids, importance, pruning_ratio=0.3, round_to=1, units=KINDS)
    gone: dict[tuple[int, str], list[int]] = {}
    layers = list(model.model.layers)
    groups = pruner.step(interactive=True)
    assert groups is not None
    for group in groups:
        if isinstance(group, KVGroup):
            gone[(next(i for i, x in enumerate(layers) if x.self_attn is group.attention), "kv_groups")] = (
                group.idxs
            )
        else:
            root = group[0][0].target.module
            gone[(next(i for i, x in enumerate(layers) if x.mlp.gate_proj is root), "ffn_neurons")] = list(
                group[0][1]
            )
        group.prune()
    lost = sum(len(idxs) * units.layers[i].cost(kind) for (i, kind), idxs in gone.items())  # type: ignore[arg-type]
    prunable = sum(x.count(kind) * x.cost(kind) for x in units.layers for kind in KINDS)
    assert lost / prunable == pytest.approx(0.3, abs=0.03)
    assert sum(p.numel() for p in model.parameters()) == units.parameters - lost
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, masked_logits(whole, gone, ids))
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
    save_backbone(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_any_importance_of_torch_pruning_fits() -> None:
    """Its own group magnitude ranks the feed-forward neurons; every layer loses the same share."""
    model = tiny_shape("llama")
    width = model.model.layers[0].mlp.gate_proj.out_features
    pruner = GroupedQueryPruner(
        model,
        None,
        tp.importance.GroupMagnitudeImportance(),
        global_pruning=False,
        pruning_ratio=0.25,
        round_to=1,
    )
    assert pruner.step() is None
    assert {layer.mlp.gate_proj.out_features for layer in model.model.layers} == {round(width * 0.75)}
    assert model.config.intermediate_size == round(width * 0.75)
    with pytest.raises(KoffError, match="has done its step"):
        pruner.step()


def test_a_group_that_is_left_alone_stays() -> None:
    """The caller decides; the config tells what is there."""
    model = tiny_shape("llama")
    width = model.model.layers[0].mlp.gate_proj.out_features
    importance = UnitImportance("magnitude", model, read_units(model))
    groups = GroupedQueryPruner(model, None, importance, False, 0.25, 1).step(interactive=True)
    assert groups is not None
    for n, group in enumerate(groups):
        if n > 0:
            group.prune()
    assert model.model.layers[0].mlp.gate_proj.out_features == width
    assert model.config.per_layer_config[1].intermediate_size < width
    assert model(input_ids=token_ids(1, 5)).logits.isfinite().all()


def test_the_gates_of_a_run_are_an_importance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the run's own sparsity the script removes what the run's plan removes."""
    out = tmp_path / "run"
    assert koff_prune(capsys, "plan", recipe_of(tmp_path), "--out", out).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plan, units = Plan.load(out / "plan.json"), read_units(model)
    share = sum(x.ffn_neurons * x.ffn_cost for x in units.layers) / units.parameters
    importance = LearnedImportance(out, model)
    groups = GroupedQueryPruner(model, None, importance, pruning_ratio=0.1 / share, round_to=1).step(True)
    assert groups is not None
    lost: list[list[int]] = [[] for _ in plan.layers]
    for group in groups:
        i = next(n for n, x in enumerate(model.model.layers) if x.mlp.gate_proj is group[0][0].target.module)
        lost[i] = list(group[0][1])
        group.prune()
    for layer, gone in zip(plan.layers, lost, strict=True):
        assert set(layer["ffn_neurons"]).isdisjoint(gone)
        assert len(layer["ffn_neurons"]) + len(gone) == units.layers[0].ffn_neurons


def test_gates_of_kv_groups_score_no_neurons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    recipe = recipe_of(tmp_path, structure={"units": ["kv_groups"], "sparsity": 0.048})
    assert koff_prune(capsys, "learn", recipe, "--out", out).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with pytest.raises(KoffError, match="learned no gates of ffn_neurons"):
        GroupedQueryPruner(model, None, LearnedImportance(out, model), pruning_ratio=0.1, round_to=1).step()


def test_gates_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence naming both counts."""
    out = tmp_path / "run"
    with pytest.raises(KoffError, match="holds no learned gates"):
        LearnedImportance(out, tiny_shape("llama"))
    assert koff_prune(capsys, "learn", recipe_of(tmp_path), "--out", out).code == 0
    with pytest.raises(KoffError, match="units; give the dense model"):
        LearnedImportance(out, tiny_shape("qwen3"))


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_both_kinds_are_ranked_as_compare_ranks_them(method: str) -> None:
    """A norm and a draw are not sums over a unit's parameters."""
    model, units = tiny_shape("llama"), read_units(tiny_shape("llama"))
    structure = Structure(units=list(KINDS), sparsity=0.2, of="blocks", round_to=1)
    kept = choose(score_units(method, model, units, structure, None), units, structure, 0.2)
    prunable = sum(x.count(kind) * x.cost(kind) for x in units.layers for kind in KINDS)
    ratio = 0.2 * units.denominator("blocks") / prunable
    GroupedQueryPruner(
        model, None, UnitImportance(method, model, units), pruning_ratio=ratio, round_to=1, units=KINDS
    ).step()
    for kind in KINDS:
        assert [x.count(kind) for x in read_units(model).layers] == [len(layer[kind]) for layer in kept]


def test_a_second_pruner_tells_the_widths_that_it_left(tmp_path: Path) -> None:
    """Widths by layer of an earlier step do not outlive it."""
    model = tiny_shape("llama").requires_grad_(False)
    for ratio, round_to in ((0.2, 4), (0.6, 16)):
        importance = UnitImportance("magnitude", model, read_units(model))
        GroupedQueryPruner(model, None, importance, pruning_ratio=ratio, round_to=round_to).step()
    assert len({x.ffn_neurons for x in read_units(model).layers}) == 1
    assert not any(p.requires_grad for p in model.parameters())
    save_backbone(model, tmp_path)
    ids = token_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_heads_that_do_not_divide_the_hidden_size_are_saved(tmp_path: Path) -> None:
    """Stock Llama refuses 3 heads of 8 channels for 32, as one width for all layers."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_key_value_heads=4))
    importance = UnitImportance("magnitude", model, read_units(model))
    units: tuple[UnitKind, ...] = ("kv_groups",)
    pruner = GroupedQueryPruner(model, None, importance, False, pruning_ratio=0.25, units=units)
    pruner.step()
    assert {x.kv_groups for x in read_units(model).layers} == {3}
    save_backbone(model, tmp_path)
    ids = token_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)


class Broken(tp.importance.Importance):
    """Gives what it is told to, whatever the group."""

    def __init__(self, value: torch.Tensor | None) -> None:
        self.value = value

    def __call__(self, group: Any, **kwargs: Any) -> torch.Tensor | None:
        return self.value


def test_mistakes_in_a_script_are_told() -> None:
    """One sentence each, before anything leaves the model."""
    model = tiny_shape("llama")
    units = read_units(model)
    whole = units.parameters
    count = units.layers[0].ffn_neurons
    magnitude = UnitImportance("magnitude", model, units)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (magnitude, {"pruning_ratio": "0.2"}, "pruning_ratio: 0.2"),
        (magnitude, {"round_to": 0}, "round_to: 0"),
        (magnitude, {"units": ()}, "units: "),
        (magnitude, {"units": "ffn_neurons"}, "units: "),
        (magnitude, {"pruning_ratio": 1e-9}, "nothing can leave"),
        (tp.importance.MagnitudeImportance(), {"units": KINDS}, "scores no kv_groups"),
        (tp.importance.TaylorImportance(), {}, "needs a backward pass first"),
        (Broken(torch.full((count,), torch.nan)), {}, "Broken gives layer 0 no"),
        (Broken(torch.ones(count - 8)), {}, "Broken gives layer 0 no"),
        (Broken(None), {}, "Broken gives layer 0 no"),
        (UnitImportance("wanda", model, units), {}, "wanda needs statistics of ffn_neurons"),
        (UnitImportance("foo", model, units), {}, "no method 'foo'"),
    ]
    for importance, more, says in cases:
        with pytest.raises(KoffError, match=re.escape(says)):
            GroupedQueryPruner(model, None, importance, **{"pruning_ratio": 0.2, **more}).step()
    with pytest.warns(UserWarning, match="asked was 0.9"):
        GroupedQueryPruner(model, None, magnitude, pruning_ratio=0.9, units=("kv_groups",)).step()
    assert sum(p.numel() for p in model.parameters()) < whole
