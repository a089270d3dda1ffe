"""The closed-form solve: optimal, folded exactly, never worse than leaving units out."""

from __future__ import annotations

import pytest
import torch
from model_helpers import SHAPES, random_plan, tiny_shape, token_ids

from koff_prune.compensate import Compensation, channels, predict, removed
from koff_prune.scores import collect, consumer
from koff_prune.surgeon import damping
from koff_prune.units import KINDS, read_units


@pytest.mark.parametrize("ridge", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_layers_squared_error_rises_on_the_solve_tokens(shape: str, ridge: float) -> None:
    """Each consumer's output error, folded weight against bare slice, on its own dense inputs."""
    model = tiny_shape(shape)
    units = read_units(model)
    windows = token_ids(6, 16, seed=2)
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        for kind in KINDS:

            def record(m: object, args: tuple[torch.Tensor], key: tuple[int, str] = (i, kind)) -> None:
                inputs.setdefault(key, []).append(args[0].detach().flatten(0, 1))

            handles.append(consumer(layer, kind).register_forward_pre_hook(record))
    statistics = collect(model, units, KINDS, windows)
    for handle in handles:
        handle.remove()
    plan = random_plan(units)
    before = {(i, k): consumer(x, k).weight.clone() for i, x in enumerate(model.model.layers) for k in KINDS}
    solve = Compensation(statistics.second, ridge, units)
    for i, layer in enumerate(model.model.layers):
        solve.fold(layer, i, plan.layers)
    better = 0
    for (i, kind), w in before.items():
        gone = removed(units, i, kind, plan.layers[i][kind])
        folded = consumer(model.model.layers[i], kind).weight
        if not gone:
            assert torch.equal(folded, w)
            continue
        keep, drop = channels(units, i, kind, plan.layers[i][kind]), channels(units, i, kind, gone)
        x = torch.cat(inputs[(i, kind)]).double()
        wanted = x @ w.double().T
        bare = (wanted - x[:, keep] @ w[:, keep].double().T).square().sum()
        solved = (wanted - x[:, keep] @ folded[:, keep].double().T).square().sum()
        assert solved <= bare * (1 + 1e-6)
        better += bool(solved < 0.99 * bare)
        assert torch.equal(folded[:, drop], w[:, drop])
    assert better or ridge == 1.0


def test_predict_is_the_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator)
    x[:, 7] = 2 * x[:, 1] - x[:, 3]
    keep, drop = torch.tensor([0, 1, 2, 3, 5, 8]), torch.tensor([4, 6, 7, 9])
    second = x.T @ x
    b = predict(second, keep, drop, 0.01)
    eps = 0.01 * second.diagonal().median()
    wanted = torch.linalg.solve(second[keep][:, keep] + eps * torch.eye(6), second[keep][:, drop]).T
    assert torch.allclose(b, wanted, atol=1e-4)
    exact = predict(second, keep, drop, 1e-7)
    assert torch.allclose(exact[2], torch.tensor([0, 2.0, 0, -1, 0, 0]), atol=1e-3)
    assert torch.equal(second, x.T @ x)  # the statistics are not touched


def test_one_massive_channel_does_not_keep_others_from_taking_over() -> None:
    """A neuron with a thousand times the others' scale, as SmolLM2 has in one layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    x[:, 6] = x[:, 1] + x[:, 2]
    x[:, 7] *= 1000
    x[:, 0] = 0  # and one that is dead
    found = predict(x.T @ x, torch.tensor([0, 1, 2, 3, 7]), torch.tensor([4, 5, 6]), 0.01)
    assert torch.allclose(found[2], torch.tensor([0, 1.0, 1.0, 0, 0]), atol=0.05)


@pytest.mark.parametrize(("count", "massive"), [(2, 650.0), (8, 326.0), (8, 2000.0)])
def test_massive_channels_that_say_the_same_hide_nobody(count: int, massive: float) -> None:
    """They fire on every window's first token alone, so that float32 sums of their squares are singular."""
    torch.manual_seed(0)
    channels, window, windows = 64, 128, 200
    mixed = torch.randn(channels - count, channels - count) / 8 + torch.eye(channels - count)
    second, everything = torch.zeros(channels, channels), []
    for _ in range(windows):
        x = torch.cat([torch.zeros(window, count), torch.randn(window, channels - count) @ mixed], 1)
        x[0, :count] = massive * window**0.5 * torch.arange(1, count + 1)
        second += x.T @ x
        everything.append(x)
    x = torch.cat(everything).double()
    drop = torch.arange(channels - 16, channels)
    keep = torch.arange(channels - 16)
    found = predict(second, keep, drop, 0.01).double()
    inner = x[:, keep].T @ x[:, keep]
    inner.diagonal().add_(float(damping(second, 0.01)[-1]))
    exact = torch.linalg.solve(inner, x[:, keep].T @ x[:, drop]).T
    assert (found - exact)[:, count:].norm() < 0.1 * exact[:, count:].norm()
    lost, least = (float((x[:, drop] - x[:, keep] @ b.T).square().sum()) for b in (found, exact))
    assert lost < 1.02 * least


def test_few_tokens_and_dead_channels_still_solve() -> None:
    second = torch.zeros(6, 6)
    assert torch.isfinite(predict(second, torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5]), 0.01)).all()
    x = torch.ones(1, 6)
    assert torch.isfinite(predict(x.T @ x, torch.arange(4), torch.arange(4, 6), 1e-4)).all()


def test_the_solve_covers_exactly_the_places_that_lose_something() -> None:
    model = tiny_shape("llama")
    units = read_units(model)
    plan = random_plan(units)
    second = collect(model, units, KINDS, token_ids(2, 16)).second
    compensation = Compensation(second, 0.01, units)
    solved = {place: compensation.solve_at(place, plan.layers) for place in second}
    solved = {place: found for place, found in solved.items() if found is not None}
    lost = {(i, k) for i in range(3) for k in KINDS if removed(units, i, k, plan.layers[i][k])}
    assert set(solved) == lost and len(lost) >= 4
    for (i, kind), (keep, drop, b) in solved.items():
        width = second[(i, kind)].shape[0]
        assert torch.equal(torch.cat([keep, drop]).sort().values, torch.arange(width))
        assert b.shape == (len(drop), len(keep))
