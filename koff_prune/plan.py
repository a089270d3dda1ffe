"""Gates or scores in, kept indices out: the plan, the contract between choosing and cutting."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from koff_export.errors import KoffError
from koff_export.files import read_json, write_json
from koff_prune.architecture import KINDS, UnitKind, Units
from koff_prune.recipe import Structure

if TYPE_CHECKING:
    import torch

_SHIFTS = 8  # KV groups more or fewer that are tried before a target counts as out of reach
TOLERANCE = 0.002  # of sparsity: what nothing reachable may miss the target by
Scores = dict[UnitKind, list["torch.Tensor"]]
"""Per kind and layer, float [units]: higher means keep, already divided by cost where kinds are compared."""
Kept = list[dict[UnitKind, list[int]]]
"""Per layer and kind, the ascending indices of the units that stay."""


@dataclass(frozen=True)
class Plan:
    """What stays of a model.

    Attributes:
        model: source, revision and config_sha256 of the dense model.
        method: koff, or the baseline that scored the units.
        ranking: global or per_layer.
        of: total or blocks.
        target: Asked sparsity.
        realised: Sparsity of this plan.
        widths: per_layer or uniform.
        round_to: FFN widths are multiples of this.
        parameters: dense and slim parameter counts.
        layers: Kept indices.
    """

    model: dict[str, Any]
    method: str
    ranking: str
    of: str
    target: float
    realised: float
    widths: str
    round_to: int
    parameters: dict[str, int]
    layers: Kept

    @property
    def digest(self) -> str:
        """sha256 over the sorted layers and the dense model's config alone."""
        layers = [{kind: sorted(layer[kind]) for kind in KINDS} for layer in self.layers]
        text = json.dumps({"config_sha256": self.model["config_sha256"], "layers": layers}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def widths_of(self, kind: UnitKind) -> list[int]:
        """Units kept per layer."""
        return [len(layer[kind]) for layer in self.layers]

    @property
    def removed(self) -> str:
        """How much is removed, in words."""
        if self.of == "total":
            return f"{self.realised:.1%} of all parameters removed"
        whole = 1 - self.parameters["slim"] / self.parameters["dense"]
        return f"{self.realised:.1%} of the blocks' parameters removed, {whole:.1%} of all"

    def save(self, path: Path) -> None:
        """Writes plan.json, format 1."""
        write_json(path, {"format": 1, **self.__dict__, "digest": self.digest})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads plan.json and checks its form and digest.

        Raises:
            KoffError: Not a plan, another format, or edited by hand.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != 1:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise KoffError(f"{path}: format is {found!r}, this version reads plan format 1")
        try:
            plan = cls(**{name: data[name] for name in cls.__dataclass_fields__})
            for layer in plan.layers:
                if set(layer) != set(KINDS):
                    raise ValueError("a layer needs ffn_neurons and kv_groups")
                for indices in layer.values():
                    if not indices or any(type(i) is not int or i < 0 for i in indices):
                        raise ValueError("kept indices must be whole numbers from 0, at least one")
                    if any(a >= b for a, b in pairwise(indices)):
                        raise ValueError("kept indices must ascend")
            digest = plan.digest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise KoffError(f"{path}: not a plan ({error}); make it again with `koff-prune plan`") from error
        if digest != data.get("digest"):
            raise KoffError(
                f"{path}: `digest` does not match its layers; make it again with `koff-prune plan`"
            )
        return plan

    def check_made_for(self, path: Path, structure: Structure, model: dict[str, Any], method: str) -> None:
        """Raises KoffError where the plan is another recipe's, or another model's."""
        asked = {
            "target": structure.sparsity, "of": structure.of, "widths": structure.widths,
            "round_to": structure.round_to, "method": method,
        }  # fmt: skip
        made = {**{key: getattr(self, key) for key in asked}, "model": self.model.get("config_sha256")}
        for key, value in {**asked, "model": model["config_sha256"]}.items():
            if made[key] != value:
                raise KoffError(
                    f"{path}: is another run's plan ({key} is {made[key]!r}, here {value!r}); put this run's"
                    " back, or remove it and --resume makes it again"
                )

    def check_fits(self, units: Units) -> None:
        """Raises KoffError where the plan names units that the model does not have."""
        if len(self.layers) != len(units.layers):
            raise KoffError(f"plan: {len(self.layers)} layers, but the model has {len(units.layers)}")
        for i, (layer, have) in enumerate(zip(self.layers, units.layers, strict=True)):
            for kind in KINDS:
                if layer[kind][-1] >= have.count(kind):
                    raise KoffError(
                        f"plan: layers[{i}].{kind} keeps unit {layer[kind][-1]},"
                        f" but there are {have.count(kind)}"
                    )


def all_kept(units: Units) -> Kept:
    """Nothing removed."""
    return [{kind: list(range(layer.count(kind))) for kind in KINDS} for layer in units.layers]


def removed_parameters(kept: Kept, units: Units) -> int:
    """Parameters that leave with everything that is not kept."""
    return sum(
        (have.count(kind) - len(layer[kind])) * have.cost(kind)
        for layer, have in zip(kept, units.layers, strict=True)
        for kind in KINDS
    )


def make_plan(
    scores: Scores, units: Units, structure: Structure, *, model: dict[str, Any], method: str, ranking: str
) -> Plan:
    """Chooses what stays and checks that the target is met.

    Args:
        scores: Higher means keep. Kinds that `structure.units` does not name may be absent.
        units: Of the dense model.
        structure: Target, denominator, widths and rounding.
        model: source, revision, config_sha256.
        method: Written into the plan.
        ranking: `global` ranks units over all layers; `per_layer` removes the same share of every layer, and
            ranks the units of each.

    Raises:
        KoffError: Nothing reachable lies within 0.002 of the target.
    """
    kept = choose(scores, units, structure, structure.sparsity, per_layer=ranking == "per_layer")
    whole, gone = units.denominator(structure.of), units.gone(structure.of)
    realised = (gone + (lost := removed_parameters(kept, units))) / whole
    if abs(realised - structure.sparsity) > TOLERANCE:
        step = TOLERANCE * 0.05
        other = realised
        for k in range(1, 2001):  # walk away from the target until another plan comes up
            target = structure.sparsity + k * step * (1 if realised < structure.sparsity else -1)
            if not 0 < target < 1:
                break
            near = choose(scores, units, structure, target, per_layer=ranking == "per_layer")
            other = (gone + removed_parameters(near, units)) / whole
            if other != realised:
                break
        setting = f"units {structure.units}, round_to {structure.round_to}, widths {structure.widths}"
        if other == realised < structure.sparsity:
            more = "" if "kv_groups" in structure.units else ", or add kv_groups to structure.units"
            raise KoffError(
                f"structure.sparsity {structure.sparsity}: at most {realised:.4f} of {structure.of} can be"
                f" removed ({setting}); lower it{more}"
            )
        nearest = " and ".join(f"{s:.4f}" for s in sorted({realised, other}) if s > 0)
        if "ffn_neurons" not in structure.units:
            finer = ", or add ffn_neurons to structure.units"
        else:
            finer = ", or a smaller structure.round_to" if structure.round_to > 1 else ""
        raise KoffError(
            f"structure.sparsity {structure.sparsity}: nothing reachable lies within {TOLERANCE} of it;"
            f" the nearest are {nearest} ({setting}); take one of them{finer}"
        )
    return Plan(
        model=model,
        method=method,
        ranking=ranking,
        of=structure.of,
        target=structure.sparsity,
        realised=realised,
        widths=structure.widths,
        round_to=structure.round_to,
        parameters={"dense": units.denominator("total"), "slim": units.parameters - lost},
        layers=kept,
    )


def choose(
    scores: Scores, units: Units, structure: Structure, target: float, *, per_layer: bool = False
) -> Kept:
    """The kept indices whose removed parameters come nearest to `target`: KV groups first, the FFN fills.

    The removed parameters differ from target * N by at most half a step, where a step is round_to * c_ffn
    (widths per_layer) or layers * round_to * c_ffn (uniform). Where the FFN cannot fill what the groups leave
    to within `TOLERANCE`, as many groups more or fewer go as it takes.
    """
    whole = units.denominator(structure.of)
    budget = max(0.0, target * whole - units.gone(structure.of))
    if per_layer and structure.widths != "uniform":
        kept = all_kept(units)
        _take_evenly(kept, scores, units, structure, budget)
        return kept
    both = len(structure.units) > 1
    shifts = [0, *(s for n in range(1, _SHIFTS + 1) for s in (-n, n))] if both else [0]
    found: list[tuple[float, Kept]] = []
    for shift in shifts:
        kept = all_kept(units)
        if "kv_groups" in structure.units:
            _drop_kv_groups(kept, scores, units, structure, budget, shift)
        if "ffn_neurons" in structure.units:
            rest = budget - removed_parameters(kept, units)
            if structure.widths == "uniform":
                _fill_uniform(kept, scores, units, structure, rest)
            else:
                _fill_global(kept, scores, units, structure, rest)
        found.append((abs(removed_parameters(kept, units) - budget), kept))
        if found[-1][0] <= TOLERANCE * whole:
            break
    return min(found, key=lambda one: one[0])[1]


def _take_evenly(kept: Kept, scores: Scores, units: Units, structure: Structure, budget: float) -> None:
    """Takes the same share of every layer's units; what rounding leaves of one's is asked of the next."""
    sizes = [sum(layer.count(kind) * layer.cost(kind) for kind in structure.units) for layer in units.layers]
    owed = 0.0
    for i, (stay, layer, size) in enumerate(zip(kept, units.layers, sizes, strict=True)):
        owed += budget * size / sum(sizes)
        gone: dict[UnitKind, list[int]] = {}
        if "kv_groups" in structure.units:
            gone["kv_groups"] = _fallen_groups([i], scores, units, structure, owed)[i]
            owed -= len(gone["kv_groups"]) * layer.kv_cost
        if "ffn_neurons" in structure.units:
            rest, options = owed, _removable(layer.ffn_neurons, structure.round_to)
            count = min(options, key=lambda n: abs(n * layer.ffn_cost - rest))
            gone["ffn_neurons"] = _ascending(scores["ffn_neurons"][i])[:count].tolist()
            owed -= count * layer.ffn_cost
        for kind, units_gone in gone.items():
            out = set(units_gone)
            stay[kind] = [j for j in stay[kind] if j not in out]


def _drop_kv_groups(
    kept: Kept, scores: Scores, units: Units, structure: Structure, budget: float, shift: int
) -> None:
    """Removes the KV groups that fall under the budget when all units stand in one ranking.

    Under uniform widths every layer has a ranking and a share of the budget of its own, and the mean count
    counts. `shift` groups more go (in every layer, if uniform), as far as there are some.
    """
    count = len(units.layers)
    alone = structure.units == ["kv_groups"]
    if structure.widths == "uniform":
        each = [_fallen_groups([i], scores, units, structure, budget / count)[i] for i in range(count)]
        cost = sum(layer.kv_cost for layer in units.layers)
        most = units.layers[0].kv_groups if alone else int(budget // cost)
        most = min(most, units.layers[0].kv_groups - 1)
        same = _uniform_kv_count(sum(map(len, each)), most, units)
        if shift:
            same = _uniform_kv_count(max(0, same + shift) * count, most, units)
        lost = [_ascending(s)[:same].tolist() for s in scores["kv_groups"]]
    else:
        lost = _fallen_groups(list(range(count)), scores, units, structure, budget)
        if shift:
            lost = _lowest_groups(sum(map(len, lost)) + shift, scores, units)
    for layer, gone in zip(kept, lost, strict=True):
        layer["kv_groups"] = [j for j in layer["kv_groups"] if j not in set(gone)]


def _fallen_groups(
    layers: list[int], scores: Scores, units: Units, structure: Structure, budget: float
) -> list[list[int]]:
    """Per layer, the KV groups among the lowest-scored units of `layers` that `budget` parameters pay for."""
    entries = [
        (float(value), kind, i, j)
        for kind in structure.units
        for i in layers
        for j, value in enumerate(scores[kind][i].tolist())
    ]
    entries.sort(key=lambda e: e[0])
    lost: list[list[int]] = [[] for _ in units.layers]
    alone = structure.units == ["kv_groups"]
    spent = 0.0
    for _, kind, i, j in entries:
        cost = units.layers[i].cost(kind)
        if kind == "kv_groups" and len(lost[i]) >= units.layers[i].kv_groups - 1:
            continue
        if spent + cost * (0.5 if alone else 1.0) > budget:
            break
        spent += cost
        if kind == "kv_groups":
            lost[i].append(j)
    return lost


def _lowest_groups(number: int, scores: Scores, units: Units) -> list[list[int]]:
    """Per layer, those of the `number` lowest-scored KV groups that leave every layer one."""
    entries = sorted(
        (float(value), i, j) for i, s in enumerate(scores["kv_groups"]) for j, value in enumerate(s.tolist())
    )
    lost: list[list[int]] = [[] for _ in units.layers]
    for _, i, j in entries:
        if number > 0 and len(lost[i]) < units.layers[i].kv_groups - 1:
            lost[i].append(j)
            number -= 1
    return lost


def _uniform_kv_count(lost: int, most: int, units: Units) -> int:
    """KV groups to leave every layer: the mean, lowered until stock transformers takes the head count."""
    first = units.layers[0]
    count = min(round(lost / len(units.layers)), most, first.kv_groups - 1)
    while (
        count > 0 and units.divisor_heads and units.hidden_size % ((first.kv_groups - count) * first.queries)
    ):
        count -= 1
    return count


def _removable(width: int, round_to: int) -> list[int]:
    """Numbers of neurons that may leave a layer of `width`, ascending: the rest is a multiple of round_to."""
    return [0] + [width - w for w in range((width - 1) // round_to * round_to, 0, -round_to)]


def _fill_uniform(kept: Kept, scores: Scores, units: Units, structure: Structure, budget: float) -> None:
    """Removes the same number of neurons from every layer, the lowest-scored of each."""
    options = _removable(min(layer.ffn_neurons for layer in units.layers), structure.round_to)
    cost = sum(layer.ffn_cost for layer in units.layers)
    count = min(options, key=lambda n: abs(n * cost - budget))
    for layer, score in zip(kept, scores["ffn_neurons"], strict=True):
        gone = set(_ascending(score)[:count].tolist())
        layer["ffn_neurons"] = [j for j in layer["ffn_neurons"] if j not in gone]


def _fill_global(kept: Kept, scores: Scores, units: Units, structure: Structure, budget: float) -> None:
    """Removes runs of round_to neurons, lowest score of the middle one first, over all layers."""
    values, costs, owners, orders = [], [], [], []
    for i, (score, layer) in enumerate(zip(scores["ffn_neurons"], units.layers, strict=True)):
        order = _ascending(score)
        orders.append(order)
        ends = np.array(_removable(layer.ffn_neurons, structure.round_to))
        # the middle unit speaks for its run: the order of units decides, not the scale of their scores, so
        # that gates choose what the scores they started from choose
        values.append(np.asarray(score)[order][(ends[:-1] + ends[1:]) // 2])
        size = np.diff(ends)
        costs.append(size * layer.ffn_cost)
        owners.append(np.full_like(size, i))
    cost, owner = np.concatenate(costs), np.concatenate(owners)
    ranked = _ascending(np.concatenate(values))
    spent = np.concatenate([[0], np.cumsum(cost[ranked])])
    runs = int(np.abs(spent - budget).argmin())
    counts = np.bincount(owner[ranked[:runs]], minlength=len(units.layers)).tolist()
    for i, stay in enumerate(kept):
        stays = np.ones(units.layers[i].ffn_neurons, dtype=bool)
        stays[orders[i][: _removable(units.layers[i].ffn_neurons, structure.round_to)[counts[i]]]] = False
        stay["ffn_neurons"] = stays.nonzero()[0].tolist()


def _ascending(values: Any) -> Any:
    """Places of a tensor's or an array's values, the lowest first, ties in their order; int64."""
    return np.argsort(np.asarray(values), kind="stable")


def even_plan(units: Units, structure: Structure) -> Plan:
    """A plan that takes evenly from all layers: its widths, and whether the target can be met at all.

    Raises:
        KoffError: Nothing reachable lies within 0.002 of the target.
    """
    flat: Any = {
        kind: [np.arange(n, dtype=np.float32) / n for n in (layer.count(kind) for layer in units.layers)]
        for kind in KINDS
    }
    identity = {"source": "", "revision": None, "config_sha256": ""}
    ranking = "per_layer" if structure.widths == "uniform" else "global"
    return make_plan(flat, units, structure, model=identity, method="even", ranking=ranking)
