"""All forms of gates, the controller that holds the target, and where a gate sits."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from model_helpers import memories_on, random_scores, tiny_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from koff_prune.gates import BETA, EVERY, GAMMA, ZETA, GateHooks, Gates
from koff_prune.learner import Learner
from koff_prune.memory import Memories
from koff_prune.plan import choose, removed_parameters
from koff_prune.recipe import Learn, Memory, Structure
from koff_prune.surgeon import MEND
from koff_prune.units import KINDS, UnitKind, Units, read_units

HARD, STRAIGHT = "hard_concrete", "straight_through"


@pytest.fixture(scope="module")
def units() -> Units:
    return read_units(tiny_model())


def gates_of(of: Units, form: str, *, seed: int = 0, start: bool = True, **structure: object) -> Gates:
    section = Structure(**{"units": list(KINDS), "sparsity": 0.3, "of": "blocks", "round_to": 4, **structure})  # type: ignore[arg-type]
    return Gates(of, section, form, random_scores(of) if start else None, seed)


def test_draws_are_equal_for_equal_seed_and_step(units: Units) -> None:
    def draws(seed: int, steps: list[int]) -> list[torch.Tensor]:
        gates = gates_of(units, HARD, seed=seed)
        found = []
        for step in steps:
            gates.advance(step, 0.1)
            torch.rand(7)  # whatever else draws in between
            found.append(gates.draw().detach().clone())
        return found

    first, again = draws(3, [0, 1, 2]), draws(3, [2, 0])
    assert torch.equal(first[2], again[0]) and torch.equal(first[0], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    other = draws(4, [1, 2])
    assert not torch.equal(first[1], other[0]) and not torch.equal(first[2], other[1])
    assert not torch.equal(first[2], other[0]), "a seed's draws are not the next one's, a step later"
    gates = gates_of(units, HARD)
    gates.advance(5, 0.1)
    once = gates.draw().detach().clone()
    with torch.no_grad():
        gates.alpha += 0.5  # as an optimizer does: the noise stays, and all that is not shut opens further
    again = gates.draw().detach()
    inside = (once > 0) & (once < 1)
    assert inside.any() and (again[inside] > once[inside]).all() and (again >= once).all()


def test_hard_concrete_is_the_papers_distribution(units: Units) -> None:
    gates = gates_of(units, HARD)
    with torch.no_grad():
        gates.alpha.copy_(torch.linspace(-3, 3, len(gates.alpha)))
    count, opened, gone = 4000, torch.zeros_like(gates.cost), 0.0
    whole = units.denominator("blocks")
    for step in range(count):
        gates.advance(step, 0.0)
        z = gates.draw().detach()
        assert ((z >= 0) & (z <= 1)).all()
        opened += z > 0
        gone += float((gates.cost * (z == 0)).sum()) / whole
    wanted = torch.sigmoid(gates.alpha.detach() - BETA * math.log(-GAMMA / ZETA))
    assert (opened / count - wanted).abs().max() < 0.04  # five standard deviations
    assert gone / count == pytest.approx(float(gates.expected_sparsity().detach()), abs=0.003)


def test_the_gradient_of_a_hard_concrete_draw(units: Units) -> None:
    gates = gates_of(units, HARD)
    gates.advance(1, 0.2)
    gates.draw().sum().backward()
    z, grad = gates.draw().detach(), gates.alpha.grad
    assert grad is not None
    inside = (z > 0) & (z < 1)
    s = (z - GAMMA) / (ZETA - GAMMA)
    assert torch.allclose(grad[inside], ((ZETA - GAMMA) * s * (1 - s) / BETA)[inside], atol=1e-4)
    assert (grad[~inside] == 0).all() and inside.any() and (~inside).any()


@pytest.mark.parametrize("widths", ["per_layer", "uniform"])
def test_the_augmented_lagrangian_reaches_its_target(units: Units, widths: str) -> None:
    gates = gates_of(units, HARD, widths=widths, units=["ffn_neurons"], sparsity=0.2)
    ascent = {"params": [gates.lagrange], "lr": 0.5, "maximize": True}
    optimizer = torch.optim.Adam([{"params": [gates.alpha], "lr": 0.05}, ascent])
    for step in range(400):
        gates.advance(step, 0.2 * min(1.0, (step + 1) / 100))
        optimizer.zero_grad()
        gates.penalty().backward()
        optimizer.step()
    assert float(gates.expected_sparsity().detach()) == pytest.approx(0.2, abs=0.02)
    if widths == "uniform":
        closed = gates.cost * (1 - torch.sigmoid(gates.alpha.detach() - BETA * math.log(-GAMMA / ZETA)))
        each = [float(closed[a:b].sum()) * 3 / units.block_parameters for _, _, a, b in gates.slots]
        assert each == pytest.approx([0.2] * 3, abs=0.03)


def test_straight_through_is_the_hard_mask_with_the_gradient_of_sigma(units: Units) -> None:
    gates = gates_of(units, STRAIGHT)
    gates.advance(0, 0.2)
    z = gates.draw()
    assert set(z.detach().unique().tolist()) <= {0.0, 1.0}
    kept = choose(gates.scores(), units, gates.structure, 0.2)
    assert torch.equal(z.detach().bool(), gates.mask(kept))
    z.sum().backward()
    soft = torch.sigmoid(gates.alpha.detach())
    assert gates.alpha.grad is not None
    assert torch.allclose(gates.alpha.grad, soft * (1 - soft))
    assert float(gates.penalty()) == 0.0
    expected = removed_parameters(kept, units) / units.block_parameters
    assert float(gates.expected_sparsity()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", [HARD, STRAIGHT])
@pytest.mark.parametrize("kinds", [["ffn_neurons"], ["ffn_neurons", "kv_groups"]], ids=["ffn", "both"])
@pytest.mark.parametrize("widths", ["per_layer", "uniform"])
def test_unlearned_gates_choose_what_their_start_chooses(
    units: Units, form: str, widths: str, kinds: list[str]
) -> None:
    for seed in range(20):  # scores as uneven as real ones
        uneven = {
            kind: [(8 * t).exp() for t in layers] for kind, layers in random_scores(units, seed).items()
        }
        section = Structure(units=kinds, sparsity=0.3, of="blocks", round_to=4, widths=widths)  # type: ignore[arg-type]
        gates = Gates(units, section, form, uneven, 0)
        assert gates.kept() == choose(uneven, units, section, 0.3)
        assert gates.kept(0.1) == choose(uneven, units, section, 0.1)
    assert gates.alpha.dtype == torch.float32


@pytest.mark.parametrize("kinds", [["ffn_neurons"], list(KINDS)], ids=["ffn", "both"])
def test_costs_are_re_estimated_from_gradients(units: Units, kinds: list[UnitKind]) -> None:
    """Two steps by hand: weights 1 and 2, shrunk by n / (n + prior), closed units without their fit.

    Where kinds are mixed, costs and gradients are by parameter.
    """
    structure = Structure(units=kinds, sparsity=0.3, of="blocks", round_to=4)
    start = {kind: [0.1 + s.abs() for s in layers] for kind, layers in random_scores(units).items()}
    gates = Gates(units, structure, "re_estimated", start, 0, prior_tokens=100)
    prior = gates.alpha.detach().clone()
    each = gates.cost if len(kinds) > 1 else 1.0
    if len(kinds) == 1:
        assert torch.equal(prior, torch.cat(start["ffn_neurons"]).float())
    generator = torch.Generator().manual_seed(0)
    means = []
    for step in range(2):
        gates.advance(step, 0.3)
        z = gates.draw()
        assert z is gates.draw() and z.requires_grad
        assert torch.equal(z.detach() > 0.5, gates.mask(choose(start, units, structure, 0.3)))
        slope = torch.randn(z.shape, generator=generator)
        (z * slope * each).sum().backward()
        closed = z.detach() < 0.5
        fit = slope[closed].sum() / prior[closed].sum()
        means.append(torch.where(closed, fit * prior - slope, -slope))
        gates.observe(tokens=50)
    mean = (means[0] + 2 * means[1]) / 3
    seen = 50 * 3**2 / (1 + 4)  # as many tokens as equally weighted steps of the same noise would have
    torch.testing.assert_close(gates.alpha.detach(), prior + seen / (seen + 100) * mean)
    assert float(gates.penalty()) == 0


@pytest.mark.parametrize("kinds", [["ffn_neurons"], list(KINDS)], ids=["ffn", "both"])
@pytest.mark.parametrize("informed", [False, True])
def test_curvature_of_training_is_pooled_with_the_starts(
    units: Units, informed: bool, kinds: list[UnitKind]
) -> None:
    """200 tokens scored, 50 trained: a fifth of h is the training's, on the old scale in each state.

    A start that is not the information itself (the surgeon's) follows its unit's by a power; where kinds are
    mixed, all is told by parameter.
    """
    structure = Structure(units=kinds, sparsity=0.3, of="blocks", round_to=4)
    start, known = (
        {kind: [0.1 + s.abs() for s in layers] for kind, layers in random_scores(units, seed).items()}
        for seed in (0, 1)
    )
    information = known if informed else None
    gates = Gates(
        units, structure, "re_estimated", start, 0, prior_tokens=100, scored_tokens=200,
        information=information,
    )  # fmt: skip
    flat = torch.cat([(known if informed else start)[kind][i] for i, kind, _, _ in gates.slots])
    prior = gates.alpha.detach().clone()
    gates.advance(0, 0.3)
    z = gates.draw()
    (z * 0).sum().backward()
    gates.squares += 7 * prior * torch.linspace(0.5, 1.5, len(prior))
    gates.observe(tokens=50)
    squares = gates.squares / gates.cost if len(kinds) > 1 else gates.squares
    for state in (z < 0.5, z > 0.5):
        there = squares[state] * flat[state].median() / squares[state].median()
        pooled = (0.8 * flat[state] + 0.2 * there) / flat[state]
        wanted = prior[state] * pooled ** (MEND if informed else 1)
        torch.testing.assert_close(gates.alpha.detach()[state], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gates_way_back_sums_squares_by_token(units: Units, kind: str) -> None:
    """Against autograd with a gate of its own for every token; the gradient of z is not changed by it."""
    model = tiny_model()
    structure = Structure(units=[kind], sparsity=0.3, of="blocks", round_to=4)  # type: ignore[list-item]
    gates = Gates(units, structure, "re_estimated", random_scores(units), 0, 100)
    hooks, ids = GateHooks(model, units), token_ids(2, 7)
    gates.advance(0, 0.3)
    z = gates.draw()
    hooks.set(gates, z)
    model(input_ids=ids).logits.square().sum().backward()
    assert z.grad is not None
    wide = {place: flat.detach().expand(2, 7, -1).clone().requires_grad_() for place, flat in hooks.z.items()}
    hooks.squares, hooks.z = {}, wide
    model(input_ids=ids).logits.square().sum().backward()
    hooks.remove()
    for i, _, a, b in gates.slots:
        grad = wide[(i, kind)].grad  # type: ignore[index]
        assert grad is not None
        parts = grad.view(14, b - a, -1).sum(2)
        torch.testing.assert_close(gates.squares[a:b], parts.square().sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(z.grad[a:b], parts.sum(0), rtol=1e-4, atol=1e-4)


def test_squares_of_a_chat_are_by_token_and_not_by_window() -> None:
    """A token that is said counts once, however few of its window are."""
    model = tiny_model()
    units = read_units(model)
    structure = Structure(units=["ffn_neurons"], sparsity=0.2, round_to=1)
    gates = Gates(units, structure, "re_estimated", random_scores(units), 0, 100, 64)
    memories = Memories(model, Memory(lora=None, kv=None), {"law": token_ids(5)}, 0)
    learner = Learner(memories, gates, None, Learn(), GateHooks(model, units))
    learner.begin_step(0, 0.2)
    found = {}
    for said in (64, 8):
        gates.squares.zero_()
        for seed in range(8):
            window = token_ids(65, seed=seed)[None]
            window[:, 1 : 65 - said] = -1 - window[:, 1 : 65 - said]
            learner(window, torch.zeros(1, dtype=torch.long)).backward()
        found[said] = float(gates.squares.mean())
    assert 0.06 < found[8] / found[64] < 0.25, found
    assert (learner.said, learner.read) == (8 * (64 + 8), 2 * 8 * 64)


def test_a_pass_asks_nothing_whose_answer_its_size_depends_on(units: Units) -> None:
    """On a GPU every such question (which channels are closed?) is a wait for all that was asked before."""

    class Questions(TorchDispatchMode):
        asked: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
            if depends and func is not torch.ops.aten.index.Tensor:  # by numbers, its size is known
                self.asked.append(str(func))
            return func(*args, **(kwargs or {}))

    model = tiny_model()
    structure = Structure(units=["ffn_neurons", "kv_groups"], sparsity=0.3, of="blocks", round_to=4)
    gates = Gates(units, structure, "re_estimated", random_scores(units), 0, 100)
    hooks, ids = GateHooks(model, units), token_ids(2, 7)
    gates.advance(0, 0.3)
    hooks.set(gates, gates.draw())
    again = gates.draw()
    with Questions() as questions:
        hooks.set(gates, again)  # for the next batch of the same step
        model(input_ids=ids).logits.square().sum().backward()
    hooks.remove()
    assert questions.asked == []
    assert any(len(closed) for closed in hooks.closed.values())
    gates.advance(8, 0.1)
    with Questions():
        hooks.set(gates, gates.draw())
    assert "aten.nonzero.default" in Questions.asked  # another draw


def test_a_re_estimated_mask_stays_for_some_steps(units: Units) -> None:
    """Each choice costs a solve, so the mask follows the costs every EVERY steps alone."""
    gates = Gates(units, Structure(sparsity=0.3, of="blocks"), "re_estimated", random_scores(units), 0, 1)
    gates.advance(0, 0.3)
    before = gates.draw().detach()
    with torch.no_grad():
        gates.alpha.copy_(-gates.alpha)
    gates.advance(EVERY - 1, 0.3)
    assert torch.equal(gates.draw().detach(), before)
    gates.advance(EVERY, 0.3)
    assert not torch.equal(gates.draw().detach(), before)
    assert torch.equal(gates.draw().detach() > 0.5, gates.mask(gates.kept(0.3)))


@pytest.mark.parametrize("kinds", [["ffn_neurons"], ["ffn_neurons", "kv_groups"]], ids=["ffn", "both"])
@pytest.mark.parametrize("form", [HARD, STRAIGHT])
def test_under_uniform_widths_every_layers_gates_start_alike(
    units: Units, form: str, kinds: list[UnitKind]
) -> None:
    """Each layer loses as much, so scores of a layer that are all higher must not open its gates further."""
    scores = {kind: [t + 10 * i for i, t in enumerate(table)] for kind, table in random_scores(units).items()}
    starts = {}
    for widths in ("uniform", "per_layer"):
        structure = Structure(units=kinds, sparsity=0.3, of="blocks", widths=widths)  # type: ignore[arg-type]
        start = Gates(units, structure, form, scores, 0).scores()
        starts[widths] = [torch.cat([start[kind][i] for kind in kinds]) for i in range(len(units.layers))]
        for i, mine in enumerate(starts[widths]):
            given = torch.cat([scores[kind][i] for kind in kinds])
            assert torch.equal(mine.argsort(), given.argsort())
    first, *others = (mine.sort().values for mine in starts["uniform"])
    assert len(others) == 2 and all(torch.equal(first, other) for other in others)
    low, middle, high = starts["per_layer"]
    assert low.max() < middle.min() and middle.max() < high.min()


def test_hard_concrete_gates_start_open(units: Units) -> None:
    assert float(gates_of(units, HARD).expected_sparsity().detach()) < 0.05
    assert float(gates_of(units, HARD, start=False).expected_sparsity().detach()) < 0.05


@pytest.mark.parametrize("form", [HARD, STRAIGHT])
def test_a_gate_multiplies_the_input_of_its_consumer_as_peft_wrapped_it(units: Units, form: str) -> None:
    model = tiny_model()
    memories = memories_on(model, kv=False)
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        for name, module in (("ffn_neurons", layer.mlp.down_proj), ("kv_groups", layer.self_attn.o_proj)):
            for part, inner in (("base", module.get_base_layer()), ("lora", module.lora_A["koff:law"])):

                def record(m: nn.Module, args: tuple[torch.Tensor], key: str = f"{i}.{name}.{part}") -> None:
                    seen[key] = args[0].detach()

                handles.append(inner.register_forward_pre_hook(record))
    hooks = GateHooks(memories.model, units)
    gates = gates_of(units, form)
    gates.advance(7, 0.3)
    z = gates.draw().detach()
    ids = token_ids(1, 9)
    memories.activate("law")
    hooks.set(gates, z)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    gated = dict(seen)
    for i, kind, a, b in gates.slots:
        closed = z[a:b] == 0
        width = 1 if kind == "ffn_neurons" else units.layers[i].queries * units.layers[i].head_dim
        channels = closed.repeat_interleave(width)
        for part in ("base", "lora"):
            x = gated[f"{i}.{kind}.{part}"]
            assert (x[..., channels] == 0).all()
            assert (x[..., ~channels] != 0).any()
    # layer 0's attention sees the same input with gates off: there the gate is an exact factor
    hooks.z = {}
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    factor = z[[a for i, kind, a, _ in gates.slots if (i, kind) == (0, "kv_groups")][0] :][
        :2
    ].repeat_interleave(16)
    assert torch.allclose(gated["0.kv_groups.lora"], seen["0.kv_groups.lora"] * factor)
    assert (z == 0).any()
    hooks.remove()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert (seen["0.ffn_neurons.base"] != 0).all()


def test_gradients_that_are_not_finite_leave_no_trace_in_the_costs() -> None:
    units = read_units(tiny_model("llama"))
    structure = Structure(units=["ffn_neurons"], sparsity=0.2)
    gates = Gates(units, structure, "re_estimated", random_scores(units), 0, 1000.0, 100)
    before = gates.alpha.detach().clone()
    gates.advance(0, 0.2)
    gates.draw().grad = torch.full_like(gates.alpha, float("nan"))
    gates.squares += float("nan")
    gates.discard()
    gates.share()
    gates.observe(16)
    assert torch.equal(gates.alpha, before) and torch.isfinite(gates.squares).all()
