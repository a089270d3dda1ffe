"""Held-out text that is trained on all the same: in another domain, or as a near duplicate in its own.

A domain's own split keeps whole documents apart. Two domains may still share text, and every domain's
training text shapes the one mask, its compensation and what is recovered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from koff_prune.chat import tokens
from koff_prune.domains import DomainBlocks

SPAN = 32  # tokens in a row: longer than a phrase that two texts have in common by chance
WORTH_A_WORD = 0.01  # share of a domain's held-out text
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits evenly mixed (Knuth's golden ratio)


def shared_text(
    domains: Mapping[str, DomainBlocks], read: Callable[[torch.Tensor], list[torch.Tensor]] = list
) -> dict[tuple[str, str], float]:
    """How much of every domain's held-out text stands in every domain's training text, word for word.

    Args:
        domains: Their token blocks.
        read: From windows to the same text in tokens that all domains have in common.

    Returns:
        By (held out in, trained on in): the share of the held-out windows' spans of `SPAN` tokens that are
        found there, at whatever place. Spans that are read and not learned, such as a system prompt that all
        conversations share, count nowhere. Empty where windows are shorter than a span.
    """
    trained = {name: np.unique(_all_spans(read(blocks.train), 1)) for name, blocks in domains.items()}
    result = {}
    for name, blocks in domains.items():
        held = _all_spans(read(blocks.heldout), SPAN)
        for other, known in trained.items():
            if len(held) and len(known):
                result[name, other] = float(np.isin(held, known).mean())
    return result


def sentences(shared: Mapping[tuple[str, str], float]) -> list[str]:
    """What is worth a word to whoever is to believe the figures."""
    return [
        f"{share:.0%} of the held-out text of domain {name} is trained on in "
        + (f"domain {other}" if other != name else "the same domain, in other documents")
        + ": its figures flatter the model."
        for (name, other), share in shared.items()
        if share >= WORTH_A_WORD
    ]


def _all_spans(rows: list[torch.Tensor], stride: int) -> np.ndarray:
    """`_spans` of rows of any lengths; those of one length go together."""
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    found = [_spans(torch.stack(some), stride) for some in by_length.values()]
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def _spans(windows: torch.Tensor, stride: int) -> np.ndarray:
    """Hashes of `SPAN` tokens in a row, uint64, one at every `stride`th place of each window [n, window]."""
    ids = tokens(windows).numpy().astype(np.uint64)
    if ids.shape[1] < SPAN:
        return np.empty(0, np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(ids, SPAN, axis=1)[:, ::stride]
    found = np.zeros(rows.shape[:2], np.uint64)
    for k in range(SPAN):  # wraps around, as it is to
        found = (found ^ rows[..., k]) * _FACTOR
    learned = np.lib.stride_tricks.sliding_window_view(windows.numpy() >= 0, SPAN, axis=1)[:, ::stride]
    return found[learned.any(axis=2)]
