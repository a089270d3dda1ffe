"""Which tokens are whose, where those that one domain alone writes go with its memory (`memory.tokens`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OwnTokens:
    """The vocabulary of a run, divided.

    A run's model has every token: the backbone's first, then each domain's own, one domain after another. A
    memory reads and says the backbone's tokens and its domain's; without a memory there are the backbone's
    alone.

    Attributes:
        shared: How many the backbone has: the ids below.
        spans: By domain, the first id of its own tokens, and the one behind the last.
        readers: The tokenizer of what is read with each domain's memory, in the run's ids; None: with none.
    """

    shared: int
    spans: Mapping[str, tuple[int, int]]
    readers: Mapping[str | None, Any]

    def count(self, domain: str) -> int:
        """How many tokens are this domain's own."""
        start, stop = self.spans[domain]
        return stop - start

    def mean_count(self) -> float:
        """Over the domains."""
        return sum(map(self.count, self.spans)) / len(self.spans)

    def rows(self, domain: str | None) -> torch.Tensor:
        """The run's ids of all tokens that are there with a memory, int64, in a bundle's order."""
        own = torch.arange(*self.spans[domain]) if domain is not None else torch.empty(0, dtype=torch.long)
        return torch.cat([torch.arange(self.shared), own])

    def numbered(self, ids: torch.Tensor, domain: str | None) -> torch.Tensor:
        """The run's ids, int64, as a bundle numbers them: a domain's own right behind the backbone's.

        Args:
            ids: All of them there with this memory; what is read and not learned as -1 - id.
            domain: Whose memory.
        """
        if domain is None:
            return ids
        by = self.spans[domain][0] - self.shared
        return ids - by * (ids >= self.shared).long() + by * (ids < -self.shared).long()

    def head(self, weight: torch.Tensor, domain: str | None) -> torch.Tensor:
        """The rows of an embedding or a head [tokens, hidden] that are there with a memory, as in `rows`."""
        parts = [weight[: self.shared]]
        if domain is not None:
            start, stop = self.spans[domain]
            parts.append(weight[start:stop])
        return torch.cat(parts)

    def hide(self, logits: torch.Tensor, domain: str | None) -> None:
        """Makes every token that is not there with a memory impossible, in logits [..., tokens], in place."""
        start, stop = self.spans[domain] if domain is not None else (self.shared, self.shared)
        logits[..., self.shared : start] = -torch.inf
        logits[..., stop:] = -torch.inf
