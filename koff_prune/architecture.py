"""What a config.json tells of a model: whether its units are known, how many there are, and what each costs.

Nothing heavy is imported here: `plan --dry-run` answers in a second, without torch. `units.py` reads the same
from the model itself; the tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_export.limits import head_dim
from koff_prune.recipe import ModelSection

UnitKind = Literal["ffn_neurons", "kv_groups"]
KINDS: tuple[UnitKind, ...] = ("ffn_neurons", "kv_groups")

# Model types whose units are known. The tests cut and reload tiny models of each proven one.
PROVEN = ("llama", "qwen2", "qwen3", "gemma3_text")
EXPECTED = ("mistral",)
DIVISOR_HEADS = ("llama", "gemma3_text")  # transformers refuses a head count that does not divide hidden_size
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "vocab_size")  # fmt: skip
_MOST_UNITS = 10**8  # neurons of all layers: a config.json that says more is damaged


@dataclass(frozen=True)
class LayerUnits:
    """What one decoder layer can lose.

    Attributes:
        ffn_neurons: Number of FFN neurons.
        kv_groups: Number of KV heads.
        ffn_cost: Parameters removed with one neuron, biases included.
        kv_cost: Parameters removed with one KV group, biases included.
        queries: Query heads that share one KV head.
        head_dim: Channels of one head.
    """

    ffn_neurons: int
    kv_groups: int
    ffn_cost: int
    kv_cost: int
    queries: int
    head_dim: int

    def count(self, kind: UnitKind) -> int:
        """Number of units of a kind."""
        return self.ffn_neurons if kind == "ffn_neurons" else self.kv_groups

    def cost(self, kind: UnitKind) -> int:
        """Parameters removed with one unit of a kind."""
        return self.ffn_cost if kind == "ffn_neurons" else self.kv_cost


@dataclass(frozen=True)
class Units:
    """Every unit of a model, layer by layer, and what the model weighs.

    Attributes:
        layers: One entry per decoder layer.
        parameters: All parameters, tied tensors once.
        block_parameters: Those of the decoder layers alone.
        hidden_size: Width of the residual stream.
        divisor_heads: Whether a uniform head count must divide `hidden_size` (stock Llama refuses others).
        trimmed: Parameters that left before with tokens (`structure.vocabulary`): `parameters` is without.
    """

    layers: tuple[LayerUnits, ...]
    parameters: int
    block_parameters: int
    hidden_size: int
    divisor_heads: bool
    trimmed: int = 0

    def denominator(self, of: str) -> int:
        """Parameters that a sparsity is a share of: `total` or `blocks`."""
        return self.parameters + self.trimmed if of == "total" else self.block_parameters

    def gone(self, of: str) -> int:
        """Those of them that left before any unit."""
        return self.trimmed if of == "total" else 0


def check(config: Mapping[str, Any]) -> None:
    """Refuses a model whose units are not known.

    Raises:
        KoffError: A mixture of experts, several modalities, an encoder, a quantised or already pruned model,
            or any type other than `PROVEN` and `EXPECTED`.
    """
    kind = str(config["model_type"])
    supported = (
        f"supported are {', '.join(PROVEN)} (proven by tests) and {', '.join(EXPECTED)} (expected to work)"
    )
    reason = None
    experts = (config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if any(isinstance(n, int) and n > 1 for n in experts) or "moe" in kind or kind == "mixtral":
        reason = "is a mixture of experts"
    elif any(name in config for name in ("vision_config", "audio_config", "text_config")):
        reason = "reads more than text"
    elif config.get("is_encoder_decoder"):
        reason = "has an encoder"
    elif kind not in PROVEN + EXPECTED:
        reason = "has no known units"
    if reason:
        raise KoffError(f"model.source: a model of type '{kind}' {reason}; {supported}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turned = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if turned != 1 and scaled != "default" and kind in ("llama", "qwen2", "qwen3", "mistral"):
        raise KoffError(
            f"model.source: a {kind} whose rotation is scaled ({scaled}) and partial ({turned}) runs nowhere;"
            " mend rope_parameters in its config.json"
        )
    if config.get("quantization_config"):
        raise KoffError("model.source: the weights are quantised; name the unquantised model, or a GGUF file")
    if config.get("per_layer_config"):
        raise KoffError("model.source: this model is already pruned, layer by layer; name the dense model")


def config_of(section: ModelSection) -> dict[str, Any]:
    """The model's configuration, its weights left alone.

    A config.json is taken as it stands where it names every size, else as transformers completes it, which
    takes seconds to import.

    Raises:
        KoffError: None is at hand, or the architecture is unknown.
    """
    path = None
    if section.config is not None:
        path = Path(section.config)
    elif isinstance(section.source, str):
        folder = Path(section.source).expanduser()
        path = None if any(folder.glob("*.gguf")) else folder / "config.json"
    data = read_json(path) if path is not None and path.is_file() else None
    if not isinstance(data, dict) or "model_type" not in data or any(data.get(n) is None for n in _SIZES):
        from koff_prune.models import open_config

        data = open_config(section).to_dict()
    check(data)
    sizes = [data.get(name) for name in _SIZES]
    head = data.get("head_dim")
    if (
        not all(type(n) is int and n > 0 for n in (*sizes, 1 if head is None else head))
        or data["num_attention_heads"] % data["num_key_value_heads"]
        or data["num_hidden_layers"] * data["intermediate_size"] > _MOST_UNITS
    ):
        told = ", ".join(f"{name} {value!r}" for name, value in zip(_SIZES, sizes, strict=True))
        raise KoffError(
            f"{path or 'model.source'}: no model has the sizes that its configuration names"
            f" ({told}, head_dim {head!r}); mend it, or fetch it again"
        )
    return data


def units_of_config(config: Mapping[str, Any]) -> Units:
    """The units of a model that is known by its configuration alone.

    Args:
        config: With every size in it, of an architecture that `check` takes.
    """
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head = head_dim(config)
    queries, layers = heads // groups, config["num_hidden_layers"]
    bias = bool(config.get("attention_bias")) and kind != "mistral"  # of all four projections
    query_bias = bias or kind == "qwen2"  # of q, k and v
    ffn_bias = bool(config.get("mlp_bias")) and kind == "llama"
    layer = LayerUnits(
        ffn_neurons=inner,
        kv_groups=groups,
        ffn_cost=3 * hidden + 2 * ffn_bias,
        kv_cost=head * (2 * (hidden + query_bias) + queries * (2 * hidden + query_bias)),
        queries=queries,
        head_dim=head,
    )
    norms = hidden * (4 if kind == "gemma3_text" else 2)
    norms += 2 * head if kind in ("qwen3", "gemma3_text") else 0
    block = inner * layer.ffn_cost + groups * layer.kv_cost + norms
    block += hidden * (ffn_bias + (bias and kind != "qwen2"))  # of down_proj and o_proj, which stay
    tied = config.get("tie_word_embeddings", kind == "gemma3_text")
    return Units(
        layers=(layer,) * layers,
        parameters=layers * block + hidden + config["vocab_size"] * hidden * (1 if tied else 2),
        block_parameters=layers * block,
        hidden_size=hidden,
        divisor_heads=kind in DIVISOR_HEADS,
    )


def native_dtype(asked: str = "auto") -> str:
    """What `model.dtype` means here: a CPU that only emulates bfloat16 is several times slower in it."""
    if asked != "auto":
        return asked
    import torch

    from koff_prune.device import device

    if device().type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    can = torch.cpu.get_capabilities()
    return "bfloat16" if any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"
