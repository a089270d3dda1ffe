"""Rounding, floors, ties and the file of a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import random_scores, tiny_config

from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_prune.architecture import KINDS, LayerUnits, UnitKind, Units, units_of_config
from koff_prune.plan import Plan, Scores, choose, make_plan, removed_parameters
from koff_prune.recipe import Structure

SMOLLM2 = Path(__file__).parents[1] / "recipes" / "smollm2" / "config.json"
IDENTITY = {"source": "tiny", "revision": None, "config_sha256": "abc"}


def units_like(layers: int = 4, ffn: int = 96, kv: int = 4, queries: int = 2, llama: bool = True) -> Units:
    hidden, head = 64, 8
    layer = LayerUnits(ffn, kv, 3 * hidden, head * (2 * hidden + 2 * queries * hidden), queries, head)
    block = layers * (ffn * layer.ffn_cost + kv * layer.kv_cost)
    return Units((layer,) * layers, block + 5_000, block, hidden, llama)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Units, Structure, Scores]:
    units = units_like(
        draw(st.integers(1, 6)), draw(st.integers(16, 120)), draw(st.sampled_from([1, 2, 3, 4]))
    )
    structure = Structure(
        units=draw(st.sampled_from([["ffn_neurons"], ["ffn_neurons", "kv_groups"]])),
        sparsity=draw(st.floats(0.02, 0.45)),
        of=draw(st.sampled_from(["total", "blocks"])),
        widths=draw(st.sampled_from(["per_layer", "uniform"])),
        round_to=draw(st.integers(1, 16)),
    )
    scores = random_scores(units, draw(st.integers(0, 99)))
    if draw(st.booleans()):  # many ties
        scores = {kind: [(t * 3).round() for t in layers] for kind, layers in scores.items()}
    return units, structure, scores


@pytest.mark.parametrize("seed", range(12))
def test_a_target_in_reach_is_met_whatever_the_scores(seed: int) -> None:
    """How many KV groups leave hangs on the scores; the FFN's steps are too coarse to fill any remainder."""
    units = units_of_config(read_json(SMOLLM2))
    for target in (0.12, 0.2, 0.25):
        structure = Structure(
            units=["ffn_neurons", "kv_groups"], sparsity=target, widths="uniform", round_to=16
        )
        plan = make_plan(
            random_scores(units, seed), units, structure, model=IDENTITY, method="random", ranking="global"
        )
        assert abs(plan.realised - target) <= 0.002


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans())
def test_the_realised_sparsity_is_within_half_a_step(
    problem: tuple[Units, Structure, Scores], per_layer: bool
) -> None:
    units, structure, scores = problem
    kept = choose(scores, units, structure, structure.sparsity, per_layer=per_layer)
    uniform = structure.widths == "uniform"
    step = structure.round_to * units.layers[0].ffn_cost * (len(units.layers) if uniform else 1)
    least = (
        units.layers[0].ffn_neurons - 1
    ) % structure.round_to + 1  # the first run makes the width a multiple
    short = least * units.layers[0].ffn_cost * (len(units.layers) if uniform else 1)
    assert short <= step
    miss = abs(removed_parameters(kept, units) - structure.sparsity * units.denominator(structure.of))
    reachable = sum((u.ffn_neurons - structure.round_to) * u.ffn_cost for u in units.layers)
    if structure.sparsity * units.denominator(structure.of) <= reachable:
        assert miss <= step / 2 + 1e-6
    for layer, have in zip(kept, units.layers, strict=True):
        neurons, groups = layer["ffn_neurons"], layer["kv_groups"]
        assert neurons == sorted(set(neurons)) and groups == sorted(set(groups))
        assert groups and set(groups) <= set(range(have.kv_groups))
        assert len(neurons) >= min(structure.round_to, have.ffn_neurons)
        assert len(neurons) % structure.round_to == 0 or len(neurons) == have.ffn_neurons
        if structure.widths == "uniform" and units.divisor_heads:
            assert 64 % (len(groups) * have.queries) == 0 or len(groups) == have.kv_groups
    if structure.widths == "uniform":
        assert len({(len(x["ffn_neurons"]), len(x["kv_groups"])) for x in kept}) == 1
    if "kv_groups" not in structure.units:
        assert all(len(x["kv_groups"]) == u.kv_groups for x, u in zip(kept, units.layers, strict=True))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_the_lowest_scores_of_a_layer_go_first(problem: tuple[Units, Structure, Scores]) -> None:
    units, structure, scores = problem
    kept = choose(scores, units, structure, structure.sparsity)
    for kind in structure.units:
        for i, score in enumerate(scores[kind]):
            stays = torch.zeros(len(score), dtype=torch.bool)
            stays[kept[i][kind]] = True
            if not stays.all():
                assert score[~stays].max() <= score[stays].min()


