"""The order in which units go, and what each costs at its turn."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from model_helpers import tiny_model, token_ids
from run_helpers import recipe_of

import koff_prune
from koff_prune.compensate import predict
from koff_prune.recipe import Structure
from koff_prune.scores import collect, consumer, removal_costs
from koff_prune.surgeon import MEND, damping, elimination_costs
from koff_prune.units import KINDS, read_units

RIDGE = 1e-6


def problem(
    units: int = 24, size: int = 1, hidden: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second moments of correlated inputs, a weight and an output metric."""
    torch.manual_seed(3)
    channels = units * size
    x = torch.randn(400, channels) @ torch.randn(channels, channels)
    g = torch.randn(200, hidden) @ torch.randn(hidden, hidden)
    return x.T @ x / len(x), torch.randn(hidden, channels), g.T @ g / len(g)


def independent(second: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, size: int) -> torch.Tensor:
    """A unit's Fisher information where inputs and gradients are independent."""
    metric = weight.T @ output @ weight
    parts = (metric * second).view(len(second) // size, size, -1, size)
    return torch.stack([parts[u, :, u].sum() for u in range(len(parts))])


@pytest.mark.parametrize("at_once", [1, 6])
@pytest.mark.parametrize("size", [1, 3])
def test_costs_add_up_to_the_damage_that_compensation_leaves(
    size: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where several go at once, as in layers of many units: counted after the others are gone."""
    monkeypatch.setattr("koff_prune.surgeon.STEPS", 24 // at_once)
    second, weight, output = problem(size=size)
    information = independent(second, weight, output, size)
    costs = elimination_costs(second, weight, output, information, RIDGE)
    order = costs.argsort(stable=True)
    found: list[float] = []
    for count in (1, 5, 12) if at_once == 1 else (6, 12, 18):
        gone = order[:count]
        drop = (gone[:, None] * size + torch.arange(size)).reshape(-1).sort().values
        keep = torch.tensor([c for c in range(len(second)) if c not in set(drop.tolist())])
        b = predict(second, keep, drop, RIDGE)
        left = second[drop][:, drop] - b @ second[keep][:, drop]
        damage = torch.trace(weight[:, drop].T @ output @ weight[:, drop] @ left) / 2
        # a unit that goes for less than the one before it is told at that one's cost
        if at_once == 1:
            assert 0.99 * damage <= costs[gone].sum() <= 1.1 * damage
        else:  # what they say alike is lost with them, and their costs do not tell
            assert costs[gone].sum() <= 1.1 * damage
            found.append(float(costs[gone].sum() / damage))
    assert at_once == 1 or found[-1] > 0.5, found


def test_what_two_say_alike_is_cheap_to_lose_once() -> None:
    second = torch.eye(4)
    second[0, 1] = second[1, 0] = 0.999
    costs = elimination_costs(second, torch.eye(4), torch.eye(4), torch.ones(4), RIDGE)
    first, twin = costs[:2].sort().values
    assert first < 0.01
    assert twin > costs[2:].max()  # it speaks for both now
    assert torch.allclose(costs[2:], torch.full((2,), 0.5), atol=1e-3)


def test_information_corrects_what_independence_gets_wrong() -> None:
    second, weight, output = torch.eye(3), torch.eye(3), torch.eye(3)
    information = torch.tensor([4.0, 1.0, 2.0])  # 2 times what independence says, give or take
    costs = elimination_costs(second, weight, output, information, RIDGE)
    assert torch.allclose(costs, torch.tensor([2**MEND, 0.5**MEND, 1.0]), atol=1e-3)


def test_what_independence_gets_wrong_in_a_whole_layer_is_mended_wholly() -> None:
    """Else layers would be compared by it: two thirds of one layer were removed and nothing of others."""
    second, weight, output = problem()
    information = independent(second, weight, output, 1) * torch.rand(len(second))
    costs = elimination_costs(second, weight, output, information, RIDGE)
    assert torch.allclose(elimination_costs(second, weight, 9 * output, information, RIDGE), costs, rtol=1e-3)
    assert torch.allclose(
        elimination_costs(second, weight, output, 9 * information, RIDGE), 9 * costs, rtol=1e-3
    )


def test_one_massive_unit_does_not_make_the_others_dear() -> None:
    """The ridge is of their scale, not of the massive one's: else nothing of its layer would be removed."""
    second, weight, output = problem()
    second = torch.eye(len(second)) + 0.3 * torch.corrcoef(second)
    information = independent(second, weight, output, 1)
    plain = elimination_costs(second, weight, output, information, 0.01)
    scale = torch.ones(len(second))
    scale[0] = 1000
    massive = elimination_costs(
        second * scale * scale[:, None], weight / scale, output, information, 0.01
    )  # the same layer otherwise
    assert torch.allclose(massive, plain, rtol=0.05)


def test_the_ridge_is_of_the_live_channels_scale() -> None:
    diagonal = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 500.0])
    assert damping(diagonal.diag(), 0.01).tolist() == pytest.approx([0.02] * 4 + [0.02002] * 2 + [0.025])
    assert (damping(torch.zeros(3, 3), 0.01) > 0).all()


