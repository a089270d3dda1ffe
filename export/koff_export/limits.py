"""What each format can hold, told from a config.json alone: nothing heavy is imported, nothing is trained.

A configuration is a mapping: `config.to_dict()` of a loaded one, or the JSON of a config.json of any age.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from koff_export.errors import KoffError

Config = Mapping[str, Any]

# Families whose layers are as `GraphWriter` writes them.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_FAMILIES = ("llama", "qwen2", "qwen3")
# What a feed-forward block's gate goes through, by transformers' names for it.
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "relu": ("relu",),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast"),
}
ACTIVATIONS = {name: kind for kind, names in _ACTIVATIONS.items() for name in names}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # a table of positions says all about them
_HEAD_DIM = {"qwen3": 128, "gemma3_text": 256}  # where a config.json names none; else hidden size / heads


def check_portable(config: Config) -> None:
    """Refuses a model that no graph holds.

    Raises:
        KoffError: Its family, activation or rotation, with the mend.
    """
    kind, reason = config.get("model_type"), None
    if kind not in FAMILIES:
        reason = f"knows {', '.join(FAMILIES)}, not {kind}"
    elif activation_of(config) not in ACTIVATIONS:
        reason = f"knows the activations {', '.join(ACTIVATIONS)}, not {activation_of(config)}"
    elif moving := rope_kinds(config) & {"dynamic", "longrope"}:
        reason = f"cannot hold the rotation {min(moving)}, which depends on the text's length"
    elif config.get("use_bidirectional_attention"):
        reason = "cannot hold attention that looks ahead, which this model has"
    if reason:
        raise KoffError(f"export.formats: onnx {reason}; leave onnx out")


def check_fused(config: Config) -> None:
    """Refuses a model that the fused profile cannot hold.

    Raises:
        KoffError: The family, activation, rotation, head size or a sliding window, with the mend.
    """
    kind, reason = config.get("model_type"), None
    if kind not in FUSED_FAMILIES:
        reason = f"knows {', '.join(FUSED_FAMILIES)}, not {kind}"
    elif ACTIVATIONS.get(activation_of(config)) != "silu":
        reason = f"knows the activation silu, not {activation_of(config)}"
    elif moving := rope_kinds(config) - set(_STATIC_ROPE):
        reason = f"knows rotations {', '.join(_STATIC_ROPE)}, not {min(moving)}"
    elif has_windows(config):
        reason = "has no sliding windows, which this model has"
    elif head_dim(config) % 16:
        reason = f"wants heads of a multiple of 16, not of {head_dim(config)}"
    if reason:
        raise KoffError(f"export.onnx.profiles: fused {reason}; leave fused out")


def check_gguf(config: Config, *, per_layer: bool, whole_heads: bool) -> None:
    """Refuses a model that llama.cpp would not open, or would compute as another one.

    Args:
        config: Of the dense model or of a backbone.
        per_layer: Whether layers will differ in width.
        whole_heads: Whether no heads are removed.

    Raises:
        KoffError: With the mend.
    """
    kind, rope, reason = config.get("model_type"), rope_kinds(config), None
    if kind == "qwen2" and config["num_attention_heads"] * head_dim(config) != config["hidden_size"]:
        raise KoffError(
            "export.formats: llama.cpp reads a qwen2 whose heads together are as wide as its hidden state;"
            " leave gguf out"
        )
    check_gguf_family(str(kind), per_layer, whole_heads)
    if activation_of(config) not in ("silu", "swish"):
        reason = f"computes silu in a {kind}, and this one has {activation_of(config)}"
    elif has_windows(config):
        reason = f"knows no sliding windows of a {kind}"
    elif kind == "qwen3" and config.get("attention_bias"):
        reason = "knows no attention biases of a qwen3"
    elif unknown := rope - {"default", "linear", *(["llama3"] if kind == "llama" else [])}:
        reason = f"would be given rope scaling {min(unknown)!r}, which is not written"
    if reason:
        raise KoffError(f"export.formats: llama.cpp {reason}; leave gguf out")


def check_gguf_family(model_type: str, per_layer: bool, whole_heads: bool) -> None:
    """Whether llama.cpp has an architecture for such a backbone.

    Args:
        model_type: Of the Hugging Face config.
        per_layer: Whether layers differ in width.
        whole_heads: Whether the query heads together are as wide as the hidden state.

    Raises:
        KoffError: It has none, with the mend.
    """
    if model_type not in GGUF_FAMILIES:
        raise KoffError(
            f"export.formats: gguf is written for {', '.join(GGUF_FAMILIES)}, and this model is a"
            f" {model_type}; leave gguf out"
        )
    if per_layer and model_type != "llama":
        raise KoffError(
            f"export.formats: llama.cpp reads one width for all layers of a {model_type}; set"
            " structure.widths: uniform, or leave gguf out"
        )
    if model_type == "qwen2" and not whole_heads:
        raise KoffError(
            "export.formats: llama.cpp reads a qwen2 with all of its heads alone; set structure.units:"
            " [ffn_neurons], or leave gguf out"
        )


def activation_of(config: Config) -> str:
    """What a feed-forward block's gate goes through, by transformers' name."""
    if config.get("model_type") == "gemma3_text":
        return str(config.get("hidden_activation") or "gelu_pytorch_tanh")
    return str(config.get("hidden_act") or "silu")


def head_dim(config: Config) -> int:
    """Channels of one head."""
    named = config.get("head_dim") or _HEAD_DIM.get(str(config.get("model_type")))
    return int(named or config["hidden_size"] // config["num_attention_heads"])


def rope_kinds(config: Config) -> set[str]:
    """The kinds of rotation that the layers have; older files call the table `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, Mapping) else {}
    by_layer = [table for table in rope.values() if isinstance(table, Mapping)] or [rope]
    return {str(table.get("rope_type") or table.get("type") or "default") for table in by_layer}


def has_windows(config: Config) -> bool:
    """Whether a layer sees the last tokens alone."""
    if config.get("model_type") == "mistral":
        return config.get("sliding_window") is not None
    layers = config.get("layer_types")
    if layers is not None:
        return "sliding_attention" in layers
    # a config.json that leaves the layers to transformers
    return bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
