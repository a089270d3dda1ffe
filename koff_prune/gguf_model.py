"""Reads a model out of a GGUF file: once, into a Hugging Face folder in the cache.

transformers knows how to dequantise; what it passes over in silence is read here or refused.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig

from koff_export.errors import KoffError
from koff_export.files import disk_errors, sha256_file, staged_dir
from koff_prune.packages import cache_dir
from koff_prune.pretrained import load, short

if TYPE_CHECKING:
    from gguf import GGUFReader

_READ = 3  # counts changes to what is read and refused: copies that were made before are made anew
_TYPES = ("llama", "qwen2", "qwen3", "gemma3")  # as GGUF names architectures
_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # of a head
_SIZES = (
    *_WIDTHS,
    "block_count",
    "rope.freq_base",
    "attention.layer_norm_rms_epsilon",
    "final_logit_softcapping",
)
_PROJECTIONS = ("attn_q", "attn_k", "attn_v")
_IN_A_BLOCK = {
    *_PROJECTIONS, "attn_norm", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
}  # fmt: skip
_MORE_IN_A_BLOCK = {
    "qwen3": {"attn_q_norm", "attn_k_norm"},
    "gemma3": {"attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"},
}
# The rotation of Llama 3.1 and later, but for `factor`: what all of them have, and GGUF does not write down.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_DAMAGED = (
    ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError, TypeError,
    RecursionError,
)  # fmt: skip


def kept_copy(path: Path, dtype: str, cache: Path | None) -> Path:
    """Where the dequantised copy of the GGUF file `path` in `dtype` is, or will be: by the file's digest."""
    return cache_dir(cache) / "models" / f"{sha256_file(path)}-{dtype}-{_READ}"


