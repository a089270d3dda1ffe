"""What removing units one after another costs, when those that stay take over what they can.

Structured optimal brain surgeon (Hassibi & Stork 1993; for columns Kurtic et al. 2023, "ZipLM", section 3.1):
the unit that is cheapest to lose goes, the others' weights take over its part by least squares, as the
compensation of the cut will, and so on until one is left. Neighbours that say the same are cheap to lose
once, not twice.

With P the inverse of the consumer's second moments over the channels that are left, W its weight as it stands
and G the second moments of the loss's gradient at its output (labels drawn from the model), a unit of
channels u costs

    c_u = 1/2 tr(W_u^T G W_u P_uu^-1) * m * (h_u / h'_u / m)^MEND    nats per token,

where the first factor takes inputs and gradients for independent and the others mend that: h_u is the unit's
own Fisher information, h'_u what independence makes of it (twice the first factor, with nothing removed), and
m the geometric mean of h_u / h'_u over the layer's live units. Of a whole layer that mean is known well, and
layers are compared by it, so m counts in full. A single h'_u is wrong and its h_u is noisy: MEND goes half of
the way between their logarithms.
"""

from __future__ import annotations

import torch

MEND = 0.5
_ROUNDED = 1e-5  # see `damping`
STEPS = 192  # removals at a time are a channel count divided by this: the inverse is updated once for all


def elimination_costs(
    second: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, information: torch.Tensor, ridge: float
) -> torch.Tensor:
    """The cost of removing each unit at its turn, never less than an earlier one's.

    Args:
        second: Second moments of the consumer's input, mean over tokens, float32 [channels, channels].
        weight: Of the consumer, [hidden, channels].
        output: G, mean over tokens, float32 [hidden, hidden].
        information: h, mean over tokens, float32 [units]; a unit's channels stand side by side.
        ridge: As the compensation's, see `damping`.

    Returns:
        float32 [units], in nats per token.
    """
    units = len(information)
    size = second.shape[0] // units
    ridged = second.double()
    ridged.diagonal().add_(damping(ridged, ridge))
    inverse = torch.linalg.inv(ridged).float()
    metric = output.double()
    little = (1e-9 * metric.diagonal().mean().clamp_min(1e-30)).expand(len(metric))
    seen = factor(metric, little).T.float() @ weight.float()  # the weight in the metric of the loss
    wrong = information.clamp_min(1e-30) / _costs(seen, _blocks(second, size)).clamp_min(1e-30)
    layer = wrong[information > 0].log().mean().nan_to_num().exp()  # a dead unit says nothing about others
    mend = layer * (wrong / layer) ** MEND / 2
    left = torch.arange(units)
    result = torch.zeros(units)
    floor = torch.zeros(())
    while len(left) > 1:
        own = torch.linalg.inv(_blocks(inverse, size))
        cost, order = (mend[left] * _costs(seen, own)).sort(stable=True)
        gone = order[: min(max(1, units // STEPS), len(left) - 1)]
        rising = torch.cat([floor[None], cost[: len(gone)]]).cummax(0).values
        result[left[gone]], floor = rising[1:], rising[-1]
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        out, keep = _channels((~stays).nonzero()[:, 0], size), _channels(stays.nonzero()[:, 0], size)
        across = inverse[out][:, keep]
        share = torch.linalg.solve(inverse[out][:, out].double(), across.double()).float()
        seen = seen[:, keep] - seen[:, out] @ share
        inverse = inverse[keep][:, keep] - across.T @ share
        left = left[stays]
    last = mend[left] * _costs(seen, torch.linalg.inv(_blocks(inverse, size)))
    result[left] = torch.maximum(last, floor)
    return result


def damping(second: torch.Tensor, ridge: float) -> torch.Tensor:
    """What goes on the diagonal of second moments, [channels]: `ridge` times the median of its live entries.

    Not of the mean: a language model has neurons with a thousand times the scale of their neighbours (massive
    activations, Sun et al. 2024), and a ridge of their scale would hide every other neuron of the layer. They
    get a hundred-thousandth of their own entry instead, above what float32 rounded off their sums of squares:
    such neurons fire on the same tokens, and what tells two of them apart may be nothing but that rounding.
    """
    diagonal = second.diagonal()
    live = diagonal[diagonal > 0]
    typical = live.median() if len(live) else diagonal.new_ones(())
    return ridge * typical.clamp_min(1e-12) + _ROUNDED * diagonal


def factor(square: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of `square` + `more` on its diagonal, or as many tens of `more` as it takes.

    Second moments of fewer tokens than channels are singular, and rounding makes them indefinite.

    Args:
        square: Symmetric, [n, n]; its diagonal is changed.
        more: Positive, [n].
    """
    diagonal, own = square.diagonal(), square.diagonal().clone()
    while True:
        diagonal.copy_(own + more)
        found, info = torch.linalg.cholesky_ex(square)
        if not info.any() or not torch.isfinite(more).all():
            return found
        more = more * 10


def _channels(units: torch.Tensor, size: int) -> torch.Tensor:
    return (units[:, None] * size + torch.arange(size)).reshape(-1)


def _blocks(square: torch.Tensor, size: int) -> torch.Tensor:
    """The diagonal blocks of every unit, [units, size, size]."""
    count = square.shape[0] // size
    at = torch.arange(count)
    return square.reshape(count, size, count, size)[at, :, at, :]


def _costs(seen: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """tr(W_u^T G W_u R_u) for every unit, [units]; `residual` is R, [units, size, size]."""
    w = seen.view(len(seen), len(residual), -1)
    return torch.einsum("hus,ust,hut->u", w, residual, w)
