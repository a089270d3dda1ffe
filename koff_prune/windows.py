"""The order of training: whose window comes when."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.data import Dataset


class DomainWindows(Dataset):
    """Micro-batches in the order of training: item n is a window of domain n % domains.

    Every domain's windows are shuffled anew for every pass, from the seed alone, so that a resumed run sees
    the same. Of several processes, `share` = (rank, world), each sees its part of every micro-batch.
    """

    def __init__(
        self,
        windows: Mapping[str, torch.Tensor],
        steps: int,
        batch: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.windows, self.batch, self.seed = dict(windows), batch, seed
        self.names = list(windows)
        self.rank, world = share
        self.mine = batch // world  # rows of every micro-batch
        self.length = steps * self.mine * len(self.names)
        self._orders: dict[tuple[str, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # a micro-batch is `batch` neighbours, all of one domain; of these, a run of `mine`
        micro, row = divmod(index, self.mine)
        row += self.rank * self.mine
        step, domain = divmod(micro, len(self.names))
        name = self.names[domain]
        passed, at = divmod(step * self.batch + row, len(self.windows[name]))
        if (name, passed) not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 9176 + passed * 131 + domain)
            self._orders[(name, passed)] = torch.randperm(len(self.windows[name]), generator=generator)
        window = self.windows[name][self._orders[(name, passed)][at]]
        return {"input_ids": window, "domain": torch.tensor(domain)}
