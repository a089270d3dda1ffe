"""The prunable units of a model, read from torch-pruning's dependency graph.

A unit is the smallest thing that can be removed: one FFN neuron (a row of `gate_proj` and `up_proj`, a column
of `down_proj`), or one KV group (a KV head with every query head that shares it).

The graph is traced one feed-forward block at a time: the whole-model tracer of torch-pruning 1.6.1 never
returns on grouped-query attention (its issue 527), and a block's graph is the same whatever surrounds it. A
trace needs one forward of one block on a single token, on the meta device too, so a model of any size is read
in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_prune.architecture import DIVISOR_HEADS, LayerUnits
from koff_prune.architecture import KINDS as KINDS
from koff_prune.architecture import UnitKind as UnitKind
from koff_prune.architecture import Units as Units


def decoder_layers(model: nn.Module) -> Any:
    """The decoder layers of a transformers causal LM, or of a PEFT model around one.

    Raises:
        KoffError: The model has no `model.layers`.
    """
    wrapped: Any = model
    inner: Any = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    layers: Any = getattr(getattr(inner, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise KoffError(
            f"model {type(inner).__name__}: no decoder layers at model.layers; koff-prune knows the units of"
            " Llama, Qwen2, Qwen3 and Gemma 3 text models"
        )
    return layers


def ffn_group(mlp: nn.Module, neurons: Sequence[int]) -> Any:
    """torch-pruning's group that removes `neurons` of one feed-forward block, rooted at `gate_proj`.

    Raises:
        KoffError: The block is not a gated feed-forward whose group is gate_proj, up_proj and down_proj.
    """
    gate, up, down = (getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if any(hasattr(m, "base_layer") for m in (gate, up, down)):
        raise KoffError("model: an adapter is wrapped around its layers; merge or unload it first")
    if not all(isinstance(m, nn.Linear) for m in (gate, up, down)):
        raise KoffError(
            f"model: {type(mlp).__name__} has no gate_proj, up_proj and down_proj; koff-prune knows the units"
            " of Llama, Qwen2, Qwen3 and Gemma 3 text models"
        )
    assert isinstance(gate, nn.Linear)
    example = torch.zeros(1, 1, gate.in_features, dtype=gate.weight.dtype, device=gate.weight.device)
    frozen = [p for p in mlp.parameters() if not p.requires_grad]
    with torch.enable_grad():  # the tracer follows grad_fn
        try:
            for p in frozen:
                p.requires_grad_(True)
            graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=example)
            group = graph.get_pruning_group(gate, tp.prune_linear_out_channels, idxs=list(neurons))
        finally:
            for p in frozen:
                p.requires_grad_(False)
    members = {id(d.target.module) for d, _ in group if isinstance(d.target.module, nn.Linear)}
    if members != {id(gate), id(up), id(down)}:
        raise KoffError(
            f"model: the feed-forward {type(mlp).__name__} couples other layers than gate, up and down"
        )
    return group


def _group_cost(group: Any) -> int:
    """Parameters that leave with one channel of a torch-pruning group."""
    cost = 0
    for dependency, _ in group:
        module = dependency.target.module
        if not isinstance(module, nn.Linear):
            continue
        if dependency.handler == tp.prune_linear_out_channels:
            cost += module.in_features + (module.bias is not None)
        else:
            cost += module.out_features
    return cost


def _layer_units(layer: Any) -> LayerUnits:
    mlp, attention = layer.mlp, layer.self_attn
    group = ffn_group(mlp, [0])
    head_dim = attention.head_dim
    q, k, v, o = (getattr(attention, f"{n}_proj") for n in "qkvo")
    kv_heads = k.out_features // head_dim
    queries = q.out_features // head_dim // kv_heads
    per_channel = sum(m.in_features + (m.bias is not None) for m in (k, v))
    per_query_channel = q.in_features + (q.bias is not None) + o.out_features
    return LayerUnits(
        ffn_neurons=mlp.gate_proj.out_features,
        kv_groups=kv_heads,
        ffn_cost=_group_cost(group),
        kv_cost=head_dim * (per_channel + queries * per_query_channel),
        queries=queries,
        head_dim=head_dim,
    )


def _unique_parameters(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


def token_parameters(config: Any) -> int:
    """Parameters that a token has: a row of the embedding, and of the head where that is another."""
    return int(config.hidden_size) * (1 if config.tie_word_embeddings else 2)


def read_units(model: PreTrainedModel) -> Units:
    """Reads the units of an untouched causal LM.

    Raises:
        KoffError: The architecture has no known units.
    """
    layers = decoder_layers(model)
    seen: dict[Any, LayerUnits] = {}
    units = []
    for layer in layers:
        # layers of equal shape have equal graphs
        shape = tuple((n, tuple(p.shape)) for n, p in layer.named_parameters())
        if shape not in seen:
            seen[shape] = _layer_units(layer)
        units.append(seen[shape])
    return Units(
        layers=tuple(units),
        parameters=_unique_parameters([model]),
        block_parameters=_unique_parameters(layers),
        hidden_size=model.config.hidden_size,
        divisor_heads=model.config.model_type in DIVISOR_HEADS,
    )


def head_channels(heads: Iterable[int], head_dim: int, queries: int = 1) -> list[int]:
    """Channel indices of whole heads: KV channels with `queries` 1, else those of the heads' query heads."""
    width = head_dim * queries
    return [h * width + j for h in heads for j in range(width)]


class KVGroupPruner(tp.BasePruningFunc):
    """torch-pruning function that removes whole KV groups from an attention module (q, k, v, o together)."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Removes the KV heads `idxs` with every query head that shares them."""
        head_dim, queries = layer.head_dim, layer.num_key_value_groups
        kv, q = head_channels(idxs, head_dim), head_channels(idxs, head_dim, queries)
        tp.prune_linear_out_channels(layer.q_proj, q)
        tp.prune_linear_out_channels(layer.k_proj, kv)
        tp.prune_linear_out_channels(layer.v_proj, kv)
        tp.prune_linear_in_channels(layer.o_proj, q)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        """Number of KV heads."""
        return layer.k_proj.out_features // layer.head_dim

    get_in_channels = get_out_channels


prune_kv_groups: Callable[[nn.Module, Sequence[int]], nn.Module] = KVGroupPruner().prune_out_channels
