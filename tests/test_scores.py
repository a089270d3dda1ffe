"""Baselines against straightforward formulas, each an importance of torch-pruning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from model_helpers import SHAPES, tiny_model, tiny_shape, token_ids
from torch.nn import functional
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_prune.gates import GateHooks, Gates
from koff_prune.recipe import BASELINES, Structure
from koff_prune.scores import DRAWS, Statistics, UnitImportance, collect, consumer, score_units
from koff_prune.tensor_file import save_tensors
from koff_prune.units import KINDS, Units, ffn_group, head_channels, read_units

BOTH = Structure(units=list(KINDS))
WINDOWS = token_ids(5, 12, seed=4)


@pytest.fixture(params=SHAPES, scope="module")
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_shape(request.param)


@pytest.fixture(scope="module")
def units(dense: PreTrainedModel) -> Units:
    return read_units(dense)


@pytest.fixture(scope="module")
def statistics(dense: PreTrainedModel, units: Units) -> Statistics:
    return collect(dense, units, KINDS, WINDOWS)


@pytest.fixture(scope="module")
def gate_gradients(dense: PreTrainedModel, units: Units) -> torch.Tensor:
    """dL/dz by autograd on an explicit gate, [windows, gated units]."""
    gates = Gates(units, BOTH, "straight_through", None, 0)
    hooks = GateHooks(dense, units)
    rows = []
    for window in WINDOWS:
        z = torch.ones_like(gates.cost, requires_grad=True)
        hooks.set(gates, z)
        logits = dense(input_ids=window[None], use_cache=False).logits[0]
        functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        assert z.grad is not None
        rows.append(z.grad)
    hooks.remove()
    return torch.stack(rows)


def flat(scores: dict, units: Units) -> torch.Tensor:  # type: ignore[type-arg]
    """Scores in the order of the gates, without the division by cost."""
    return torch.cat([s * units.layers[i].cost(k) for k in KINDS for i, s in enumerate(scores[k])])


@pytest.fixture(scope="module")
def inputs(dense: PreTrainedModel) -> dict[tuple[int, str], torch.Tensor]:
    """Every consumer's input over all windows, [tokens, channels]."""
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles = []
    for i, layer in enumerate(dense.model.layers):
        for kind, module in (("ffn_neurons", layer.mlp.down_proj), ("kv_groups", layer.self_attn.o_proj)):

            def record(m: object, args: tuple[torch.Tensor], key: tuple[int, str] = (i, kind)) -> None:
                found.setdefault(key, []).append(args[0][0].detach())

            handles.append(module.register_forward_pre_hook(record))
    with torch.no_grad():
        for window in WINDOWS:
            dense(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in found.items()}


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=2e-3, atol=1e-4 * float(wanted.abs().max()))


def test_taylor_and_fisher(
    dense: PreTrainedModel, units: Units, statistics: Statistics, gate_gradients: torch.Tensor
) -> None:
    taylor = flat(score_units("taylor", dense, units, BOTH, statistics), units)
    assert close(taylor, gate_gradients.sum(0).abs())
    fisher = flat(score_units("fisher", dense, units, BOTH, statistics), units)
    assert close(fisher, gate_gradients.square().sum(0))


def test_fisher_tokens_squares_what_each_token_adds() -> None:
    """By autograd on a gate of its own for every token and channel; the channels of a unit add up first."""
    dense = tiny_model()
    units = read_units(dense)
    scores = score_units("fisher_tokens", dense, units, BOTH, collect(dense, units, KINDS, WINDOWS))
    wanted: dict[tuple[int, str], torch.Tensor] = {}
    hooks = GateHooks(dense, units)
    for window in WINDOWS:
        hooks.z = {
            (i, kind): torch.ones(len(window), consumer(layer, kind).in_features, requires_grad=True)
            for i, layer in enumerate(dense.model.layers)
            for kind in KINDS
        }
        logits = dense(input_ids=window[None], use_cache=False).logits[0]
        functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        for (i, kind), z in hooks.z.items():
            assert z.grad is not None
            each = z.grad.view(len(window), units.layers[i].count(kind), -1).sum(2)
            wanted[i, kind] = wanted.get((i, kind), 0) + each.square().sum(0)
    hooks.remove()
    for (i, kind), value in wanted.items():
        assert close(scores[kind][i] * units.layers[i].cost(kind), value)  # type: ignore[index]


def test_curvature_is_the_fisher_of_labels_that_the_model_draws() -> None:
    """By autograd on a gate of its own for every token: its sum is a window's gradient."""
    dense = tiny_model()
    units = read_units(dense)
    found = collect(dense, units, ["ffn_neurons"], WINDOWS, seed=5).curvature
    again, other = (collect(dense, units, ["ffn_neurons"], WINDOWS, seed=s).curvature for s in (5, 6))
    count = units.layers[0].ffn_neurons
    wanted = torch.zeros(len(units.layers), count)
    generator = torch.Generator().manual_seed(5)
    hooks = GateHooks(dense, units)
    for window in WINDOWS:
        z = [torch.ones(len(window), count, requires_grad=True) for _ in units.layers]
        hooks.z = {(i, "ffn_neurons"): z[i] for i in range(len(z))}
        logits = dense(input_ids=window[None], use_cache=False).logits[0, :-1]
        drawn = torch.multinomial(logits.detach().softmax(-1), DRAWS, replacement=True, generator=generator)
        for labels in drawn.T:
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            for i, g in enumerate(torch.autograd.grad(loss, z, retain_graph=True)):
                wanted[i] += (g.sum(0).square() + g.square().sum(0)) / (2 * DRAWS)
    hooks.remove()
    for i in range(len(units.layers)):
        assert close(found[(i, "ffn_neurons")], wanted[i])
        assert torch.equal(found[(i, "ffn_neurons")], again[(i, "ffn_neurons")])
        assert not torch.equal(found[(i, "ffn_neurons")], other[(i, "ffn_neurons")])


