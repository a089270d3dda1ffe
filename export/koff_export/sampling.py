"""From logits to a token."""

from __future__ import annotations

import numpy as np

from koff_export.errors import KoffError

_COLD = 1e-6  # below it a draw is the highest logit, and dividing by it is no number


def pick(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, random: np.random.Generator
) -> int:
    """Chooses a token from logits [vocabulary]: the highest at temperature 0, else a draw.

    Raises:
        KoffError: A draw from what is no number.
    """
    if temperature < _COLD:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    if not np.isfinite(p).all():
        raise KoffError("the graph's logits are not finite: the weights or the memory are damaged")
    if top_p < 1:
        keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:keep], p[:keep] / p[:keep].sum()
    return int(random.choice(order, p=p))


def check_sampling(
    temperature: float, top_k: int, top_p: float, max_new_tokens: int, seed: int | None = None
) -> None:
    """Refuses settings that mean nothing."""
    if not 0 <= temperature < np.inf or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 0:
        raise KoffError(
            f"temperature {temperature:g}, top_k {top_k} and max_new_tokens {max_new_tokens} must be at least"
            f" 0, and top_p {top_p:g} in (0, 1]"
        )
    if seed is not None and seed < 0:
        raise KoffError(f"seed {seed} is below 0; name another")
