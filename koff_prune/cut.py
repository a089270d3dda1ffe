"""The cut: units leave the model physically, and memories are sliced to match.

Without compensation every backbone tensor is a byte-exact slice of the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_prune.architecture import EXPECTED, PROVEN
from koff_prune.compensate import Compensation, removed
from koff_prune.plan import Kept, Plan
from koff_prune.units import Units, decoder_layers, ffn_group, head_channels, prune_kv_groups, read_units
from koff_prune.weights import (
    EMBEDDINGS,
    HEAD,
    SHARD_BYTES,
    WEIGHTS,
    Weights,
    has_weights,
    layer_of,
    layer_prefix,
    write_weights,
)


def cut(model: PreTrainedModel, plan: Plan, compensation: Compensation | None = None) -> PreTrainedModel:
    """Removes everything the plan does not keep, in place, through torch-pruning's pruning functions.

    Args:
        model: The dense model, without PEFT.
        plan: What stays.
        compensation: Folded into the consumers first; None leaves exact slices.

    Returns:
        The same model, now the backbone; its config tells the new widths.

    Raises:
        KoffError: The plan names units the model does not have.
    """
    units = read_units(model)
    plan.check_fits(units)
    for i, layer in enumerate(decoder_layers(model)):
        _cut_layer(layer, i, plan, units, compensation)
    model.requires_grad_(False)
    set_widths(model.config, plan.layers, units)
    return model


def _cut_layer(layer: Any, i: int, plan: Plan, units: Units, compensation: Compensation | None) -> None:
    if compensation is not None:
        compensation.fold(layer, i, plan.layers)
    neurons = removed(units, i, "ffn_neurons", plan.layers[i]["ffn_neurons"])
    if neurons:
        ffn_group(layer.mlp, neurons).prune()
        layer.mlp.intermediate_size = len(plan.layers[i]["ffn_neurons"])
    groups = removed(units, i, "kv_groups", plan.layers[i]["kv_groups"])
    if groups:
        prune_kv_groups(layer.self_attn, groups)
    layer.requires_grad_(False)


def cut_on_disk(
    skeleton: Callable[[], PreTrainedModel],
    weights: Weights,
    plan: Plan,
    folder: Path,
    compensation: Compensation | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`cut` and `save_backbone` with no more in memory than a layer or two: the same bytes.

    Args:
        skeleton: Makes the dense model on the meta device.
        weights: Of the dense model.
        plan: What stays.
        folder: Gets what `save_backbone` writes.
        compensation: As for `cut`; its second moments are read a layer at a time.
        shard_bytes: See `write_weights`.

    Raises:
        KoffError: The plan names units the model does not have, or the disk refuses.
    """
    dense, slim = skeleton(), cut(skeleton(), plan)
    units, layers = read_units(dense), decoder_layers(dense)
    like = _stored(slim)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i, names in groupby(like, key=layer_of):
            if i is None:
                for name in names:
                    yield name, weights.read([name])[name]
                continue
            with weights.fill(layers[i], i):
                _cut_layer(layers[i], i, plan, units, compensation)
                state = layers[i].state_dict()
                for name in names:
                    yield name, state[name.removeprefix(layer_prefix(i))]

    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, like, tensors(), shard_bytes)
    _save_config(slim, folder)