def test_wanda_and_magnitude(
    dense: PreTrainedModel, units: Units, statistics: Statistics, inputs: dict[tuple[int, str], torch.Tensor]
) -> None:
    wanda = score_units("wanda", dense, units, BOTH, statistics)
    magnitude = score_units("magnitude", dense, units, BOTH, None)
    for i, layer in enumerate(dense.model.layers):
        have = units.layers[i]
        mlp, at = layer.mlp, layer.self_attn
        for kind in KINDS:
            for u in range(0, have.count(kind), 5 if kind == "ffn_neurons" else 1):
                q = [u] if kind == "ffn_neurons" else head_channels([u], have.head_dim, have.queries)
                kv = head_channels([u], have.head_dim)
                x = inputs[(i, kind)][:, q]
                column = (mlp.down_proj if kind == "ffn_neurons" else at.o_proj).weight[:, q]
                wanted = (column.abs().sum(0) * x.norm(dim=0)).sum()
                assert torch.allclose(wanda[kind][i][u] * have.cost(kind), wanted, rtol=1e-3)
                if kind == "ffn_neurons":
                    rows = [(mlp.gate_proj, q), (mlp.up_proj, q)]
                else:
                    rows = [(at.q_proj, q), (at.k_proj, kv), (at.v_proj, kv)]
                gone = [column, *(m.weight[j] for m, j in rows)]
                gone += [m.bias[j] for m, j in rows if m.bias is not None]
                norm = torch.cat([t.flatten() for t in gone]).norm()
                assert sum(t.numel() for t in gone) == have.cost(kind)
                assert torch.allclose((magnitude[kind][i][u] * have.cost(kind)).sqrt(), norm, rtol=1e-4)


def test_second_moments(statistics: Statistics, inputs: dict[tuple[int, str], torch.Tensor]) -> None:
    assert statistics.tokens == WINDOWS.numel()
    for place, x in inputs.items():
        assert close(statistics.second[place], x.T @ x)  # type: ignore[index]


def test_statistics_survive_a_file(tmp_path, statistics: Statistics) -> None:  # type: ignore[no-untyped-def]
    save_tensors(statistics.tensors(), tmp_path / "s.safetensors")
    again = Statistics.open(tmp_path / "s.safetensors")
    place = next(iter(again.second))
    assert again.second[place] is not again.second[place]  # read anew, kept by nobody
    assert again.tokens == statistics.tokens
    for table in ("second", "taylor", "fisher", "fisher_tokens", "curvature"):
        a, b = getattr(again, table), getattr(statistics, table)
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", BASELINES)
def test_each_baseline_is_an_importance_of_torch_pruning(method: str) -> None:
    dense = tiny_model()
    units = read_units(dense)
    importance = UnitImportance(method, dense, units, collect(dense, units, KINDS, WINDOWS), seed=3)
    assert isinstance(importance, tp.importance.Importance)
    mlp = dense.model.layers[1].mlp
    scores = importance(ffn_group(mlp, range(48)))
    assert scores.shape == (48,) and bool((scores >= 0).all()) and len(scores.unique()) > 40
    assert torch.equal(importance(ffn_group(mlp, [7, 9])), scores[[7, 9]])
    assert importance.of_attention(dense.model.layers[0].self_attn).shape == (2,)


def test_random_follows_the_seed_and_differs_over_layers() -> None:
    dense = tiny_model()
    units = read_units(dense)
    structure = Structure()
    one, again, other = (score_units("random", dense, units, structure, None, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one["ffn_neurons"], again["ffn_neurons"], strict=True))
    assert not torch.equal(one["ffn_neurons"][0], other["ffn_neurons"][0])
    assert not torch.equal(one["ffn_neurons"][0], one["ffn_neurons"][1])
    assert one["kv_groups"] == []


def test_half_a_statistics_file_is_one_sentence(tmp_path: Path) -> None:
    save_tensors(Statistics(tokens=3).tensors(), tmp_path / "s.safetensors")
    assert Statistics.open(tmp_path / "s.safetensors").tokens == 3
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-4])
    with pytest.raises(KoffError, match="missing or damaged"):
        Statistics.open(tmp_path / "s.safetensors")


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_size_alone_sends_no_kv_group_away(method: str) -> None:
    """Divided by its cost, a draw or a norm made every KV group cheaper than any neuron."""
    model = tiny_model("llama", num_hidden_layers=6)
    units = read_units(model)
    scores = score_units(method, model, units, BOTH, None, seed=1)
    neurons, groups = (torch.cat(scores[kind]) for kind in KINDS)
    below = (groups[:, None] > neurons[None]).float().mean()
    assert 0.2 < below < 0.8
