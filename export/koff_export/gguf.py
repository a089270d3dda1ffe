"""A backbone and its memories' LoRA as GGUF files, for llama.cpp and the programs built on it.

Uniform widths are written as the model's own architecture. llama.cpp reads one feed-forward width for all
layers of those; its architecture `deci` takes a width and head counts per layer, around weights of the Llama
family. There is no place for a learned key/value cache in GGUF: it is left out, and the caller tells so.

Needs torch, transformers and gguf; imported only when exporting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from koff_export.errors import KoffError
from koff_export.files import disk_errors
from koff_export.limits import check_gguf, check_gguf_family

# By the recipe's name: of the matrices; of embedding and head; llama.cpp's name for such a file.
_TYPES = {
    "f32": ("F32", "F32", gguf.LlamaFileType.ALL_F32),
    "f16": ("F16", "F16", gguf.LlamaFileType.MOSTLY_F16),
    "bf16": ("BF16", "BF16", gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": ("Q8_0", "Q8_0", gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": ("Q4_0", "Q8_0", gguf.LlamaFileType.MOSTLY_Q4_0),
}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# llama.cpp's name for the way a byte-level tokenizer splits text, by the expression that does it.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether llama.cpp would split text as a tokenizer does, before anything is trained.

    Raises:
        KoffError: It would not, or nothing says how; with the mend.
    """
    _split_of(tokenizer)


def architecture(model_type: str, per_layer: bool, all_heads: bool) -> gguf.MODEL_ARCH:
    """The llama.cpp architecture of a backbone; see `limits.check_gguf_family`, which refuses the others."""
    check_gguf_family(model_type, per_layer, all_heads)
    return gguf.MODEL_ARCH.DECI if per_layer else _ARCHITECTURES[model_type]


def export_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, kind: str) -> str:
    """Writes a backbone with its tokenizer as one GGUF file.

    Args:
        model: The backbone, of any float dtype.
        tokenizer: Byte-level BPE.
        path: The file to write.
        kind: f32, f16, bf16, q8_0 or q4_0. A matrix whose rows are no multiple of 32 long stays f16 in the
            last two; norms and biases are always float32.

    Returns:
        The architecture's name.

    Raises:
        KoffError: llama.cpp has no such architecture, tokenizer or rope scaling, or the disk refuses.
    """
    config, layers = model.config, list(model.model.layers)
    head_dim = layers[0].self_attn.head_dim
    heads = [layer.self_attn.q_proj.out_features // head_dim for layer in layers]
    kv_heads = [layer.self_attn.k_proj.out_features // head_dim for layer in layers]
    neurons = [layer.mlp.down_proj.in_features for layer in layers]
    per_layer = any(len(set(widths)) > 1 for widths in (heads, kv_heads, neurons))
    arch = architecture(config.model_type, per_layer, heads[0] * head_dim == config.hidden_size)
    whole = heads[0] == config.num_attention_heads
    check_gguf(config.to_dict(), per_layer=per_layer, whole_heads=whole)
    check_tokenizer(tokenizer)
    matrices, embeddings, file_type = _TYPES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_file_type(file_type)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(neurons if per_layer else neurons[0])
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(kv_heads if per_layer else kv_heads[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, config, head_dim)
    _add_tokenizer(writer, tokenizer, config)
    names = gguf.get_tensor_name_map(arch, len(layers))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = _permuted(name, tensor, model).float().numpy()
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is None:
            raise KoffError(f"export.formats: llama.cpp has no place for the tensor {name}; leave gguf out")
        wanted = (
            "F32" if array.ndim == 1 else embeddings if "embed" in name or "lm_head" in name else matrices
        )
        _add(writer, told, array, wanted)
    _write(writer, path)
    return gguf.MODEL_ARCH_NAMES[arch]


def export_gguf_lora(
    model: PreTrainedModel,
    arch: str,
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float,
    path: Path,
) -> None:
    """Writes a memory's LoRA as a GGUF adapter, float32.

    Args:
        model: The backbone that the adapter belongs to.
        arch: What `export_gguf` returned for it.
        lora: By module path: A [r, in], B [out, r]; llama.cpp scales B A by alpha / r, as PEFT does.
        alpha: LoRA's alpha.
        path: The file to write.

    Raises:
        KoffError: llama.cpp has no such architecture, or the disk refuses.
    """
    number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}.get(arch)
    if number is None:
        raise KoffError(
            f"koff.json: gguf.architecture {arch!r} is none of llama.cpp's: export the bundle again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(number, len(model.model.layers))
    for module, (a, b) in lora.items():
        told = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        b = _permuted(f"{module}.weight", b, model)
        _add(writer, f"{told}.lora_a", a.float().numpy(), "F32")
        _add(writer, f"{told}.lora_b", b.float().numpy(), "F32")
    _write(writer, path)


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """Adds a tensor in `kind`, or in f16 where its rows do not divide into that kind's blocks."""
    number = gguf.GGMLQuantizationType[kind]
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[number][0]:
        number = gguf.GGMLQuantizationType.F16
    array = np.ascontiguousarray(array)
    if number == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)


def _write(writer: gguf.GGUFWriter, path: Path) -> None:
    with disk_errors(path):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _permuted(name: str, tensor: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Rows of q and k as llama.cpp's Llama wants them: rotated pairs side by side, not half a head apart."""
    module = name.split(".")[-2]
    if model.config.model_type != "llama" or module not in ("q_proj", "k_proj"):
        return tensor
    head_dim = model.model.layers[0].self_attn.head_dim
    return tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig, head_dim: int) -> None:
    """Base and scaling of the rotation; Llama 3's scaling is a tensor of factors, one for each frequency."""
    rope: dict[str, Any] = dict(config.rope_parameters)
    base, kind = float(rope["rope_theta"]), str(rope.get("rope_type", "default"))
    writer.add_rope_freq_base(base)
    if kind == "default":
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * base ** (i / head_dim)
        smooth = min(1.0, max(0.0, (context / wave - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def _split(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for a byte-level BPE's pre-tokenizer, or None."""
    before = tokenizer.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    spaced = any(part.get("type") == "ByteLevel" and part.get("add_prefix_space") for part in parts)
    if spaced or (tokenizer.get("normalizer") or {}).get("type") not in (None, "NFC"):
        return None  # text would be split as it is, without what the tokenizer does to it first
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return _SPLITS.get(parts[0].get("pattern", {}).get("Regex", ""))
    return None


def _split_of(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], str]:
    """A tokenizer as JSON, and llama.cpp's name for the way it splits text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    split = _split(data)
    if data.get("model", {}).get("type") != "BPE" or split is None:
        raise KoffError(
            "export.formats: gguf is written with byte-level BPE tokenizers whose splitting llama.cpp knows"
            " (GPT-2, SmolLM, Llama 3, Qwen); leave gguf out"
        )
    return data, split


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    data, split = _split_of(tokenizer)
    added = {token["id"]: token for token in data.get("added_tokens", [])}
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    kinds = []
    for number in range(config.vocab_size):
        if number not in words:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            special = added[number]["special"]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(config.vocab_size)])
    writer.add_token_types(kinds)
    merges = data["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    bos, eos = tokenizer.bos_token_id, config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos if eos is not None else tokenizer.eos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    # prompts begin as they did in training: with what the tokenizer itself puts first
    writer.add_add_bos_token(bos is not None and tokenizer("a")["input_ids"][:1] == [bos])
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # of several, `default` is the one that is used unasked
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    if templates:
        writer.add_chat_template(templates)