def dequantised(path: Path, name: str, dtype: str, cache: Path | None) -> Path:
    """A Hugging Face folder with the weights of `path` in `dtype`, such as "float32"; made once.

    Raises:
        KoffError: The file is refused (see `gguf_config`), or lacks weights; `name` is the recipe's for it.
    """
    kept = kept_copy(path, dtype, cache)
    if kept.is_dir():
        return kept
    with disk_errors(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.parent / f".{kept.name}.lock"):
            if kept.is_dir():
                return kept
            config = gguf_config(path)
            print(f"koff-prune: converting {path.name} (once) …", file=sys.stderr, flush=True)
            model, info = load(
                AutoModelForCausalLM, str(path.parent), name, gguf_file=path.name, output_loading_info=True,
                config=config, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype),
            )  # fmt: skip
            if missing := sorted(info["missing_keys"]):
                raise KoffError(
                    f"{path} lacks {len(missing)} weights such as {missing[0]}: it is incomplete,"
                    " fetch it again"
                )
            tokenizer = load(AutoTokenizer, str(path.parent), name, gguf_file=path.name)
            with torch.device("meta"):  # a model without the quantiser, which would refuse to be saved
                clean = AutoModelForCausalLM.from_config(_clean(model.config), dtype=getattr(torch, dtype))
            clean.load_state_dict(model.state_dict(), strict=True, assign=True)
            clean.tie_weights()
            with staged_dir(kept) as stage:
                clean.save_pretrained(stage)
                tokenizer.save_pretrained(stage)
    return kept


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration that a GGUF file describes, with what transformers does not read of it.

    Raises:
        KoffError: The file is no GGUF, is truncated, or holds a model that would not be read as it is.
    """
    reader, kind = _open(path)
    if (parts := _value(path, reader, "split.count")) and parts > 1:
        raise KoffError(
            f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge`, or name a folder"
            " of the model for transformers"
        )

    def told(key: str) -> Any:
        return _value(path, reader, f"{kind}.{key}")

    sizes = {key: told(key) for key in _SIZES}
    for key, value in sizes.items():
        whole = type(value) in (int, float) and math.isfinite(value) and value > 0
        if value is not None and not whole:
            raise KoffError(f"{path} is a damaged GGUF file: {kind}.{key} is {value!r}; fetch it again")
    if told("expert_count"):
        raise KoffError(f"{path} holds a mixture of experts; supported are dense models")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name in sorted(tensors):
        if not _is_read(name, kind, sizes["block_count"] or 0):
            raise _lost(path, name)
    scaling, factors = told("rope.scaling.type"), [told("rope.scaling.factor"), told("rope.scale_linear")]
    if scaling not in (None, "", "none") or (scaling != "none" and set(factors) - {None, 0.0, 1.0}):
        raise _lost(path, "a scaled rotation")
    if len({sizes[key] for key in _WIDTHS} - {None}) > 1:
        raise _lost(path, "heads whose keys, values or rotation are not of one width")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever values that cannot be lead it to
        raise KoffError(f"model.source: {path} holds no configuration to read ({short(error)})") from error
    config = _clean(config)
    if kind == "qwen3" and (width := sizes["attention.key_length"]):
        config.head_dim = width  # 128 where transformers is left to itself
    if kind == "gemma3":
        # As llama.cpp scales, which GGUF does not write down: by a head's width, but for the model of 27B.
        shared = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = shared if config.num_hidden_layers == 62 else config.head_dim
        config.final_logit_softcapping = sizes["final_logit_softcapping"]
    if rotation := tensors.get("rope_freqs.weight"):
        config.rope_parameters = _rotation(path, config, np.asarray(rotation.data, dtype=np.float64).ravel())
    return config


def _is_read(name: str, kind: str, blocks: int) -> bool:
    """Whether transformers reads the tensor `name` of a model of `blocks` layers."""
    if name in ("token_embd.weight", "output_norm.weight", "output.weight"):
        return True
    if name == "rope_freqs.weight":
        return kind == "llama"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not found or int(found[1]) >= blocks:
        return False
    if found[3] == "bias":
        return kind == "qwen2" and found[2] in _PROJECTIONS
    return found[2] in _IN_A_BLOCK | _MORE_IN_A_BLOCK.get(kind, set())


def _rotation(path: Path, config: PretrainedConfig, factors: np.ndarray) -> dict[str, Any]:
    """rope_parameters whose frequencies are those of a plain rotation divided by `factors` (head_dim / 2)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = dict(config.rope_parameters)
    scaled = {**plain, "rope_type": "llama3", "factor": float(factors.max(initial=1.0)), **_LLAMA3}
    twin = type(config).from_dict({**config.to_dict(), "rope_parameters": scaled})
    computed = ROPE_INIT_FUNCTIONS["llama3"](twin, torch.device("cpu"))[0].double().numpy()
    width = 2 * len(computed)
    wanted = plain["rope_theta"] ** (-np.arange(0, width, 2) / width)
    if config.model_type != "llama" or factors.shape != computed.shape or not np.allclose(
        wanted / computed, factors, rtol=1e-3
    ):  # fmt: skip
        raise _lost(path, "a scaled rotation (rope_freqs.weight) that is not Llama 3's")
    return scaled


def _lost(path: Path, what: str) -> KoffError:
    return KoffError(
        f"{path} has {what}, which would be lost: a GGUF file is read without; name the model's"
        " Hugging Face folder"
    )


def _open(path: Path) -> tuple[GGUFReader, str]:
    """The reader of a whole GGUF file of a supported architecture, and that architecture."""
    from gguf import GGUFReader  # slow to import, and needed only before the conversion

    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] != b"GGUF":
        raise KoffError(f"{path} is not a GGUF file (it does not start with 'GGUF'): fetch it again")
    try:
        reader = GGUFReader(path)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    except _DAMAGED as error:
        raise KoffError(f"{path} is a truncated or damaged GGUF file: fetch it again") from error
    if end == 0 or end > path.stat().st_size:
        raise KoffError(
            f"{path} is a truncated GGUF file: {end} bytes are described, {path.stat().st_size} are there"
        )
    architecture = str(_value(path, reader, "general.architecture") or "")
    if architecture not in _TYPES:
        raise KoffError(
            f"{path} holds a model of architecture '{architecture}'; supported in GGUF are"
            f" {', '.join(_TYPES)}"
        )
    return reader, architecture


def _value(path: Path, reader: GGUFReader, key: str) -> Any:
    """What the file says of `key`, or None."""
    try:
        field = reader.get_field(key)
        return None if field is None else field.contents()
    except _DAMAGED as error:
        raise KoffError(f"{path} is a truncated or damaged GGUF file: fetch it again") from error


def _clean(config: PretrainedConfig) -> PretrainedConfig:
    """`config` without what says that it is quantised, and where it lay."""
    data = config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        data.pop(key, None)
    return type(config).from_dict(data)