def test_global_means_global() -> None:
    units = units_like(layers=2, ffn=32)
    scores = {"ffn_neurons": [torch.full((32,), 1.0), torch.full((32,), 2.0)], "kv_groups": []}
    share = 16 * units.layers[0].ffn_cost / units.parameters
    structure = Structure(sparsity=share, round_to=8)
    assert [len(x["ffn_neurons"]) for x in choose(scores, units, structure, share)] == [16, 32]
    even = choose(scores, units, structure, share, per_layer=True)
    assert [len(x["ffn_neurons"]) for x in even] == [24, 24]


@pytest.mark.parametrize("cheaper", [0, 1])
def test_the_middle_neuron_of_a_run_speaks_for_it(cheaper: int) -> None:
    """Of two runs of four, the one that goes is lower in its third score, and higher in all else."""
    units = units_like(layers=2, ffn=32)
    high = torch.arange(200.0, 228.0)
    runs = [torch.tensor([1.0, 1.0, 4.0, 100.0]), torch.tensor([0.0, 0.0, 5.0, 6.0])]
    scores: Scores = {"ffn_neurons": [torch.cat([high, run]) for run in runs], "kv_groups": []}
    if cheaper == 1:
        scores["ffn_neurons"].reverse()
    share = 4 * units.layers[0].ffn_cost / units.parameters
    kept = choose(scores, units, Structure(sparsity=share, round_to=4), share)
    assert kept[cheaper]["ffn_neurons"] == list(range(28))
    assert kept[1 - cheaper]["ffn_neurons"] == list(range(32))


@pytest.mark.parametrize("kinds", [["ffn_neurons"], ["ffn_neurons", "kv_groups"], ["kv_groups"]])
def test_per_layer_takes_the_same_share_of_every_layer(kinds: list[UnitKind]) -> None:
    """However much lower the scores of one layer are, KV groups among them."""
    units = units_like(layers=6)
    scores: Scores = {
        kind: [t + i for i, t in enumerate(table)] for kind, table in random_scores(units).items()
    }
    structure = Structure(units=kinds, sparsity=0.3, of="blocks", round_to=4)
    kept = choose(scores, units, structure, 0.3, per_layer=True)
    layer = units.layers[0]
    gone = [sum((layer.count(k) - len(x[k])) * layer.cost(k) for k in KINDS) for x in kept]
    whole = units.block_parameters / len(units.layers)
    step = layer.kv_cost if kinds == ["kv_groups"] else 4 * layer.ffn_cost
    assert all(abs(g - 0.3 * whole) <= step for g in gone), [g / whole for g in gone]
    assert removed_parameters(kept, units) == pytest.approx(0.3 * units.block_parameters, abs=step / 2)


def test_kv_groups_go_where_their_scores_are_lowest() -> None:
    units = units_like(layers=2)
    scores = random_scores(units)
    scores["ffn_neurons"] = [t + 1 for t in scores["ffn_neurons"]]
    scores["kv_groups"][0][2] = -1.0
    scores["kv_groups"][1][:] = torch.tensor([-5.0, -6.0, -7.0, -8.0])  # all of them lowest: one must stay
    structure = Structure(units=["ffn_neurons", "kv_groups"], sparsity=0.3, of="blocks")
    kept = choose(scores, units, structure, 0.3)
    assert 2 not in kept[0]["kv_groups"]
    assert kept[1]["kv_groups"] == [0]


def test_kv_groups_alone() -> None:
    units = units_like()
    cost = units.layers[0].kv_cost
    structure = Structure(units=["kv_groups"], sparsity=5 * cost / units.parameters)
    kept = choose(random_scores(units), units, structure, structure.sparsity)
    assert removed_parameters(kept, units) == 5 * cost
    assert all(len(x["ffn_neurons"]) == 96 for x in kept)


