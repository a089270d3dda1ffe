"""The order of training: whose window comes when."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.data import Dataset


class DomainWindows(Dataset):
    """Micro-batches in the order of training: a step has `weights` of each domain (one, where unsaid).

    Every domain's windows are shuffled anew for every pass, from the seed alone, so that a resumed run sees
    the same. Of several processes, `share` = (rank, world), each sees its part of every micro-batch. A phase
    that comes after `first` steps of another goes on where that one ended, in the same order.
    """

    def __init__(
        self,
        windows: Mapping[str, torch.Tensor],
        steps: int,
        batch: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
        weights: Mapping[str, int] | None = None,
        first: int = 0,
    ) -> None:
        self.windows, self.batch, self.seed = dict(windows), batch, seed
        self.names = list(windows)
        weights = weights or dict.fromkeys(self.names, 1)
        # of every micro-batch in a step: its domain, and how many of that domain come before
        self.turns = [(d, k) for d, name in enumerate(self.names) for k in range(weights[name])]
        self.weights, self.first = weights, first
        self.rank, world = share
        self.mine = batch // world  # rows of every micro-batch
        self.length = steps * self.mine * len(self.turns)
        self._orders: dict[tuple[str, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # a micro-batch is `batch` neighbours, all of one domain; of these, a run of `mine`
        micro, row = divmod(index, self.mine)
        row += self.rank * self.mine
        step, turn = divmod(micro, len(self.turns))
        domain, before = self.turns[turn]
        name = self.names[domain]
        seen = ((self.first + step) * self.weights[name] + before) * self.batch
        passed, at = divmod(seen + row, len(self.windows[name]))
        if (name, passed) not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 9176 + passed * 131 + domain)
            self._orders[(name, passed)] = torch.randperm(len(self.windows[name]), generator=generator)
        window = self.windows[name][self._orders[(name, passed)][at]]
        return {"input_ids": window, "domain": torch.tensor(domain)}
