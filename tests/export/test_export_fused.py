"""The fused profile beside the portable one and torch: every family, every memory, every precision."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import write_tokenizer
from export_helpers import (
    BOS,
    WINDOW,
    Kv,
    Lora,
    lora_modules,
    random_kv,
    random_lora,
    tiny_model,
    torch_logits,
)
from transformers import PreTrainedModel

from koff_export.bundle import MERGED_KV, write_manifest
from koff_export.cached import CachedText, CacheInPlace, CacheOfGraph
from koff_export.cli import main
from koff_export.errors import KoffError
from koff_export.fused import export_fused
from koff_export.limits import check_fused
from koff_export.onnx import export_onnx, write_adapter
from koff_export.quantize import quantize
from koff_export.runtime import Runtime
from koff_export.writer import FLOAT

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
CASES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "qwen2": {"hidden_size": 64},  # its heads are hidden_size / heads
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "per_layer": False, "num_key_value_heads": 4},
}


@dataclass
class Bundle:
    folder: Path
    model: PreTrainedModel
    memories: dict[str | None, tuple[Lora, Kv | None]]


FUSED = ("fused", "in_place")


@pytest.fixture(params=FUSED)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=CASES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of all profiles and precisions; its memories are LoRA and KV, LoRA alone, KV alone."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param, **CASES[request.param])  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    info = export_onnx(model, folder, lora_modules=lora_modules(model))
    export_fused(model, folder / "onnx/fused.onnx", folder / "onnx/model.onnx")
    export_fused(model, folder / "onnx/in_place.onnx", folder / "onnx/fused.onnx", in_place=True)
    graph = {**vars(info), "precisions": {"fp32": "onnx/model.onnx"}}
    graph |= {profile: {"fp32": f"onnx/{profile}.onnx"} for profile in FUSED}
    for name, bits in (("fp16", 16), ("int8", 8), ("int4", 4)):
        beside = None
        for key, stem in (("precisions", "model"), *((profile, profile) for profile in FUSED)):
            graph[key][name] = f"onnx/{stem}_{name}.onnx"
            quantize(folder / f"onnx/{stem}.onnx", folder / f"onnx/{stem}_{name}.onnx", bits, beside)
            beside = folder / f"onnx/{stem}_{name}.onnx"
    for key in ("precisions", *FUSED):
        graph[key]["int8_dynamic"] = graph[key]["int8"]
    memories: dict[str | None, tuple[Lora, Kv | None]] = {
        None: ({}, None),
        "both": (random_lora(model, 3, 1), random_kv(model, 7, 2)),
        "lora": (random_lora(model, 5, 3, skip="k_proj"), None),
        "kv": ({}, random_kv(model, 4, 4)),
    }
    domains = {}
    for memory, (lora, kv) in memories.items():
        if memory:
            path = f"onnx/memories/{memory}.onnx_adapter"
            write_adapter(folder / path, lora, kv)
            domains[memory] = {"kv_tokens": kv[0][0].shape[1] if kv else 0, "adapter": path}
    write_tokenizer(folder)
    manifest = {"window": WINDOW, "bos": BOS, "eos": [], "context": 128, "domains": domains, "graph": graph}
    write_manifest(folder, manifest)
    return Bundle(folder, model, memories)


def test_greedy_tokens_and_logits_equal_torch_and_the_portable_graph(bundle: Bundle, profile: str) -> None:
    portable = Runtime.open(bundle.folder, threads=1, profile="portable")
    fused = Runtime.open(bundle.folder, threads=1, profile=profile)
    prompt = [BOS, *torch.randint(3, 250, (19,), generator=torch.Generator().manual_seed(1)).tolist()]
    answers = set()
    for memory, (lora, kv) in bundle.memories.items():
        want = list(prompt)
        for _ in range(18):
            want.append(int(torch_logits(bundle.model, torch.tensor([want]), lora, kv)[0, -1].argmax()))
        answers.add(tuple(want))
        assert list(fused.generate_tokens(prompt, memory, 18)) == want[20:], memory
        assert list(portable.generate_tokens(prompt, memory, 18)) == want[20:], memory
        exact = torch_logits(bundle.model, torch.tensor([want]), lora, kv)[0].numpy()
        assert np.abs(fused.logits(want, memory) - exact).max() < 1e-3
        assert fused.score([want], memory)[0] == pytest.approx(portable.score([want], memory)[0], rel=1e-5)
    assert len(answers) == len(bundle.memories)


def test_a_prompt_may_be_read_in_pieces(
    bundle: Bundle, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = Runtime.open(bundle.folder, threads=1, profile=profile)
    prompt = [BOS, *range(30, 50)]
    whole = list(fused.generate_tokens(prompt, "both", 6))
    monkeypatch.setattr("koff_export.runtime.CHUNK", 4)
    assert list(fused.generate_tokens(prompt, "both", 6)) == whole


def test_a_padded_batch_answers_as_one_by_one(bundle: Bundle, profile: str) -> None:
    fused = Runtime.open(bundle.folder, threads=1, profile=profile)
    prompts = ["ab", "the law of the land", "c", "music", "mathematics", "a"]
    memories = ["both", None, "both", "both", None, "lora"]
    alone = ["".join(fused.generate(p, m, 9)) for p, m in zip(prompts, memories, strict=True)]
    assert len(set(alone)) > 3
    assert fused.generate_batch(prompts, memories, 9) == alone


@pytest.mark.parametrize("name", ["portable", *FUSED])
def test_a_batch_holds_no_more_logits_than_one_text(
    bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its prompts are, and whatever their padding."""
    for module in ("batch", "runtime"):
        monkeypatch.setattr(f"koff_export.{module}.CHUNK", 8)
    runtime, sizes = Runtime.open(bundle.folder, threads=1, profile=name), []
    for kind in (CacheOfGraph, CacheInPlace):
        read = kind.read

        def noting(self: Any, ids: Any, *args: Any, read: Any = read) -> Any:
            sizes.append(ids.size)
            return read(self, ids, *args)

        monkeypatch.setattr(kind, "read", noting)
    prompts = ["law " * 7, "a", "music of the law", "law " * 9]
    for memory in (None, "both", "lora"):
        alone = ["".join(runtime.generate(prompt, memory, 5)) for prompt in prompts]
        assert runtime.generate_batch(prompts, [memory] * 4, 5) == alone, memory
    assert max(sizes) <= 8


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp16", 1e-4), ("int8", 0.02), ("int8_dynamic", 0.05), ("int4", 1.5)]
)
def test_few_bits_keep_the_memories(bundle: Bundle, profile: str, precision: str, limit: float) -> None:
    full = Runtime.open(bundle.folder, threads=1, profile=profile)
    low = Runtime.open(bundle.folder, precision, threads=1, profile=profile)
    ids = [BOS, *range(40, 60)]
    for memory in bundle.memories:
        a = torch.tensor(full.logits(ids, memory)).log_softmax(-1)
        b = torch.tensor(low.logits(ids, memory)).log_softmax(-1)
        kl = float((a.exp() * (a - b)).sum(-1).mean())
        assert 0 < kl < limit, (memory, kl)
        if memory:
            assert np.abs(low.logits(ids, memory) - low.logits(ids)).max() > 0.5