def test_fewer_labelled_tokens_than_hidden_channels_still_give_costs() -> None:
    """Of short scoring text, or of chats of which little is learned, G is singular and rounded."""
    second, weight, _ = problem(hidden=300)
    g = torch.randn(60, 300) * 1e-3
    output = sum((g[i : i + 7].T @ g[i : i + 7] for i in range(0, 60, 7)), torch.zeros(300, 300))
    output -= 1e-7 * output.diagonal().mean() * torch.eye(300)
    costs = elimination_costs(second, weight, output, torch.ones(len(second)), RIDGE)
    assert torch.isfinite(costs).all() and (costs > 0).any()


def test_a_dead_unit_makes_the_others_no_cheaper() -> None:
    second, weight, output = torch.eye(4), torch.eye(4), torch.eye(4)
    costs = elimination_costs(second, weight, output, torch.tensor([0.0, 4.0, 1.0, 2.0]), RIDGE)
    assert costs[0] < 1e-6
    assert torch.allclose(costs[1:], torch.tensor([2**MEND, 0.5**MEND, 1.0]), atol=1e-3)
    assert elimination_costs(second, weight, output, torch.zeros(4), RIDGE).max() < 1e-6


def test_costs_of_a_model_see_what_others_take_over() -> None:
    """Units that stay say for a unit what they can, so that the first of a layer goes for less than alone."""
    model = tiny_model()
    units, structure = read_units(model), Structure(units=list(KINDS))
    found = collect(model, units, KINDS, token_ids(5, 12, seed=4))
    costs = removal_costs("surgeon", model, units, structure, found, RIDGE)
    for kind in KINDS:
        for i, mine in enumerate(costs[kind]):
            place, have = (i, kind), units.layers[i]
            weight, size = consumer(model.model.layers[i], kind).weight, have.queries * have.head_dim
            size = size if kind == "kv_groups" else 1
            alike = independent(found.second[place] / found.tokens, weight, found.output[place], size)
            wrong = found.curvature[place] / alike
            layer = wrong.log().mean().exp()
            alone = alike / found.tokens * layer * (wrong / layer) ** MEND / have.cost(kind) / 2
            assert mine.shape == (have.count(kind),)
            assert 0 < mine.min() < alone.min()


def test_output_moments_are_those_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """W^T G W is what drawn labels give at the consumer's input."""
    model = tiny_model()
    units = read_units(model)
    seen: list[torch.Tensor] = []
    weight = consumer(model.model.layers[0], "ffn_neurons").weight
    from koff_prune import scores

    before = scores._accumulate_drawn

    def watch(
        result: object, place: tuple[int, str], x: torch.Tensor, g: torch.Tensor, units: object
    ) -> None:
        if place == (0, "ffn_neurons"):
            seen.append(g.clone())
        before(result, place, x, g, units)  # type: ignore[arg-type]

    monkeypatch.setattr(scores, "_accumulate_drawn", watch)
    found = collect(model, units, ["ffn_neurons"], token_ids(3, 12, seed=4)).output[(0, "ffn_neurons")]
    g = torch.cat(seen)
    assert torch.allclose(weight.T @ found @ weight, g.T @ g / scores.DRAWS, rtol=1e-3, atol=1e-9)


def test_without_compensation_nothing_takes_over(tmp_path: Path) -> None:
    """Then the start is the curvature itself; with it, another one."""
    plans = {}
    for start, compensate in itertools.product(("surgeon", "curvature"), ("none", "least_squares")):
        folder = tmp_path / f"{start}-{compensate}"
        gates = {"start": start, "learning_rate": 0}
        recipe = recipe_of(
            folder, cut={"compensate": compensate}, structure={"sparsity": 0.2},
            learn={"tokens": 64, "settle_tokens": 0, "gates": gates},
        )  # fmt: skip
        plans[start, compensate] = koff_prune.plan(recipe, folder / "run").digest
    assert plans["surgeon", "none"] == plans["curvature", "none"]
    assert plans["surgeon", "least_squares"] != plans["curvature", "least_squares"]
    assert plans["curvature", "none"] == plans["curvature", "least_squares"]
