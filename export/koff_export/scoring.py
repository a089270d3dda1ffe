"""The loss of texts under a bundle's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from koff_export.cached import CHUNK, CachedText

if TYPE_CHECKING:
    from koff_export.runtime import Runtime


def score(runtime: Runtime, windows: Sequence[Sequence[int]], memory: str | None) -> tuple[float, int]:
    """The work of `Runtime.score`."""
    total, count = 0.0, 0
    for window in windows:
        runtime.check_tokens(window, memory)
        text = CachedText(runtime, memory)
        for at in range(0, len(window) - 1, CHUNK):
            given = window[at : min(at + CHUNK, len(window) - 1)]
            logits = text.read(given)
            targets = np.asarray(window[at + 1 : at + 1 + len(given)])
            top = logits.max(axis=1, keepdims=True)
            log_sum = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
            total += float((log_sum - logits[np.arange(len(given)), targets]).sum())
            count += len(given)
    return total, count