def test_int8_is_computed_in_float32_or_in_8_bits(bundle: Bundle, profile: str) -> None:
    """Of one file: its float32 weights exactly, or with rounded inputs too."""
    ids = [BOS, *range(40, 60)]
    path = bundle.folder / f"onnx/{profile}_int8.onnx"
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    rounded = copy.deepcopy(bundle.model)
    head = "tied_head_weight" if bundle.model.config.tie_word_embeddings else "lm_head.weight"
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            key = head if name == "lm_head" else f"{name}.weight"
            q, scale = (onnx.numpy_helper.to_array(stored[f"{key}.{part}"]) for part in ("int8", "scale"))
            weight = (q.astype(np.float32) - 128) * scale.repeat(32, 0)[: len(q)]
            module.weight.data = torch.from_numpy(weight.T.copy())
    for memory, (lora, kv) in bundle.memories.items():
        want = torch_logits(rounded, torch.tensor([ids]), lora, kv)[0].numpy()
        exact = Runtime.open(bundle.folder, "int8", threads=1, profile=profile).logits(ids, memory)
        fast = Runtime.open(bundle.folder, "int8_dynamic", threads=1, profile=profile).logits(ids, memory)
        assert np.abs(exact - want).max() < 1e-3
        assert np.abs(fast - want).max() > 1e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_head_and_the_embedding_are_the_same_bytes(bundle: Bundle, tmp_path: Path, bits: int) -> None:
    path = tmp_path / "few.onnx"
    quantize(bundle.folder / "onnx/model.onnx", path, bits, keeps=("head",))
    stored = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    vocabulary = bundle.model.config.vocab_size
    assert not [t.name for t in stored.values() if vocabulary in t.dims and t.data_type == FLOAT
                and not t.name.endswith(".scale")]  # fmt: skip
    tied = bundle.model.config.tie_word_embeddings
    names = ("model.embed_tokens.weight.int8", f"{'tied_head_weight' if tied else 'lm_head.weight'}.int8")
    places = [{entry.key: entry.value for entry in stored[name].external_data} for name in names]
    assert (places[0] == places[1]) == tied


