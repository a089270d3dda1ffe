"""From logits to a token."""

from __future__ import annotations

import numpy as np

from koff_export.errors import KoffError


def pick(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, random: np.random.Generator
) -> int:
    """Chooses a token from logits [vocabulary]: the highest at temperature 0, else a draw."""
    if temperature <= 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    if top_p < 1:
        keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:keep], p[:keep] / p[:keep].sum()
    return int(random.choice(order, p=p))


def check_sampling(temperature: float, top_k: int, top_p: float, max_new_tokens: int) -> None:
    """Refuses settings that mean nothing."""
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 0:
        raise KoffError("temperature, top_k and max_new_tokens must be at least 0, and top_p in (0, 1]")
