"""Scores of units from one pass over the scoring text, and the baselines as torch-pruning importances.

For a unit u whose consumer (`down_proj` or `o_proj`) reads the channels x_c, c in u, and a loss L, the
gradient of a gate z_u at 1 is dL/dz_u = sum over tokens t and channels c of x_tc * dL/dx_tc. From it and from
the weights:

* magnitude: L2 norm of all weights that leave with the unit.
* wanda: sum over c of ||W[:, c]||_1 * ||x_c||_2 over all scoring tokens (Sun et al. 2023, structured).
* taylor: |sum over windows of dL/dz_u| (Molchanov et al. 2019, first order).
* fisher: sum over windows of (dL/dz_u)^2.
* fisher_tokens: sum over tokens of (x_t . dL/dx_t)^2: the same before a window's tokens cancel each other.
* curvature: the true Fisher, whose labels are drawn from the model's own predictions instead of read from the
  text (Kunstner et al. 2019, "Limitations of the empirical Fisher approximation"): mean over draws of
  (dL/dz_u)^2 summed over windows, which is unbiased, and of (x_t . dL/dx_t)^2 summed over tokens, which is
  less noisy.
* random.

Higher means keep. Where kinds of units mix, scores are divided by the unit's cost: magnitude's squares, and
random's not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_prune.chat import IGNORED, tokens_and_labels
from koff_prune.device import device_of
from koff_prune.plan import Scores
from koff_prune.recipe import Structure
from koff_prune.surgeon import elimination_costs
from koff_prune.tensor_file import TensorFile
from koff_prune.units import KINDS, UnitKind, Units, decoder_layers, ffn_group
from koff_prune.weights import Weights

Place = tuple[int, UnitKind]
DRAWS = 2  # label sequences that the model draws for every scoring window


class SecondMoments(Mapping[Place, torch.Tensor]):
    """Those of a statistics file, read one by one when asked for: together they outweigh the model."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._names = {_place(name): name for name in file if name.startswith("second.")}

    def __getitem__(self, place: Place) -> torch.Tensor:
        return self._file[self._names[place]]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _place(name: str) -> Place:
    _, i, kind = name.split(".")
    return int(i), kind  # type: ignore[return-value]