def test_uniform_llama_keeps_a_head_count_that_divides_hidden_size() -> None:
    scores = random_scores(units_like(kv=6, queries=1, llama=True))
    scores["ffn_neurons"] = [t + 5 for t in scores["ffn_neurons"]]
    structure = Structure(units=["ffn_neurons", "kv_groups"], sparsity=0.3, of="blocks", widths="uniform")
    counts = {}
    for llama in (True, False):
        units = units_like(kv=8, queries=1, llama=llama)
        budget = 3 * units.layers[0].kv_cost * len(units.layers) / units.block_parameters
        kept = choose(
            random_scores(units) | {"ffn_neurons": scores["ffn_neurons"]}, units, structure, budget * 1.01
        )
        counts[llama] = len(kept[0]["kv_groups"])
    assert counts == {False: 5, True: 8}  # the scores ask for 5, which does not divide 64
    assert units_of_config(tiny_config("llama").to_dict()).divisor_heads
    assert units_of_config(tiny_config("gemma3").to_dict()).divisor_heads
    assert not units_of_config(tiny_config("qwen2").to_dict()).divisor_heads


def test_make_plan_tells_what_it_did() -> None:
    units = units_like()
    structure = Structure(sparsity=0.2, round_to=1)
    plan = make_plan(random_scores(units), units, structure, model=IDENTITY, method="wanda", ranking="global")
    gone = removed_parameters(plan.layers, units)
    assert plan.realised == gone / units.parameters == pytest.approx(0.2, abs=0.002)
    assert plan.parameters == {"dense": units.parameters, "slim": units.parameters - gone}
    assert (plan.method, plan.ranking, plan.target, plan.round_to) == ("wanda", "global", 0.2, 1)


def test_an_unreachable_target_names_the_two_nearest() -> None:
    units = units_like(layers=1, ffn=32, kv=1)
    cost = 8 * units.layers[0].ffn_cost / units.parameters  # one step
    structure = Structure(sparsity=round(1.4 * cost, 4), round_to=8)
    with pytest.raises(KoffError) as caught:
        make_plan(random_scores(units), units, structure, model=IDENTITY, method="random", ranking="global")
    assert f"nearest are {cost:.4f} and {2 * cost:.4f}" in str(caught.value)
    assert "structure.sparsity" in str(caught.value) and "\n" not in str(caught.value)
    too_much = Structure(sparsity=0.95, round_to=8)
    with pytest.raises(KoffError, match=f"at most {3 * cost:.4f} of total .*lower it, or add kv_groups"):
        make_plan(random_scores(units), units, too_much, model=IDENTITY, method="random", ranking="global")


@pytest.fixture
def plan() -> Plan:
    units = units_like()
    structure = Structure(sparsity=0.2, round_to=1)
    return make_plan(
        random_scores(units), units, structure, model=IDENTITY, method="random", ranking="global"
    )


def test_saved_is_loaded(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["format"] == 1 and data["digest"] == plan.digest


def test_the_digest_is_over_layers_and_config_alone(plan: Plan) -> None:
    same = Plan(**{**plan.__dict__, "method": "koff", "target": 0.3, "model": {**IDENTITY, "source": "else"}})
    assert same.digest == plan.digest
    config = Plan(**{**plan.__dict__, "model": {**IDENTITY, "config_sha256": "other"}})
    assert config.digest != plan.digest
    layers = [dict(layer) for layer in plan.layers]
    layers[0]["ffn_neurons"] = layers[0]["ffn_neurons"][1:]
    assert Plan(**{**plan.__dict__, "layers": layers}).digest != plan.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d | {"format": 2}, "format is 2, this version reads plan format 1"),
        (lambda d: d | {"digest": "0"}, "`digest` does not match"),
        (lambda d: {k: v for k, v in d.items() if k != "layers"}, "not a plan"),
        (lambda d: d | {"layers": [{"ffn_neurons": [1]}]}, "not a plan"),
        (lambda d: d | {"layers": [{"ffn_neurons": [2, 1], "kv_groups": [0]}]}, "must ascend"),
        (lambda d: d | {"layers": [{"ffn_neurons": [], "kv_groups": [0]}]}, "at least one"),
        (lambda d: d | {"layers": [{"ffn_neurons": [-1], "kv_groups": [0]}]}, "whole numbers"),
        (lambda d: d | {"layers": [{"ffn_neurons": [True], "kv_groups": [0]}]}, "whole numbers"),
        (lambda d: d | {"layers": 3}, "not a plan"),
        (lambda d: d | {"model": None}, "not a plan"),
        (lambda d: [d], "format is 'list'"),
    ],
)
def test_a_bad_plan_is_one_sentence(plan: Plan, tmp_path: Path, change, says: str) -> None:  # type: ignore[no-untyped-def]
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(change(data)))
    with pytest.raises(KoffError, match=says) as caught:
        Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)
