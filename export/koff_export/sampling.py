"""From logits to a token."""

from __future__ import annotations

import numpy as np


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
