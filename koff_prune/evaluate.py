"""Held-out loss of a model with or without a memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_prune.chat import tokens_and_labels
from koff_prune.memory import Memories
from koff_prune.pages import infinite

_MOST = 700.0  # nats whose exponential is a float


@torch.no_grad()
def window_losses(
    memories: Memories,
    windows: torch.Tensor,
    domain: str | None,
    progress: Callable[[int], None] | None = None,
    batch: int = 2,
) -> list[float]:
    """Mean nats per predicted token of every window.

    Args:
        memories: Around the model to be judged.
        windows: int64 [windows, window]; tokens 2..n of each are predicted from those before and the memory.
        domain: Whose memory to attach; None for none.
        progress: Called with the tokens of each finished batch.
        batch: Windows per forward.
    """
    memories.activate(domain)
    losses: list[float] = []
    for rows in windows.split(batch):
        read, labels = tokens_and_labels(rows.to(memories.device))
        with memories.autocast():
            logits = memories.base(input_ids=read, use_cache=False).logits
        for row, target in zip(logits, labels, strict=True):
            losses.append(float(functional.cross_entropy(row[:-1].float(), target[1:])))
        if progress:
            progress(rows.numel())
    memories.activate(None)
    return losses


def total_nats(
    memories: Memories, row: torch.Tensor, domain: str | None, progress: Callable[[int], None] | None = None
) -> float:
    """Nats of a text of any length, int64 [tokens]: in parts of as many tokens as the model has positions."""
    memory = memories.kv.get(domain) if domain is not None else None
    room = memories.base.config.max_position_embeddings - (memory.tokens if memory is not None else 0)
    total = 0.0
    for start in range(0, len(row) - 1, room - 1):  # of each but the first, one token is read alone
        part = row[start : start + room]
        if predicted := int((part[1:] >= 0).sum()):
            total += window_losses(memories, part[None], domain, progress)[0] * predicted
    return total


def mean_nats(values: Sequence[float], counts: Sequence[int]) -> float:
    """Mean nats per predicted token over windows of `counts` such tokens each."""
    return sum(value * n for value, n in zip(values, counts, strict=True)) / sum(counts)


def perplexity(nats: float) -> float:
    """exp(nats), or infinity for no number and for what no float holds."""
    return math.exp(nats) if nats < _MOST else math.inf


def perplexities(losses: Mapping[str, list[float]], counts: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Per domain exp(mean nats per token), or infinity for no number; their geometric mean as `gmean`.

    Args:
        losses: Per domain, `window_losses`.
        counts: Per domain, the predicted tokens of every window.
    """
    means = {name: mean_nats(values, counts[name]) for name, values in losses.items()}
    means["gmean"] = sum(means.values()) / len(means)
    return {name: perplexity(value) for name, value in means.items()}


def read_losses(path: Path, windows: Mapping[str, int]) -> dict[str, list[float]]:
    """The losses of a file that a run has written, by domain.

    Args:
        path: Of the file.
        windows: By domain, how many losses there must be.

    Raises:
        KoffError: Others are there, or none that can be read.
    """
    damaged = KoffError(f"{path}: is damaged; remove it, and --resume makes it again")
    try:
        found: Any = infinite(read_json(path))
    except KoffError as error:
        raise damaged from error
    if not isinstance(found, dict) or {name: len(values) for name, values in found.items()} != windows:
        raise damaged
    return found