@pytest.mark.parametrize("keeps", [(), ("head",), ("q_proj", "down_proj")])
def test_int4_keeps_in_8_bits_what_it_is_told(bundle: Bundle, tmp_path: Path, keeps: tuple[str, ...]) -> None:
    quantize(bundle.folder / "onnx/model.onnx", tmp_path / "few.onnx", 4, keeps=keeps)
    graph = onnx.load(tmp_path / "few.onnx", load_external_data=False).graph
    four = [node.name for node in graph.node if node.op_type == "MatMulNBits"]
    weights = {input for node in graph.node if node.op_type == "MatMulNBits" for input in node.input}
    layers = len(bundle.model.model.layers)
    matrices = {"head": 1, **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), layers)}
    matrices |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), layers)
    assert len(four) == sum(n for name, n in matrices.items() if name not in keeps)
    assert not [w for w in weights if any(name in w for name in keeps)]


def test_profiles_share_their_weights(bundle: Bundle) -> None:
    data = {name: (bundle.folder / f"onnx/model{name}.onnx.data").stat().st_size for name in ("", "_fp16")}
    assert data["_fp16"] < 0.9 * data[""]  # pages of 4096 bytes weigh in a tiny model
    for name in ("", "_fp16", "_int8", "_int4"):
        size = {stem: (bundle.folder / f"onnx/{stem}{name}.onnx.data").stat().st_size
                for stem in ("model", "fused")}  # fmt: skip
        assert size["fused"] < size["model"] / 4, size  # the rotation of 128 positions, in pages
        assert not (bundle.folder / f"onnx/in_place{name}.onnx.data").exists()


def test_a_cache_grows_where_it_stands(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koff_export.cached._STEP", 2)
    fused = Runtime.open(bundle.folder, threads=1, profile="fused")
    in_place = Runtime.open(bundle.folder, threads=1)
    assert in_place.profile == "in_place", "the fastest is what runs by default"
    for memory in bundle.memories:
        wanted = list(fused.generate_tokens([BOS, 40, 41], memory, 40))
        assert list(in_place.generate_tokens([BOS, 40, 41], memory, 40)) == wanted
    in_place.evict("both")  # while a text still needs it
    cache = in_place.cache("both")
    for _ in range(2):
        in_place.evict("both")
        gc.collect()
        cache.read(np.array([[40]]), np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64))


@pytest.mark.parametrize("profile", ["portable", *FUSED])
def test_a_row_at_the_end_of_its_context_fails_no_other(bundle: Bundle, profile: str) -> None:
    runtime = Runtime.open(bundle.folder, threads=1, profile=profile)
    prompts = ["a" * 115, "bc", "music and"]
    for memory in (None, "both"):
        alone = ["".join(runtime.generate(prompt, memory, 60)) for prompt in prompts]
        assert runtime.generate_batch(prompts, [memory] * 3, 60) == alone