def _stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model that are written: tied ones once."""
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    return {k: v for k, v in model.state_dict().items() if k not in tied}


def set_widths(config: PretrainedConfig, kept: Kept, units: Units) -> None:
    """Writes a plan's widths into the config: plain keys where uniform, else `per_layer_config`.

    `per_layer_config` is the form transformers >= 5.15 records; only layers that differ from the dense model
    appear. Stock Llama refuses a number of heads that does not divide its hidden size: that form takes it.
    """
    widths = [
        {
            "intermediate_size": len(layer["ffn_neurons"]),
            "num_attention_heads": len(layer["kv_groups"]) * have.queries,
            "num_key_value_heads": len(layer["kv_groups"]),
        }
        for layer, have in zip(kept, units.layers, strict=True)
    ]
    config.head_dim = units.layers[0].head_dim  # no longer hidden_size / heads
    config.per_layer_config = None  # an earlier cut's
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    known = not units.divisor_heads or units.hidden_size % widths[0]["num_attention_heads"] == 0
    if known and all(w == widths[0] for w in widths):
        for key, value in widths[0].items():
            setattr(config, key, value)
        return
    dense = {key: getattr(config, key) for key in widths[0]}
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {
        i: changed for i, w in enumerate(widths) if (changed := {k: v for k, v in w.items() if v != dense[k]})
    }


def save_backbone(model: PreTrainedModel, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json, generation_config.json and the weights (see `write_weights`) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # widest first, so that every tensor is aligned; the order stays where all are of one dtype
    state = dict(sorted(_stored(model).items(), key=lambda item: -item[1].element_size()))
    write_weights(folder, state, state.items(), shard_bytes)
    _save_config(model, folder)


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    config = model.config.to_dict()
    config.pop("_model_name_or_path", None)
    clean = type(model.config).from_dict(config)
    clean.architectures = [type(model).__name__]
    clean.dtype = next(model.parameters()).dtype
    # readers before transformers 5 know rope_theta and rope_scaling only
    rope = getattr(model.config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        clean.rope_theta = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            clean.rope_scaling = rope
    clean.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def load_backbone(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Opens a backbone with per-layer or uniform widths; no remote code.

    Args:
        folder: A bundle, or a run's `backbone/`: what the cut left, without `cut.recover`.
        dtype: Cast to this; default: as saved.

    Returns:
        The causal LM, in eval mode, frozen.

    Raises:
        KoffError: No backbone there, or damaged weights.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not has_weights(folder):
        raise KoffError(f"{folder}: holds no backbone (config.json and {WEIGHTS} or its index are needed)")
    weights = Weights.open(folder)
    try:
        told = read_json(folder / "config.json")
        if (kind := told.get("model_type")) not in PROVEN + EXPECTED:
            raise KoffError(
                f"{folder}/config.json: a model of type {kind!r} has no known units: not a backbone"
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            if told.get("per_layer_config"):
                for i, layer in enumerate(model.model.layers):
                    model.model.layers[i] = type(layer)(config.per_layer_config[i], i)
    except KoffError:
        raise
    except Exception as error:  # what a damaged config makes transformers raise has no common base
        reason = " ".join(str(error).split())[:300]
        raise KoffError(f"{folder}/config.json: not a config that transformers reads ({reason})") from error
    state = {name: t.to(dtype) if dtype else t for name, t in weights.read().items()}
    if config.tie_word_embeddings and EMBEDDINGS in state:
        state.setdefault(HEAD, state[EMBEDDINGS])
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise KoffError(f"{folder}: the backbone does not fit config.json ({reason})") from error
    model.tie_weights()
    # its buffers are computed, not saved
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    if hasattr(model.model, "rotary_emb_local"):
        model.model.rotary_emb_local = type(model.model.rotary_emb_local)(config=config)
    embed = model.get_input_embeddings()
    if hasattr(embed, "scalar_embed_scale"):  # Gemma
        embed.embed_scale = torch.tensor(embed.scalar_embed_scale)
    if (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model.requires_grad_(False).eval()


def slice_memory(
    tensors: Mapping[str, Mapping[str, torch.Tensor]], plan: Plan, units: Units
) -> dict[str, dict[str, torch.Tensor]]:
    """Cuts one domain's memory to fit the backbone.

    gate, up, q, k and v lose rows of B; down and o lose columns of A; the cache loses heads.

    Args:
        tensors: `lora` (PEFT names) and `kv` tensors trained around the dense model.
        plan: What stays.
        units: Of the dense model.
    """
    result: dict[str, dict[str, torch.Tensor]] = {}
    if "lora" in tensors:
        result["lora"] = {
            name: _slice_lora(name, t, plan, units).contiguous() for name, t in tensors["lora"].items()
        }
    if "kv" in tensors:
        result["kv"] = {
            name: t[torch.tensor(plan.layers[int(name.split(".")[1])]["kv_groups"])].contiguous()
            for name, t in tensors["kv"].items()
        }
    return result


def _slice_lora(name: str, tensor: torch.Tensor, plan: Plan, units: Units) -> torch.Tensor:
    parts = name.split(".")
    i = int(parts[parts.index("layers") + 1])
    have, kept = units.layers[i], plan.layers[i]
    neurons, groups = kept["ffn_neurons"], kept["kv_groups"]
    heads = head_channels(groups, have.head_dim)
    queries = head_channels(groups, have.head_dim, have.queries)
    rows = {"gate_proj": neurons, "up_proj": neurons, "q_proj": queries,
            "k_proj": heads, "v_proj": heads}  # fmt: skip
    columns = {"down_proj": neurons, "o_proj": queries}
    module = next((p for p in parts if p in rows or p in columns), None)
    if module in rows and "lora_B" in parts:
        return tensor[torch.tensor(rows[module])]
    if module in columns and "lora_A" in parts:
        return tensor[:, torch.tensor(columns[module])]
    return tensor


def copy_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer's files beside the backbone."""
    tokenizer.save_pretrained(str(folder))
