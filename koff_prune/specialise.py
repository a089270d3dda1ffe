"""Which neurons belong to one domain, and whether those are what a plan removes.

A neuron is specific where its activation probability differs most between domains: LAPE, the entropy of a
neuron's activation probabilities over domains (Tang et al. 2024, "Language-Specific Neurons", section 2.2),
is low. As there, neurons count that some domain activates more often than 95% of all activation probabilities
are, and the lowest 1% of all neurons are specific. Specific and general neurons are compared by the odds of
being removed, in strata of equal layer and equal mean activation, so that neither "late layers are specific
and cheap" nor "rarely active neurons are specific and cheap" can pass for specialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from koff_prune.device import device_of
from koff_prune.plan import Kept
from koff_prune.units import decoder_layers

DECILES = 10
OFTEN = 0.95  # quantile of all activation probabilities that one of a specific neuron's is above
SPECIFIC = 0.01  # share of all neurons


@dataclass(frozen=True)
class Activity:
    """What the dense model's feed-forward neurons do on each domain's text.

    Attributes:
        probability: float32 [domains, layers, neurons], share of tokens where act_fn(gate_proj x) > 0.
        strength: float32 [layers, neurons], mean over domains and tokens of |input of down_proj|.
    """

    probability: torch.Tensor
    strength: torch.Tensor


@dataclass(frozen=True)
class Odds:
    """A Mantel-Haenszel odds ratio with its 95% interval.

    Attributes:
        ratio: Odds of removal of specific neurons over those of general ones; None where undefined.
        low, high: Its interval; None where undefined.
        specific_removed, general_removed: Plain shares, over all strata.
    """

    ratio: float | None
    low: float | None
    high: float | None
    specific_removed: float
    general_removed: float


@torch.no_grad()
def activity(
    model: PreTrainedModel,
    windows: Mapping[str, torch.Tensor],
    progress: Callable[[int], None] | None = None,
) -> Activity:
    """Runs every domain's windows through the dense model.

    Args:
        model: Dense; every layer as wide as the others.
        windows: Per domain, int64 [windows, window].
        progress: Called with the tokens of each finished window.
    """
    layers = decoder_layers(model)
    width = layers[0].mlp.down_proj.in_features
    fired = torch.zeros(len(windows), len(layers), width)
    strength = torch.zeros(len(layers), width)
    domain = 0

    def counts(i: int, act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            fired[domain, i] += (act(output[0]) > 0).float().sum(0).cpu()

        return hook

    def sizes(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            strength[i] += (args[0][0].float().abs().sum(0) / tokens).cpu()

        return hook

    handles = [
        layer.mlp.gate_proj.register_forward_hook(counts(i, layer.mlp.act_fn))
        for i, layer in enumerate(layers)
    ]
    handles += [layer.mlp.down_proj.register_forward_pre_hook(sizes(i)) for i, layer in enumerate(layers)]
    try:
        for domain, rows in enumerate(windows.values()):  # noqa: B007 - the hooks read it
            tokens = rows.numel()
            for row in rows:
                model.model(input_ids=row[None].to(device_of(model)), use_cache=False)
                if progress:
                    progress(len(row))
            fired[domain] /= tokens
    finally:
        for handle in handles:
            handle.remove()
    return Activity(fired, strength / len(windows))


def entropy(probability: torch.Tensor) -> torch.Tensor:
    """LAPE: entropy in nats over domains of p_d / sum p, for probabilities [domains, ...].

    A neuron that is never active has none and gets the highest, ln(domains): it is nobody's.
    """
    total = probability.sum(0)
    share = probability / total.clamp_min(1e-12)
    found = -(share * share.clamp_min(1e-12).log()).sum(0)
    return torch.where(total > 0, found, torch.full_like(found, math.log(len(probability))))


def specific(probability: torch.Tensor, fraction: float = SPECIFIC, often: float = OFTEN) -> torch.Tensor:
    """The `fraction` of neurons of lowest entropy, among those that some domain activates often enough.

    Args:
        probability: float [domains, layers, neurons].
        fraction: Of all neurons, in (0, 1).
        often: Quantile of all probabilities that one of a neuron's has to be above.

    Returns:
        int64 [layers, neurons]: the domain that activates a specific neuron most, -1 for a general one.
    """
    best, owner = probability.max(0)
    bar = float(np.quantile(probability.numpy(), often))  # torch's takes no more than 16 million
    ranked = entropy(probability).masked_fill(best <= bar, math.inf).flatten()
    chosen = torch.argsort(ranked, stable=True)[: round(fraction * ranked.numel())]
    chosen = chosen[ranked[chosen].isfinite()]
    result = torch.full_like(owner, -1).flatten()
    result[chosen] = owner.flatten()[chosen]
    return result.view_as(owner)


def strata(strength: torch.Tensor) -> torch.Tensor:
    """Layer and decile of mean activation inside it, as one number: int64 [layers, neurons]."""
    layers, width = strength.shape
    rank = strength.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.arange(layers)[:, None] * DECILES + rank * DECILES // width


def removed_mask(kept: Kept, width: int) -> torch.Tensor:
    """Bool [layers, neurons]: True where a plan removes the neuron."""
    gone = torch.ones(len(kept), width, dtype=torch.bool)
    for i, layer in enumerate(kept):
        gone[i, layer["ffn_neurons"]] = False
    return gone


def odds_of_removal(gone: torch.Tensor, is_specific: torch.Tensor, stratum: torch.Tensor) -> Odds:
    """Mantel-Haenszel pooled odds ratio; the interval is that of Robins, Breslow and Greenland (1986).

    Args:
        gone: bool, removed.
        is_specific: bool, same shape.
        stratum: int64, same shape.
    """
    g, s, at = (t.flatten().numpy() for t in (gone, is_specific, stratum))
    size = int(at.max()) + 1

    def cell(mask: np.ndarray) -> np.ndarray:
        return np.bincount(at, weights=mask, minlength=size)

    a, b, c, d = cell(s & g), cell(s & ~g), cell(~s & g), cell(~s & ~g)
    n = np.maximum(a + b + c + d, 1)
    r, t = a * d / n, b * c / n
    shares = (float(g[s].mean()) if s.any() else 0.0, float(g[~s].mean()) if (~s).any() else 0.0)
    if r.sum() == 0 or t.sum() == 0:
        return Odds(None, None, None, *shares)
    p, q = (a + d) / n, (b + c) / n
    total_r, total_t = r.sum(), t.sum()
    variance = (
        (p * r).sum() / (2 * total_r**2)
        + (p * t + q * r).sum() / (2 * total_r * total_t)
        + (q * t).sum() / (2 * total_t**2)
    )
    ratio, reach = total_r / total_t, math.exp(1.959964 * math.sqrt(variance))
    return Odds(float(ratio), float(ratio / reach), float(ratio * reach), *shares)