def test_a_cache_that_cannot_grow_is_as_it_was(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.open(bundle.folder, threads=1, profile="in_place")
    monkeypatch.setattr("koff_export.cached._STEP", 0)
    text, ids = CachedText(runtime, "both"), [BOS, *range(30, 40)]
    wanted = runtime.logits([*ids, 50, 51], "both")
    text.read(ids)
    made = []

    def refuse(*args: object) -> np.ndarray:
        made.append(args)
        if len(made) == 3:
            raise MemoryError
        return zeros(*args)

    zeros = np.zeros
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("koff_export.cached.np.zeros", refuse)
        for _ in range(2):
            text.read([50])
    text.turn_to([*ids, 50, 51])
    assert np.abs(text.read([50, 51]) - wanted[-2:]).max() < 1e-4


@pytest.mark.parametrize("profile", ["portable", *FUSED])
def test_a_conversation_is_not_read_again(
    bundle: Bundle, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime.open(bundle.folder, threads=1, profile=profile)
    first, text = [BOS, *range(30, 50)], CachedText(runtime, "both")
    answer = list(runtime.generate_tokens(first, "both", 6, text=text))
    assert answer == list(runtime.generate_tokens(first, "both", 6))
    read: list[int] = []
    monkeypatch.setattr(
        CachedText, "read", lambda self, ids, was=CachedText.read: read.extend(ids) or was(self, ids)
    )
    for more in ([60, 61], [70]):  # the second time, another turn in the place of the first
        turn = [*first, *answer, *more]
        wanted = list(runtime.generate_tokens(turn, "both", 6))
        read.clear()
        assert list(runtime.generate_tokens(turn, "both", 6, text=text)) == wanted
        assert read[:-5] == [answer[-1], *more] if more == [60, 61] else read[:-5] == more
    read.clear()
    assert list(runtime.generate_tokens(first, "both", 6, text=text)) == answer
    assert read[0] == first[-1], "the last token's logits are asked for again"
    with pytest.raises(KoffError, match="was read with both"):
        runtime.generate_tokens(first, "kv", 6, text=text)


def test_the_graph_is_made_of_fused_operators(bundle: Bundle) -> None:
    graph = onnx.load(bundle.folder / "onnx/fused.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 2 and kinds.count("SkipSimplifiedLayerNormalization") == 4
    assert "Softmax" not in kinds


def test_the_profile_is_chosen(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(folder: Path, *options: str) -> tuple[int, str, str]:
        code = main([str(folder), "--prompt", "the law", "--max-new-tokens", "5", "--threads", "1", *options])
        return code, *capsys.readouterr()

    default = answer(bundle.folder)
    assert default[0] == 0
    for profile in ("portable", "fused", "in_place"):
        assert answer(bundle.folder, "--profile", profile) == default
    there = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    manifest = json.loads((there / "koff.json").read_text())
    (there / "onnx/in_place.onnx").unlink()
    code, _, error = answer(there)
    assert code == 2 and "in_place.onnx" in error, "the fastest graph is what runs by default"
    assert answer(there, "--profile", "portable") == default
    for key in FUSED:
        del manifest["graph"][key]
    del manifest["format"], manifest["files"]
    write_manifest(there, manifest)
    assert answer(there) == default
    code, _, error = answer(there, "--profile", "fused")
    assert code == 2 and "no profile 'fused'; it has: portable" in error


@pytest.mark.parametrize("length", [0, 5])
def test_a_baked_memory_needs_no_slots(length: int, profile: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    kv = random_kv(model, length, 3)
    info = export_onnx(model, tmp_path, lora_modules=[], baked=kv)
    export_fused(model, tmp_path / "onnx/fused.onnx", tmp_path / "onnx/model.onnx", baked=kv)
    export_fused(model, tmp_path / "onnx/in_place.onnx", tmp_path / "onnx/fused.onnx", in_place=True)
    if length:
        write_adapter(tmp_path / MERGED_KV, {}, kv)
    graph = {**vars(info), "precisions": {"fp32": "onnx/model.onnx"}}
    graph |= {profile: {"fp32": f"onnx/{profile}.onnx"} for profile in FUSED}
    told = {"law": {"kv_tokens": length}}
    manifest = {"window": WINDOW, "bos": BOS, "eos": [], "domains": told, "graph": graph, "merged": "law"}
    write_manifest(tmp_path, manifest)
    ids = [BOS, *range(40, 60)]
    want = torch_logits(model, torch.tensor([ids]), kv=kv if length else None)[0].numpy()
    fused = Runtime.open(tmp_path, threads=1, profile=profile)
    assert np.abs(fused.logits(ids) - want).max() < 1e-3
    tokens = list(fused.generate_tokens(ids, None, 6))
    portable = Runtime.open(tmp_path, threads=1, profile="portable")
    assert tokens == list(portable.generate_tokens(ids, None, 6))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma3", {}, "not gemma3_text"),
        ("llama", {"hidden_act": "gelu"}, "silu, not gelu"),
        ("llama", {"head_dim": 8}, "multiple of 16, not of 8"),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}}, "not dynamic"),
        ("mistral", {"sliding_window": 4}, "no sliding windows"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "no sliding"),
    ],
)
def test_models_that_do_not_fit_are_refused(family: str, change: dict[str, object], message: str) -> None:
    model = tiny_model(family, per_layer=False, **change)
    with pytest.raises(KoffError, match=f"export.onnx.profiles: fused .*{message}.*leave fused out"):
        check_fused(model.config.to_dict())
