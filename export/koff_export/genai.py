"""`genai_config.json`: with it onnxruntime-genai opens a bundle's graph, and its Adapters the memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koff_export.errors import KoffError
from koff_export.files import read_json, write_json

CONFIG = "genai_config.json"
# The precision that genai opens: the smallest that loses little, where the bundle has it. ONNX Runtime has
# its way there, so that int8 is computed as `int8_dynamic`.
_PREFERRED = ("int8", "fp32", "int4")


def write_genai_config(folder: Path, manifest: dict[str, Any]) -> bool:
    """Writes `genai_config.json` into a bundle with an ONNX graph.

    Args:
        folder: The bundle, with the backbone's config.json.
        manifest: Of the bundle: `graph`, `bos`, `eos`, `context`, `domains`.

    Returns:
        Whether it was written: genai holds one cache shape for all layers, so KV heads must be even.
    """
    graph = manifest["graph"]
    if len(set(graph["kv_heads"])) > 1:
        return False
    config = read_json(folder / "config.json")
    queries = config["num_attention_heads"] // config["num_key_value_heads"]  # that share a KV head
    paths = graph.get("fused") or graph["precisions"]
    precision = next(name for name in _PREFERRED if name in paths)
    eos = manifest["eos"] or [0]
    pad = config.get("pad_token_id")
    front = max((domain["kv_tokens"] for domain in manifest["domains"].values()), default=0)
    generation = folder / "generation_config.json"
    asked = read_json(generation) if generation.exists() else {}
    context = manifest["context"] - front  # a learned KV takes positions too, of which genai knows nothing
    told = {
        "model": {
            "type": config["model_type"],
            "bos_token_id": manifest["bos"] if manifest["bos"] is not None else eos[0],
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else eos[0],
            "vocab_size": graph["vocab_size"],
            "context_length": context,
            "decoder": {
                "session_options": {"log_severity_level": 4, "provider_options": []},
                "filename": paths[precision],
                "head_size": graph["head_dim"],
                "hidden_size": config["hidden_size"],
                "num_attention_heads": graph["kv_heads"][0] * queries,
                "num_key_value_heads": graph["kv_heads"][0],
                "num_hidden_layers": graph["layers"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False, "max_length": context, "min_length": 0, "num_beams": 1,
            "num_return_sequences": 1, "past_present_share_buffer": False, "temperature": 1.0,
            "repetition_penalty": asked.get("repetition_penalty") or 1.0, "top_k": 1, "top_p": 1.0,
        },
    }  # fmt: skip
    write_json(folder / CONFIG, told)
    return True


def positions(folder: Path) -> int | None:
    """What a bundle's file says that text and answer may take together; None where it says no such thing."""
    try:
        told = read_json(folder / CONFIG)["model"]["context_length"]
    except (KoffError, KeyError, TypeError):
        return None
    return told if isinstance(told, int) else None
