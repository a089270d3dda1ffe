"""Koff's choice inside a torch-pruning user's own script.

    importance = UnitImportance("fisher_tokens", model, read_units(model), statistics)   # or
    importance = LearnedImportance("runs/quickstart", model)
    pruner = GroupedQueryPruner(model, None, importance, pruning_ratio=0.2)
    for group in pruner.step(interactive=True):
        group.prune()

torch-pruning's own pruners walk the graph of the whole model and never return where several query heads share
a KV head (its issue 527); this one builds a graph per feed-forward block and takes a KV group as one piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_prune.compensate import removed
from koff_prune.cut import set_widths
from koff_prune.gates import Gates
from koff_prune.plan import Kept, Scores, choose, removed_parameters
from koff_prune.reading import load_recipe
from koff_prune.recipe import BASELINES, Structure
from koff_prune.scores import UnitImportance, by_parameter
from koff_prune.tensor_file import load_tensors
from koff_prune.units import KINDS, UnitKind, decoder_layers, ffn_group, prune_kv_groups, read_units

_NEAR = 0.02  # of the prunable parameters: nearer to the ratio is as asked

__all__ = ["GroupedQueryPruner", "KVGroup", "LearnedImportance", "UnitImportance", "read_units"]


class LearnedImportance(tp.importance.Importance):
    """The gates that a run has learned, as an importance.

    Args:
        folder: The run directory, in which `learn` is finished.
        model: The dense model of that run, untouched.

    Raises:
        KoffError: No learned gates are there, or they are of another model.
    """

    def __init__(self, folder: str | Path, model: PreTrainedModel) -> None:
        folder = Path(folder)
        path = folder / "gates.safetensors"
        if not path.exists():
            raise KoffError(
                f"{folder}: holds no learned gates; make them with `koff-prune learn recipe.yaml`"
            )
        recipe = load_recipe(folder / "recipe.yaml", check_files=False)
        gates = Gates(read_units(model), recipe.structure, recipe.learn.gates.form, None, recipe.seed)
        alpha = load_tensors(path)["alpha"]
        if alpha.shape != gates.alpha.shape:
            raise KoffError(
                f"{path}: holds {len(alpha)} gates, the model has {len(gates.alpha)} units;"
                " give the dense model that the run was made of"
            )
        with torch.no_grad():
            gates.alpha.copy_(alpha)
        self._scores = gates.scores()
        layers = decoder_layers(model)
        self._of_ffn = {id(m): i for i, layer in enumerate(layers)
                        for m in (layer.mlp.gate_proj, layer.mlp.up_proj)}  # fmt: skip
        self._of_attention = {id(layer.self_attn): i for i, layer in enumerate(layers)}

    def __call__(self, group: Any, **kwargs: Any) -> torch.Tensor:
        """float32 [units named by the group's root], higher means keep.

        Raises:
            KoffError: The group is not rooted at a feed-forward block's gate_proj or up_proj, or the run
                learned no gates of neurons.
        """
        if not self._scores["ffn_neurons"]:
            raise KoffError("importance: the run learned no gates of ffn_neurons; give units=['kv_groups']")
        layer = self._of_ffn.get(id(group[0][0].target.module))
        if layer is None:
            raise KoffError(
                f"importance: {group[0][0].target.name} is no gate_proj or up_proj of the model;"
                " name it in ignored_layers"
            )
        return self._scores["ffn_neurons"][layer][torch.tensor(group[0][1])]

    def of_attention(self, attention: nn.Module) -> torch.Tensor:
        """float32 [kv_groups], higher means keep."""
        scores = self._scores["kv_groups"]
        if not scores:
            raise KoffError(
                "importance: the run learned no gates of kv_groups; leave units at ['ffn_neurons']"
            )
        return scores[self._of_attention[id(attention)]]


@dataclass
class KVGroup:
    """KV heads of one attention module with the query heads that share them; cut as one piece.

    Attributes:
        attention: The module.
        idxs: KV heads to remove, ascending.
    """

    attention: nn.Module
    idxs: list[int]

    def prune(self) -> None:
        """Removes the heads from q, k, v and o."""
        prune_kv_groups(self.attention, self.idxs)


class GroupedQueryPruner:
    """Torch-pruning's pruner for Llama, Qwen2, Qwen3 and Gemma 3, grouped-query attention included.

    Args:
        model: Untouched.
        example_inputs: Taken for the sake of torch-pruning's signature; nothing is traced through the model.
        importance: Called with feed-forward groups; `of_attention` of it with attention modules, where
            `units` names kv_groups.
        global_pruning: Rank all layers together; else every layer loses the same share.
        pruning_ratio: Share of the named units' parameters to remove, in (0, 1).
        round_to: Feed-forward widths become multiples of this.
        units: ffn_neurons, kv_groups or both.

    Raises:
        KoffError: One of these cannot be, or the importance lacks what it needs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        example_inputs: Any,
        importance: Callable[..., torch.Tensor],
        global_pruning: bool = True,
        pruning_ratio: float = 0.5,
        round_to: int = 8,
        units: tuple[UnitKind, ...] = ("ffn_neurons",),
    ) -> None:
        if not isinstance(pruning_ratio, int | float) or not 0 < pruning_ratio < 1:
            raise KoffError(f"pruning_ratio: {pruning_ratio} is out of range; choose one between 0 and 1")
        self.model, self.importance, self.global_pruning = model, importance, global_pruning
        if not units or set(units) - set(KINDS):
            raise KoffError(f"units: {units!r} are none; name some of {', '.join(KINDS)}")
        if not isinstance(round_to, int) or not 1 <= round_to <= 1024:
            raise KoffError(f"round_to: {round_to} is out of range; choose a number from 1 to 1024")
        _check_importance(importance, units)
        self.units = read_units(model)
        prunable = sum(layer.count(kind) * layer.cost(kind) for layer in self.units.layers for kind in units)
        self._asked, self._prunable = pruning_ratio, prunable
        sparsity = pruning_ratio * prunable / self.units.parameters
        self.structure = Structure(units=list(units), sparsity=sparsity, of="total", round_to=round_to)
        self._done = False

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Removes what scores lowest; with `interactive`, yields groups whose `prune()` the caller calls.

        The model's config tells the new widths once the groups are through.

        Raises:
            KoffError: The model has been pruned by this pruner already, the importance gives no usable
                scores, or nothing can leave at this ratio.
        """
        if self._done:
            raise KoffError("pruner: has done its step; the scores are of the model before it")
        self._done = True
        if interactive:
            return self._groups()
        for group in self._groups():
            group.prune()
        return None

    def _groups(self) -> Iterator[Any]:
        kept = choose(
            self._scores(), self.units, self.structure, self.structure.sparsity,
            per_layer=not self.global_pruning,
        )  # fmt: skip
        share = removed_parameters(kept, self.units) / self._prunable
        if not share:
            raise KoffError(
                f"pruning_ratio: nothing can leave at {self._asked} with round_to"
                f" {self.structure.round_to}; raise the one or lower the other"
            )
        if abs(share - self._asked) > _NEAR:
            warnings.warn(f"pruning_ratio: {share:.3f} leave, asked was {self._asked}", stacklevel=3)
        try:
            for i, layer in enumerate(decoder_layers(self.model)):
                learns = {name: p.requires_grad for name, p in layer.named_parameters()}
                if neurons := removed(self.units, i, "ffn_neurons", kept[i]["ffn_neurons"]):
                    yield ffn_group(layer.mlp, neurons)
                    layer.mlp.intermediate_size = layer.mlp.gate_proj.out_features
                if heads := removed(self.units, i, "kv_groups", kept[i]["kv_groups"]):
                    yield KVGroup(layer.self_attn, heads)
                for name, parameter in layer.named_parameters():  # torch-pruning's new ones are all to learn
                    parameter.requires_grad_(learns[name])
        finally:
            set_widths(self.model.config, self._widths(), self.units)

    def _scores(self) -> Scores:
        scores: Scores = {kind: [] for kind in KINDS}
        for i, (layer, have) in enumerate(zip(decoder_layers(self.model), self.units.layers, strict=True)):
            for kind in self.structure.units:
                value = self._score(layer, kind, have.count(kind))
                if (
                    not isinstance(value, torch.Tensor)
                    or value.shape != (have.count(kind),)
                    or value.isnan().any()
                ):
                    raise KoffError(
                        f"importance: {type(self.importance).__name__} gives layer {i} no {have.count(kind)}"
                        f" scores of {kind}; one that reads gradients needs a backward pass first"
                    )
                scores[kind].append(self._comparable(value.detach().float().cpu(), have.cost(kind)))
        return scores

    def _score(self, layer: Any, kind: UnitKind, count: int) -> Any:
        if kind == "kv_groups":
            return self.importance.of_attention(layer.self_attn)  # type: ignore[attr-defined]
        of_gradients = isinstance(self.importance, tp.importance.GroupTaylorImportance)
        if of_gradients and layer.mlp.gate_proj.weight.grad is None:
            return None
        return self.importance(ffn_group(layer.mlp, range(count)))

    def _comparable(self, value: torch.Tensor, cost: int) -> torch.Tensor:
        """A unit's score beside those of units of another size."""
        if len(self.structure.units) == 1 or isinstance(self.importance, LearnedImportance):
            return value  # learned ranks are over all kinds
        method = self.importance.method if isinstance(self.importance, UnitImportance) else ""
        return by_parameter(method, value, cost)

    def _widths(self) -> Kept:
        """What the model has now; a group that the caller left alone is still there."""
        return [
            {
                "ffn_neurons": list(range(layer.mlp.gate_proj.out_features)),
                "kv_groups": list(range(layer.self_attn.k_proj.out_features // layer.self_attn.head_dim)),
            }
            for layer in decoder_layers(self.model)
        ]


def _check_importance(importance: Callable[..., torch.Tensor], units: tuple[UnitKind, ...]) -> None:
    """Refuses an importance that cannot score `units`, before anything is pruned."""
    name = type(importance).__name__
    if "kv_groups" in units and not hasattr(importance, "of_attention"):
        raise KoffError(f"units: {name} scores no kv_groups; leave units at ['ffn_neurons']")
    if not isinstance(importance, UnitImportance) or importance.method in ("magnitude", "random"):
        return
    methods = (*BASELINES, "fisher_tokens")
    if importance.method not in methods:
        raise KoffError(
            f"importance: there is no method {importance.method!r}; name one of {', '.join(methods)}"
        )
    found = importance.statistics
    for kind in units:
        if found is None or (0, kind) not in found.second:
            raise KoffError(
                f"importance: {importance.method} needs statistics of {kind}; give what `collect` returns"
            )
