"""Closed-form compensation: what the removed channels gave, predicted from what the kept ones give.

Per consumer with weight W, over the scoring tokens x with C = sum x x^T, the least-squares prediction of the
removed channels R from the kept ones K is x_R ~ B x_K with B = C_RK (C_KK + eps I)^-1, eps = ridge * median
diagonal of C. Folding it into the weight gives W'_K = W_K + W_R B: no training, no parameters, no cost at run
time.

While gates are learned the same prediction stands in for closed units, so that a unit is judged by what its
neighbours cannot say for it: a closed unit's gradient is that of opening it beyond its prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from koff_prune.plan import Kept
from koff_prune.scores import Place, consumer
from koff_prune.surgeon import damping, factor
from koff_prune.units import KINDS, UnitKind, Units, decoder_layers, head_channels


def channels(units: Units, layer: int, kind: UnitKind, indices: list[int]) -> torch.Tensor:
    """Channels of the consumer's input that belong to the units `indices`, int64, ascending."""
    if kind == "ffn_neurons":
        return torch.tensor(indices, dtype=torch.long)
    have = units.layers[layer]
    return torch.tensor(head_channels(indices, have.head_dim, have.queries), dtype=torch.long)


def removed(units: Units, layer: int, kind: UnitKind, kept: list[int]) -> list[int]:
    """The complement of `kept`."""
    stays = set(kept)
    return [j for j in range(units.layers[layer].count(kind)) if j not in stays]


def predict(second: torch.Tensor, keep: torch.Tensor, drop: torch.Tensor, ridge: float) -> torch.Tensor:
    """B [dropped, kept], float32: the ridge regression of the dropped channels on the kept ones.

    Args:
        second: Second moments C, float32 [channels, channels].
        keep: Kept channels, int64.
        drop: Dropped channels, int64.
        ridge: Share of the median of C's diagonal, see `surgeon.damping`.
    """
    rows = second.index_select(0, keep)
    lower = factor(rows.index_select(1, keep), damping(second, ridge)[keep])
    return torch.cholesky_solve(rows.index_select(1, drop), lower).T.contiguous()


Solved = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Compensation:
    """The solve for one model: second moments by (layer, kind), and the ridge."""

    second: Mapping[Place, torch.Tensor]
    ridge: float
    units: Units

    def solve_at(self, place: Place, kept: Kept) -> Solved | None:
        """Kept channels, dropped channels, B [dropped, kept] of one place; None where nothing is lost."""
        i, kind = place
        gone = removed(self.units, i, kind, kept[i][kind])
        if not gone:
            return None
        keep = channels(self.units, i, kind, kept[i][kind])
        drop = channels(self.units, i, kind, gone)
        return keep, drop, predict(self.second[place], keep, drop, self.ridge)

    def fold(self, layer: nn.Module, i: int, kept: Kept) -> None:
        """Adds W_R B to the kept columns of the consumers of the (still uncut) layer `i`."""
        for kind in KINDS:
            solved = self.solve_at((i, kind), kept) if (i, kind) in self.second else None
            if solved is None:
                continue
            keep, drop, b = solved
            module = consumer(layer, kind)
            w = module.weight.detach().float()
            weight = module.weight.detach().clone()  # the old one may lie in a file's pages
            weight[:, keep] = (w[:, keep] + w[:, drop] @ b).to(weight.dtype)
            module.weight.data = weight


class PredictionHooks:
    """Puts predictions where units are closed, for the consumers' base layers, while gates are learned.

    It sits in front of the base layer inside PEFT's wrapper: LoRA never sees it, as it will not after the
    cut. On a consumer without a wrapper it must come after the gates.
    """

    def __init__(self, model: nn.Module, compensation: Compensation) -> None:
        self.compensation = compensation
        self._tables: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        self._solved: dict[Place, list[int]] = {}  # the kept units that each table is for
        self.z: Mapping[Place, torch.Tensor] = {}
        self._handles = []
        for i, layer in enumerate(decoder_layers(model)):
            for kind in {kind for at, kind in compensation.second if at == i}:
                module: Any = consumer(layer, kind)
                base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
                self._handles.append(base.register_forward_pre_hook(self._hook((i, kind))))

    def refresh(self, kept: Kept, like: torch.Tensor) -> None:
        """Solves where `kept` changed, for inputs of the dtype and on the device of `like`.

        B is spread over all channels, zero at closed ones.
        """
        for place in self.compensation.second:
            stays = kept[place[0]][place[1]]
            if self._solved.get(place) == stays:
                continue
            self._solved[place] = stays
            self._tables.pop(place, None)
            if (solved := self.compensation.solve_at(place, kept)) is not None:
                keep, drop, b = solved
                wide = b.new_zeros(len(drop), len(keep) + len(drop)).index_copy_(1, keep, b)
                self._tables[place] = (wide.to(like), drop.to(like.device))

    def _hook(self, place: Place) -> Any:
        def fill(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            z = self.z.get(place)
            table = self._tables.get(place)
            if z is None or table is None:
                return None
            wide, drop = table
            x = args[0]
            # 1 - z is 1 for a closed unit; its gradient is minus the unit's own
            predicted = functional.linear(x, wide) * (1 - z[drop]).to(x.dtype)
            return (x.index_add(-1, drop, predicted), *args[1:])

        return fill

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
