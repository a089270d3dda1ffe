"""GGUF files, opened with llama.cpp itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from gguf import GGUFReader
from model_helpers import logits, memories_on, random_plan, tiny_config, tiny_model, token_ids
from run_helpers import koff_prune, recipe_of
from text_helpers import merging_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from koff_export.bundle import open_manifest
from koff_export.errors import KoffError
from koff_export.gguf import architecture, export_gguf, export_gguf_lora
from koff_prune import load_bundle
from koff_prune.cut import cut
from koff_prune.formats import lora_slots
from koff_prune.units import read_units

ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama per layer": ("llama", {}, "per_layer", "deci"),
    "llama uniform, tied, biases": (
        "llama", {"tie_word_embeddings": True, "attention_bias": True}, "uniform", "llama"
    ),
    "llama 3's rope": ("llama", {"rope_parameters": ROPE}, "uniform", "llama"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "uniform", "qwen2"),
    "qwen3": ("qwen3", {}, "uniform", "qwen3"),
}  # fmt: skip


def llama_cpp(path: Path, lora: Path | None, ids: list[int]) -> dict[int, float]:
    """Log-probabilities after `ids` by token, the likeliest alone, as llama.cpp computes them."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_gpu_layers, params.verbosity, params.warmup = 64, 0, -1, False
    params.cpuparams.n_threads = 1
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    # half a character comes without probabilities; a bias makes it an "a" and leaves those alone
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": 0.0, "logit_bias": [["a", 1000]]}
    request = Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request, timeout=60) as answer:
        told = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in told}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_llama_cpp_says_what_torch_says(case: str, tmp_path: Path) -> None:
    family, options, widths, wanted = CASES[case]
    model = tiny_model(
        family, vocab_size=259, head_dim=16 if family == "qwen2" else 32, hidden_size=64, **options
    )
    plan = random_plan(read_units(model), widths=widths, sparsity=0.2)
    if family == "qwen2":  # llama.cpp wants all of its heads
        plan = replace(plan, layers=[{**layer, "kv_groups": [0, 1]} for layer in plan.layers])
    model = cut(model, plan)
    ids = token_ids(1, 24)
    memories = memories_on(model, kv=False)
    expected = {name: logits(memories, ids, name)[0, -1].log_softmax(-1) for name in (None, "law")}
    assert (expected[None] - expected["law"]).abs().max() > 0.1
    slots = lora_slots(memories.tensors("law")["lora"])
    model = memories.unwrap()
    assert export_gguf(model, merging_tokenizer(), tmp_path / "model.gguf", "f32") == wanted
    export_gguf_lora(model, wanted, slots, 6, tmp_path / "law.gguf")
    for lora, reference in ((None, expected[None]), (tmp_path / "law.gguf", expected["law"])):
        found = llama_cpp(tmp_path / "model.gguf", lora, ids[0].tolist())
        assert len(found) == 20
        assert max(abs(reference[token] - value) for token, value in found.items()) < 1e-4
        assert set(found) == set(torch.topk(reference, 20).indices.tolist())


@pytest.mark.parametrize(
    ("model_type", "per_layer", "all_heads", "says"),
    [
        ("qwen2", True, True, "structure.widths: uniform"),
        ("qwen2", False, False, r"structure.units: \[ffn_neurons\]"),
        ("gemma3_text", False, True, "leave gguf out"),
    ],
)
def test_what_llama_cpp_cannot_read_is_told(
    model_type: str, per_layer: bool, all_heads: bool, says: str
) -> None:
    with pytest.raises(KoffError, match=says):
        architecture(model_type, per_layer, all_heads)


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "computes silu"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding windows",
        ),
        ("qwen3", {"attention_bias": True}, "attention biases"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "'yarn'"),
        ("qwen2", {"head_dim": 64}, "whose heads together"),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "'llama3'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, settings: dict[str, Any], says: str
) -> None:
    config = tiny_config(family, num_hidden_layers=2, **settings)
    recipe = recipe_of(
        tmp_path,
        config,
        structure={"widths": "uniform", "round_to": 1, "sparsity": 0.1},
        export={"formats": ["safetensors", "gguf"]},
    )
    merging_tokenizer().save_pretrained(tmp_path / "model")
    answer = koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and says in answer.err and "leave gguf out" in answer.err, answer.err
    assert not (tmp_path / "run" / "statistics.safetensors").exists()
    mended = koff_prune(
        capsys, "plan", recipe, "--out", tmp_path / "run", "--set", "export.formats=[safetensors]"
    )
    assert "holds a run" not in mended.err, "nothing had begun"


def test_an_architecture_of_no_ones_is_told(tmp_path: Path) -> None:
    with pytest.raises(KoffError, match="gguf.architecture 'x'"):
        export_gguf_lora(tiny_model(), "x", {}, 1, tmp_path / "law.gguf")


@pytest.mark.parametrize(
    "odd_part",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"normalizer": {"type": "Lowercase"}},
    ],
    ids=["words", "a space in front", "lower case"],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_told(tmp_path: Path, odd_part: dict[str, Any]) -> None:
    odd = merging_tokenizer()
    made = json.loads(odd.backend_tokenizer.to_str()) | odd_part
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)))
    with pytest.raises(KoffError, match="byte-level BPE"):
        export_gguf(tiny_model(vocab_size=259), odd, tmp_path / "model.gguf", "f32")


@pytest.mark.timeout(240)
def test_a_bundle_opens_in_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(
        tmp_path,
        tiny_config(num_hidden_layers=2, vocab_size=259, head_dim=16, hidden_size=64),
        export={"formats": ["safetensors", "gguf"], "gguf": {"type": "q8_0"}},
    )
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    answer = koff_prune(capsys, "export", recipe, "--out", tmp_path / "run")
    assert answer.code == 0 and "no learned KV: there, law, code are their LoRA alone" in answer.err
    bundle = tmp_path / "run" / "bundle"
    manifest = open_manifest(bundle)
    assert manifest.gguf is not None and manifest.gguf.architecture == "deci"
    written = GGUFReader(bundle / manifest.gguf.model).fields
    assert written["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    assert written["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    ids = merging_tokenizer()("the court shall hear")["input_ids"]
    bare = llama_cpp(bundle / manifest.gguf.model, None, ids)
    with torch.no_grad():
        expected = load_bundle(bundle)(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert max(abs(expected[token] - value) for token, value in bare.items()) < 0.05  # 8 bits a weight
    added = koff_prune(
        capsys, "memory", "add", bundle, "--name", "law2", "--data", tmp_path / "law", "--tokens", 128,
        "--set", "evaluate.tokens=128",
    )  # fmt: skip
    assert added.code == 0, added.err
    told = open_manifest(bundle).domains["law2"].gguf
    assert told is not None
    assert llama_cpp(bundle / manifest.gguf.model, bundle / told, ids) != bare
    assert koff_prune(capsys, "verify", bundle).code == 0
    assert koff_prune(capsys, "memory", "remove", bundle, "law2").code == 0
    assert not (bundle / told).exists() and koff_prune(capsys, "verify", bundle).code == 0


def test_what_llama_cpp_cannot_read_is_told_before_anything_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, tiny_config("qwen3"), export={"formats": ["safetensors", "gguf"]})
    answer = koff_prune(capsys, "export", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and "structure.widths: uniform" in answer.err
    assert not (tmp_path / "run" / "checkpoints").exists()
