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
    for marked in windows:
        window = [token if token >= 0 else -1 - token for token in marked]
        runtime.check_tokens(window, memory)
        text = CachedText(runtime, memory)
        for at in range(0, len(window) - 1, CHUNK):
            given = window[at : min(at + CHUNK, len(window) - 1)]
            logits = text.read(given)
            targets = np.asarray(window[at + 1 : at + 1 + len(given)])
            top = logits.max(axis=1, keepdims=True)
            log_sum = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
            losses = log_sum - logits[np.arange(len(given)), targets]
            said = np.asarray(marked[at + 1 : at + 1 + len(given)]) >= 0
            total += float(losses[said].sum())
            count += int(said.sum())
    return total, count


def windows(runtime: Runtime, text: str, memory: str | None) -> list[list[int]]:
    """See `Runtime.windows`."""
    lead = [] if runtime.manifest.bos is None else [runtime.manifest.bos]
    # what spells a control token is text here, as it is where memories learn
    tokenizer = runtime.tokenizer_of(memory)
    tokenizer.encode_special_tokens = True
    try:
        ids = runtime.encode(text, memory, bos=False)
    finally:
        tokenizer.encode_special_tokens = False
    step = runtime.manifest.window - len(lead)
    cut = [lead + ids[at : at + step] for at in range(0, len(ids), step)]
    return [window for window in cut if len(window) > 1]