@dataclass
class Statistics:
    """What one pass over the scoring text leaves behind, per layer and kind.

    Attributes:
        second: float32 [channels, channels], sum over tokens of x x^T at the consumer's input.
        taylor: float32 [units], sum over windows of dL/dz.
        fisher: float32 [units], sum over windows of (dL/dz)^2.
        fisher_tokens: float32 [units], sum over tokens of (x . dL/dx)^2.
        curvature: float32 [units], mean of both sums for labels that the model draws.
        output: float32 [hidden, hidden], sum over tokens of g g^T, g = dL/d(the consumer's output) for labels
            that the model draws; mean over draws.
        tokens: Scoring tokens seen.
    """

    second: Mapping[Place, torch.Tensor] = field(default_factory=dict)
    taylor: dict[Place, torch.Tensor] = field(default_factory=dict)
    fisher: dict[Place, torch.Tensor] = field(default_factory=dict)
    fisher_tokens: dict[Place, torch.Tensor] = field(default_factory=dict)
    curvature: dict[Place, torch.Tensor] = field(default_factory=dict)
    output: dict[Place, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, for a safetensors file."""
        tables = {"second": self.second, "taylor": self.taylor, "fisher": self.fisher,
                  "fisher_tokens": self.fisher_tokens, "curvature": self.curvature,
                  "output": self.output}  # fmt: skip
        flat = {f"{t}.{i}.{kind}": v for t, table in tables.items() for (i, kind), v in table.items()}
        return {**flat, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def open(cls, path: Path) -> Statistics:
        """Reads a file of `tensors`; the second moments stay on the disk until they are asked for.

        Raises:
            KoffError: The file is missing or damaged.
        """
        file = TensorFile(path)
        result = cls(second=SecondMoments(file), tokens=int(file["tokens"]))
        for name in file:
            if name != "tokens" and not name.startswith("second."):
                getattr(result, name.split(".")[0])[_place(name)] = file[name]
        return result


def consumer(layer: Any, kind: UnitKind) -> nn.Linear:
    """The linear layer that reads a kind's activations: `down_proj` or `o_proj`."""
    return layer.mlp.down_proj if kind == "ffn_neurons" else layer.self_attn.o_proj


def collect(
    model: PreTrainedModel,
    units: Units,
    kinds: Iterable[UnitKind],
    windows: Iterable[torch.Tensor],
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> Statistics:
    """Runs the scoring windows through the dense model and back, once for the text and once for every draw.

    Args:
        model: Dense, frozen.
        units: Of that model.
        kinds: Which kinds to collect for.
        windows: Token windows, int64 [window] each.
        progress: Called with the tokens of each finished window.
        seed: Of the drawn labels.

    Returns:
        The statistics, float32 on the CPU, wherever the model is.

    Raises:
        KoffError: The model's output is no number.
    """
    result = Statistics()
    layers = decoder_layers(model)
    kinds = tuple(kinds)
    inputs: dict[Place, torch.Tensor] = {}
    gradients: dict[Place, torch.Tensor] = {}
    outward: dict[Place, torch.Tensor] = {}  # gradients at the consumers' outputs
    handles = []
    for i, layer in enumerate(layers):
        for kind in kinds:
            module, place = consumer(layer, kind), (i, kind)
            handles.append(module.register_forward_pre_hook(_capture(place, inputs, gradients)))
            handles.append(module.register_forward_hook(_capture_output(place, outward)))
    embed, device = model.get_input_embeddings(), device_of(model)
    generator = torch.Generator().manual_seed(seed)
    try:
        for window in windows:
            # the base is frozen, so the gradient enters through the embeddings
            read, wanted = tokens_and_labels(window)
            said = wanted[1:] != IGNORED
            read, wanted, said = read.to(device), wanted.to(device), said.to(device)
            embedded = embed(read[None]).detach().requires_grad_(True)
            with torch.enable_grad():
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
                if not said.all():
                    logits = logits[said]
                if not torch.isfinite(logits).all():
                    raise KoffError(
                        "model.source: what the dense model says of the scoring text is not finite; name"
                        " whole weights, or set model.dtype: float32"
                    )
                labels = [wanted[1:][said], *_drawn(logits.detach(), generator)]
                for n, target in enumerate(labels):
                    loss = functional.cross_entropy(logits, target, reduction="sum")
                    loss.backward(retain_graph=n < DRAWS)
                    for place, x in inputs.items():
                        add = _accumulate if n == 0 else _accumulate_drawn
                        add(result, place, x[0].float(), gradients[place][0].float(), units)
                        if n > 0:
                            g = outward[place][0].float()
                            _add(result.output, place, (g.T @ g) / DRAWS)
            result.tokens += int(said.sum()) + 1  # what is predicted, and the token before
            inputs.clear()
            gradients.clear()
            outward.clear()
            if progress:
                progress(len(window))
    finally:
        for handle in handles:
            handle.remove()
    return result


def _capture(place: Place, inputs: dict[Place, torch.Tensor], gradients: dict[Place, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[place] = args[0].detach()
        if args[0].requires_grad:
            args[0].register_hook(lambda g: gradients.__setitem__(place, g.detach()))

    return hook


def _capture_output(place: Place, gradients: dict[Place, torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: gradients.__setitem__(place, g.detach()))

    return hook


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """DRAWS label sequences, int64 [tokens] each, from the model's predictions [tokens, vocabulary]."""
    probability = logits.softmax(-1).cpu()  # where the generator is
    drawn = torch.multinomial(probability, DRAWS, replacement=True, generator=generator)
    return list(drawn.to(logits.device).T)


def _per_token(place: Place, x: torch.Tensor, g: torch.Tensor, units: Units) -> torch.Tensor:
    """What each token adds to dL/dz, float32 [tokens, units]."""
    return (x * g).view(len(x), units.layers[place[0]].count(place[1]), -1).sum(2)


def _add(table: dict[Place, torch.Tensor], place: Place, value: torch.Tensor) -> None:
    value = value.cpu()
    table[place] = table[place].add_(value) if place in table else value


def _accumulate_drawn(
    result: Statistics, place: Place, x: torch.Tensor, g: torch.Tensor, units: Units
) -> None:
    per_token = _per_token(place, x, g, units)
    _add(result.curvature, place, (per_token.sum(0).square() + per_token.square().sum(0)) / (2 * DRAWS))


def _accumulate(result: Statistics, place: Place, x: torch.Tensor, g: torch.Tensor, units: Units) -> None:
    per_token = _per_token(place, x, g, units)
    window = per_token.sum(0)
    _add(result.taylor, place, window)
    _add(result.fisher, place, window.square())
    _add(result.fisher_tokens, place, per_token.square().sum(0))
    assert isinstance(result.second, dict)  # these are being collected, not read
    if place in result.second and x.device.type == "cpu":
        result.second[place].addmm_(x.T, x)  # without a second square of memory
    else:
        _add(result.second, place, x.T @ x)


class UnitImportance(tp.importance.Importance):
    """A baseline as a torch-pruning importance.

    Called with a group rooted at a `gate_proj` it scores that layer's neurons; `of_attention` scores the KV
    groups of an attention module, which torch-pruning has no group for.

    Args:
        method: magnitude, wanda, taylor, fisher, fisher_tokens, curvature or random.
        model: The dense model, whose modules the groups name.
        statistics: Of that model; magnitude and random do without.
        seed: Of random.
    """

    def __init__(
        self, method: str, model: nn.Module, units: Units, statistics: Statistics | None = None, seed: int = 0
    ) -> None:
        self.method, self.units, self.statistics, self.seed = method, units, statistics, seed
        self.layers = decoder_layers(model)
        self._of_gate = {id(layer.mlp.gate_proj): i for i, layer in enumerate(self.layers)}
        self._of_attention = {id(layer.self_attn): i for i, layer in enumerate(self.layers)}

    def __call__(self, group: Any, **kwargs: Any) -> torch.Tensor:
        """float32 [units named by the group's root], higher means keep."""
        root = group[0][0].target.module
        return self._score(self._of_gate[id(root)], "ffn_neurons")[torch.tensor(group[0][1])]

    def of_attention(self, attention: nn.Module) -> torch.Tensor:
        """float32 [kv_groups], higher means keep."""
        return self._score(self._of_attention[id(attention)], "kv_groups")

    def _score(self, i: int, kind: UnitKind) -> torch.Tensor:
        have, layer = self.units.layers[i], self.layers[i]
        if self.method == "random":
            generator = torch.Generator().manual_seed(self.seed * 7919 + i * 2 + (kind == "kv_groups"))
            return torch.rand(have.count(kind), generator=generator)
        if self.method == "magnitude":
            return _squares(layer, kind, have.count(kind)).sqrt()
        assert self.statistics is not None, f"{self.method} needs statistics"
        if self.method == "wanda":
            norms = self.statistics.second[(i, kind)].diagonal().sqrt()
            weight = consumer(layer, kind).weight.detach().float().abs().sum(0).cpu()
            return (weight * norms).view(have.count(kind), -1).sum(1)
        value = getattr(self.statistics, self.method)[(i, kind)]
        return value.abs()


def _squares(layer: Any, kind: UnitKind, count: int) -> torch.Tensor:
    """Sum of squares of every weight and bias that leaves with a unit, float32 [units]."""
    if kind == "ffn_neurons":
        rows, column = [layer.mlp.gate_proj, layer.mlp.up_proj], layer.mlp.down_proj
    else:
        attention = layer.self_attn
        rows, column = [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj
    total = column.weight.detach().float().square().sum(0).view(count, -1).sum(1)
    for module in rows:
        squares = module.weight.detach().float().square().sum(1)
        if module.bias is not None:
            squares = squares + module.bias.detach().float().square()
        total = total + squares.view(count, -1).sum(1)
    return total


def score_units(
    method: str,
    model: PreTrainedModel,
    units: Units,
    structure: Structure,
    statistics: Statistics | None,
    seed: int = 0,
    weights: Weights | None = None,
) -> Scores:
    """A baseline's scores for every unit that the structure names, comparable over kinds and layers.

    Args:
        method: See `UnitImportance`.
        model: Dense; on the meta device where `weights` has its tensors, which are then read layer by layer.
        units: Of that model.
        structure: What can go; where it names both kinds, scores are divided by cost.
        statistics: Of that model; magnitude and random do without.
        seed: Of random.
        weights: Of the model, on the disk.
    """
    importance = UnitImportance(method, model, units, statistics, seed)
    scores: Scores = {kind: [] for kind in KINDS}
    for i, layer in enumerate(importance.layers):
        with weights.fill(layer, i) if weights is not None else nullcontext():
            for kind in structure.units:
                if kind == "ffn_neurons":
                    value = importance(ffn_group(layer.mlp, range(units.layers[i].ffn_neurons)))
                else:
                    value = importance.of_attention(layer.self_attn)
                scores[kind].append(
                    by_parameter(method, value, units.layers[i].cost(kind))
                    if len(structure.units) > 1
                    else value
                )
    return scores


def by_parameter(method: str, value: torch.Tensor, cost: int) -> torch.Tensor:
    """Scores of units of unlike sizes made comparable: what is lost with a unit over its parameters."""
    if method == "random":  # every unit alike
        return value
    if method == "magnitude":  # a norm grows with the root of the size: the mean square does not
        return value.square() / cost
    return value / cost


def removal_costs(
    method: str,
    model: PreTrainedModel,
    units: Units,
    structure: Structure,
    statistics: Statistics,
    ridge: float = 0.01,
) -> Scores:
    """What removing each unit is expected to add to the loss, in nats per token: half its Fisher information.

    Args:
        method: fisher, fisher_tokens, curvature; or surgeon: what is left of it under the compensation, when
            the unit's turn comes.
        model: Dense.
        units: Of that model.
        structure: Where it names both kinds, costs are by parameter.
        statistics: Of that model.
        ridge: Of the compensation, for surgeon.
    """
    if method != "surgeon":
        scores = score_units(method, model, units, structure, statistics)
        return {kind: [0.5 * s / statistics.tokens for s in table] for kind, table in scores.items()}
    costs: Scores = {kind: [] for kind in KINDS}
    for i, layer in enumerate(decoder_layers(model)):
        for kind in structure.units:
            place, count = (i, kind), statistics.tokens
            cost = elimination_costs(
                statistics.second[place] / count, consumer(layer, kind).weight.detach(),
                statistics.output[place] / count, statistics.curvature[place] / count, ridge,
            )  # fmt: skip
            costs[kind].append(cost / units.layers[i].cost(kind) if len(structure.units) > 1 else cost)
    return costs
