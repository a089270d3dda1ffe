"""What a recipe asks for reaches what computes it: budgets, weights, losses, ridges, priors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_helpers import memories_on, tiny_shape, token_ids
from run_helpers import koff_prune, recipe_of

from koff_prune import stages
from koff_prune.arms import Arm
from koff_prune.compensate import Compensation, PredictionHooks
from koff_prune.gates import GateHooks, Gates
from koff_prune.learn import Phase
from koff_prune.learner import Learner
from koff_prune.memory import Memories
from koff_prune.plan import choose
from koff_prune.reading import load_recipe
from koff_prune.recipe import Learn, Structure
from koff_prune.run import Run
from koff_prune.scores import collect, removal_costs
from koff_prune.units import KINDS, read_units
from koff_prune.weights import Weights


def test_every_row_is_trained_as_its_report_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens are counted where they are read, and each domain's; one schedule runs through both phases."""
    recipe = recipe_of(tmp_path, compare=[{"method": "magnitude", "trained_with": "same"},
                                          {"method": "dense", "trained_with": "same"}])  # fmt: skip
    told = yaml.safe_load(recipe.read_text())
    told["domains"]["code"]["weight"] = 2
    recipe.write_text(yaml.safe_dump(told))
    trainings: list[tuple[str, Phase, Counter[str]]] = []
    train, forward = stages.train, Learner.forward

    def spy(memories: Memories, windows: Any, learn: Learn, phase: Phase, place: Path, **options: Any) -> Any:
        trainings.append((place.parent.parent.name, phase, Counter()))
        return train(memories, windows, learn, phase, place, **options)

    def reads(self: Learner, input_ids: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        trainings[-1][2][self.memories.domains[int(domain[0])]] += input_ids.numel()
        return forward(self, input_ids, domain)

    monkeypatch.setattr(stages, "train", spy)
    monkeypatch.setattr(Learner, "forward", reads)
    assert koff_prune(capsys, "compare", recipe, "--out", tmp_path / "run").code == 0
    assert [name.partition("_")[0] for name, _, _ in trainings] == ["run", "run", "magnitude", "dense"]
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    koff, rivals = rows[1], rows[3:]
    (_, joint, learned), (_, settle, settled), *alone = trainings
    assert (joint.begin, settle.end) == (0.0, 1.0)
    assert 0 < joint.end == settle.begin < 1
    assert (koff["tokens"]["learn"], koff["tokens"]["settle"]) == (learned.total(), settled.total())
    assert len(rivals) == len(alone) == 2
    for row, (_, phase, seen) in zip(rivals, alone, strict=True):
        assert (phase.begin, phase.end) == (0.0, 1.0)
        assert row["tokens"]["settle"] == seen.total() == learned.total() + settled.total()
    for _, _, seen in trainings:
        assert seen["code"] == 2 * seen["law"]
    magnitude, dense = rivals
    assert magnitude["tokens"]["score"] == koff["tokens"]["score"] > 0, "its compensation reads the text"
    assert dense["tokens"]["score"] == 0


@pytest.mark.parametrize("better", ["global", "per_layer"])
def test_the_better_ranking_is_the_one_of_less_loss_on_scoring_text(
    better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = [1.0, 2.0] if better == "global" else [2.0, 1.0]  # global is judged first
    with Run(load_recipe(recipe_of(tmp_path)), tmp_path / "run", resume=False) as run:
        scoring = [blocks.scoring for blocks in run.domains.values()]
        seen: list[torch.Tensor] = []

        def judge(memories: Memories, windows: torch.Tensor, domain: Any, progress: Any) -> list[float]:
            assert domain in run.domains  # none has a memory yet; its own tokens, if any, it has
            seen.append(windows)
            return [losses[(len(seen) - 1) // len(scoring)]] * len(windows)

        monkeypatch.setattr(stages, "window_losses", judge)
        assert stages.better_ranking(run, "magnitude", "none") == better
        assert len(seen) == 2 * len(scoring)
        assert all(torch.equal(a, b) for a, b in zip(seen, [*scoring, *scoring], strict=True))


def test_gates_are_given_what_the_recipe_and_the_scoring_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path)
    told = yaml.safe_load(recipe.read_text())
    told["learn"] |= {"tokens": 0, "gates": {"start": "surgeon", "prior_tokens": 12_345}}
    recipe.write_text(yaml.safe_dump(told))
    given: list[tuple[Any, ...]] = []

    class Spy(Gates):
        def __init__(self, *args: Any) -> None:
            given.append(args)
            super().__init__(*args)

    monkeypatch.setattr(stages, "Gates", Spy)
    with Run(load_recipe(recipe), tmp_path / "run", resume=False) as run:
        arm = Arm("koff", None, "re_estimated", 1.0, "surgeon", "none", "none", "least_squares")
        stages.learn_arm(run, arm, tmp_path / "run")
        _, _, form, start, seed, prior, scored, information = given[0]
        assert (form, seed, prior) == ("re_estimated", 0, 12_345)
        assert scored == sum(int(blocks.scoring.numel()) for blocks in run.domains.values())
        curvature = removal_costs(
            "curvature", run.dense.model, run.units, run.recipe.structure, run.statistics
        )["ffn_neurons"]  # fmt: skip
        for mine, wanted, begun in zip(
            information["ffn_neurons"], curvature, start["ffn_neurons"], strict=True
        ):
            torch.testing.assert_close(mine, wanted)
            assert not torch.equal(begun, wanted)


def test_the_ridge_is_the_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hardly any compensates otherwise than much, and much hardly compensates."""
    recipe, found = recipe_of(tmp_path), {}
    for ridge in ("0.0001", "1", "none"):
        change = "cut.compensate=none" if ridge == "none" else f"cut.ridge={ridge}"
        out = tmp_path / ridge
        how = ("--set", change, "--set", "learn.gates={start: magnitude, learning_rate: 0}")
        answer = koff_prune(capsys, "cut", recipe, "--out", out, *how)
        assert answer.code == 0, answer.err
        weights = Weights.open(out / "backbone").read()
        found[ridge] = torch.cat([t.flatten() for name, t in weights.items() if "down_proj" in name])
    little, much = (float((found[ridge] - found["none"]).norm()) for ridge in ("0.0001", "1"))
    assert 0 < much < 0.9 * little


def learner(**loss: float) -> tuple[Learner, Memories]:
    """A learner around a tiny model whose gates close a third of the blocks."""
    model = tiny_shape("llama")
    units = read_units(model)
    memories = memories_on(model, ("law",), kv=False)
    structure = Structure(units=["ffn_neurons"], sparsity=0.3, of="blocks", round_to=1)
    gates = Gates(units, structure, "straight_through", None, 0)
    made = Learner(
        memories, gates, None, Learn.model_validate({"loss": loss}), GateHooks(memories.model, units)
    )
    return made, memories


def test_both_parts_of_the_loss_weigh_what_the_recipe_says() -> None:
    ids, domain = token_ids(2, 12), torch.zeros(2, dtype=torch.long)

    def loss(ce: float, kl: float) -> float:
        made, _ = learner(ce=ce, kl=kl)
        made.begin_step(0, 0.3)
        return float(made(ids, domain).detach())

    cross, divergence = loss(1, 0), loss(0, 1)
    assert 0 < divergence < cross
    assert loss(0.5, 2) == pytest.approx(0.5 * cross + 2 * divergence, rel=1e-5)


def test_in_a_chat_the_teacher_speaks_of_the_same_tokens() -> None:
    """With all gates open and nothing in the memory the pupil is the teacher, token for token."""
    made, memories = learner(ce=0, kl=1)
    made.begin_step(0, 0.0)
    for parameter in memories.lora_parameters():
        parameter.data.zero_()
    ids = token_ids(2, 12)
    ids[:, 3:8] = -1 - ids[:, 3:8]
    assert float(made(ids, torch.zeros(2, dtype=torch.long)).detach()) == pytest.approx(0, abs=1e-5)


def test_a_closed_unit_is_judged_by_what_its_prediction_lacks() -> None:
    """Its gradient is that of opening it in its prediction's place: a finite difference says the same."""
    model = tiny_shape("llama")
    units = read_units(model)
    second = collect(model, units, ["ffn_neurons"], token_ids(4, 16)).second
    structure = Structure(units=["ffn_neurons"], sparsity=0.3, of="blocks", round_to=1)
    gates = Gates(units, structure, "straight_through", None, 0)
    hooks = GateHooks(model, units)
    predictions = PredictionHooks(model, Compensation(second, 0.01, units))
    torch.manual_seed(0)
    scores: Any = {"ffn_neurons": [torch.randn(layer.ffn_neurons) for layer in units.layers]}
    ids = token_ids(2, 10, seed=3)

    def loss(z: torch.Tensor) -> torch.Tensor:
        hooks.set(gates, z)
        predictions.z = hooks.z
        return model(input_ids=ids, labels=ids).loss

    other = choose(scores, units, structure, 0.2)
    kept = choose({k: [-s for s in v] for k, v in scores.items()}, units, structure, 0.3)
    predictions.refresh(other, torch.zeros(()))  # of a mask that has moved since
    predictions.refresh(kept, torch.zeros(()))
    mask = gates.mask(kept).float()
    z = mask.clone().requires_grad_()
    loss(z).backward()
    assert z.grad is not None
    closed = (mask == 0).nonzero()[:, 0]
    assert len(closed) > 20
    with torch.no_grad():
        for unit in closed[:: len(closed) // 8].tolist():
            step = torch.zeros_like(mask).index_fill(0, torch.tensor(unit), 1e-2)
            slope = (loss(mask + step) - loss(mask - step)) / 2e-2
            assert float(z.grad[unit]) == pytest.approx(float(slope), rel=0.02, abs=1e-5)
    hooks.remove()
    predictions.remove()


@pytest.mark.parametrize("method", ["fisher", "curvature"])
def test_costs_of_removal_are_half_the_information_of_a_token(method: str) -> None:
    model = tiny_shape("llama")
    units, structure = read_units(model), Structure(units=["ffn_neurons"], sparsity=0.3)
    found = collect(model, units, KINDS, token_ids(4, 16))
    costs = removal_costs(method, model, units, structure, found)["ffn_neurons"]
    known = getattr(found, method)
    for i, cost in enumerate(costs):
        torch.testing.assert_close(cost, known[(i, "ffn_neurons")] / 2 / 64)


def test_overlap_is_the_share_of_what_the_second_removes() -> None:
    units = read_units(tiny_shape("llama"))
    structure = Structure(units=["ffn_neurons"], sparsity=0.3, of="blocks", round_to=1)
    rising: Any = {"ffn_neurons": [torch.linspace(0, 1, layer.ffn_neurons) for layer in units.layers]}
    falling: Any = {"ffn_neurons": [score.flip(0) for score in rising["ffn_neurons"]]}
    a, b = (Gates(units, structure, "straight_through", start, 0) for start in (rising, falling))
    for gates in (a, b):
        gates.advance(0, 0.3)
    assert stages.overlap(a, a) == 1
    gone_a, gone_b = (~gates.mask(gates.kept()) for gates in (a, b))
    share = float((gone_a & gone_b).sum() / gone_b.sum())
    assert share < 0.9
    assert stages.overlap(a, b) == pytest.approx(share)


def test_a_random_plan_is_its_seeds(tmp_path: Path) -> None:
    recipe, plans = recipe_of(tmp_path), []
    for seed in (0, 1):
        checked = load_recipe(recipe, [f"seed={seed}"])
        with Run(checked, tmp_path / f"run-{seed}", resume=False) as run:
            plans.append(stages.plan_arm(run, Arm("random", "global"), tmp_path / f"plan-{seed}").digest)
    assert plans[0] != plans[1]
