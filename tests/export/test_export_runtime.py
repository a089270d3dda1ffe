"""The exported graph and the runtime against torch."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from export_helpers import BOS, WINDOW, Exported, torch_logits
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from koff_export.bundle import write_manifest
from koff_export.cached import CachedText
from koff_export.errors import KoffError
from koff_export.onnx import write_adapter
from koff_export.router import route
from koff_export.runtime import Runtime
from koff_export.sampling import Sampling
from koff_export.text import stream_text, until_stop


@pytest.fixture(scope="module")
def runtime(exported: Exported) -> Runtime:
    return Runtime.open(exported.folder, threads=1)


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(seed))


def graph_logits(runtime: Runtime, ids: torch.Tensor, mask: torch.Tensor, memory: str | None) -> np.ndarray:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items()}
    for name, value in runtime.empty_cache.items():
        _, heads, _, dim = value.shape()
        values[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros((len(ids), heads, 0, dim), np.float32))
    return runtime.run(values, runtime.run_options(memory))[0].numpy()


@pytest.mark.parametrize("memory", [None, "law", "math", "music"])
def test_logits_equal_torch(runtime: Runtime, exported: Exported, memory: str | None) -> None:
    lora, kv = exported.memories[memory] if memory else ({}, None)
    for shape in ((1, 1), (1, 9), (3, 6)):
        ids = ids_of(*shape)
        got = graph_logits(runtime, ids, torch.ones_like(ids), memory)
        assert np.abs(got - torch_logits(exported.model, ids, lora, kv).numpy()).max() < 1e-3
    ids, mask = ids_of(2, 7, seed=1), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    got = graph_logits(runtime, ids, mask, memory)
    want = torch_logits(exported.model, ids, lora, kv, mask).numpy()
    assert np.abs((got - want)[mask.bool().numpy()]).max() < 1e-3
    alone = torch_logits(exported.model, ids[1:, 3:], lora, kv).numpy()
    assert np.abs(got[1, 3:] - alone[0]).max() < 1e-3


def test_greedy_tokens_equal_torch_while_memories_change(runtime: Runtime, exported: Exported) -> None:
    prompt = [BOS, *ids_of(5).tolist()]
    answers = []
    for memory in ("law", None, "math", "music", "law"):
        lora, kv = exported.memories[memory] if memory else ({}, None)
        want = list(prompt)
        for _ in range(8):
            logits = torch_logits(exported.model, torch.tensor([want]), lora, kv)
            want.append(int(logits[0, -1].argmax()))
        got = list(runtime.generate_tokens(prompt, memory, 8))
        assert got == want[len(prompt) :]
        answers.append(tuple(got))
    assert answers[0] == answers[-1]
    assert len(set(answers)) > 2


def test_a_batch_answers_as_one_by_one(runtime: Runtime) -> None:
    prompts = ["ab", "the law", "c", "music of the law", "math"]
    memories = ["law", None, "law", "music", None]
    alone = ["".join(runtime.generate(p, m, 9)) for p, m in zip(prompts, memories, strict=True)]
    assert len(set(alone)) > 2
    assert runtime.generate_batch(prompts, memories, 9) == alone
    assert runtime.generate_batch(prompts, memories, 9, rows=1) == alone
    drawn = runtime.generate_batch(prompts, memories, 9, temperature=2.0, seed=3)
    assert drawn == runtime.generate_batch(prompts, memories, 9, temperature=2.0, seed=3, rows=2) != alone
    rest = runtime.generate_batch(prompts[2:], memories[2:], 9, first=2, temperature=2.0, seed=3)
    assert drawn[2:] == rest, "a prompt draws by its number, however the file was cut"
    with pytest.raises(KoffError, match="one memory"):
        runtime.generate_batch(prompts, ["law"])
    with pytest.raises(KoffError, match="no memory 'art'"):
        runtime.generate_batch(["a"], ["art"])


def test_a_nonsense_graph_is_told_when_drawing() -> None:
    with pytest.raises(KoffError, match="not finite"):
        Sampling(temperature=1.0).picker([0], 2).pick(np.array([0.0, np.nan]))


def ask(bundle: Path, **asked: object) -> Runtime:
    """The bundle with a generation_config.json that asks for this."""
    (bundle / "generation_config.json").write_text(json.dumps(asked))
    told = json.loads((bundle / "koff.json").read_text())
    write_manifest(bundle, {key: value for key, value in told.items() if key != "files"})
    return Runtime.open(bundle, threads=1)


def test_penalties_of_the_bundle_are_those_of_transformers(copy: Path, exported: Exported) -> None:
    prompt, lora = [BOS, *ids_of(5).tolist()], exported.memories["law"]
    plain = list(Runtime.open(copy, threads=1).generate_tokens(prompt, "law", 12))
    suppressed = plain[:1]
    runtime = ask(copy, repetition_penalty=1.3, suppress_tokens=suppressed)

    def by_torch(*processors: LogitsProcessor) -> list[int]:
        want = list(prompt)
        for _ in range(12):
            scores = torch_logits(exported.model, torch.tensor([want]), *lora)[:, -1]
            want.append(int(LogitsProcessorList(processors)(torch.tensor([want]), scores)[0].argmax()))
        return want[len(prompt) :]

    without = SuppressTokensLogitsProcessor(suppressed)
    both = by_torch(RepetitionPenaltyLogitsProcessor(1.3), without)
    assert list(runtime.generate_tokens(prompt, "law", 12)) == both != plain
    one = by_torch(without)
    assert list(runtime.generate_tokens(prompt, "law", 12, repetition_penalty=1.0)) == one != both
    texts = ["ab", "the law"]
    alone = ["".join(runtime.generate(text, "law", 12)) for text in texts]
    assert runtime.generate_batch(texts, ["law", "law"], 12) == alone
    drawn = list(runtime.generate_tokens(prompt, "law", 12, temperature=9.0, seed=1))
    assert suppressed[0] not in drawn


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"repetition_penalty": "1.1"}, "repetition_penalty '1.1' is no number above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty 0 is no number above 0"),
        ({"repetition_penalty": 10**400}, "is no number above 0"),
        ({"suppress_tokens": [5, 300]}, "token numbers below 300"),
        ({"suppress_tokens": {"a": 1}}, "token numbers below 300"),
    ],
)
def test_penalties_that_mean_nothing_are_told(copy: Path, asked: dict[str, object], says: str) -> None:
    with pytest.raises(KoffError, match=says):
        ask(copy, **asked).generate_tokens([BOS], None, 2)


def test_swapping_keeps_the_session_and_eviction_is_harmless(runtime: Runtime) -> None:
    session = runtime._session
    before = list(runtime.generate_tokens([BOS, 5], "law", 4))
    runtime.evict("law")
    assert list(runtime.generate_tokens([BOS, 5], "law", 4)) == before
    assert runtime._session is session
    running = runtime.generate_tokens([BOS, 5], "law", 4)
    first = next(running)
    runtime.evict("law")
    gc.collect()
    assert [first, *running] == before, "an answer keeps the memory that it began with"


def test_score_equals_torch(runtime: Runtime, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [[BOS, *ids_of(n, seed=n).tolist()] for n in (11, 3)]
    lora, kv = exported.memories["law"]
    want = 0.0
    for window in windows:
        ids = torch.tensor([window])
        logits = torch_logits(exported.model, ids, lora, kv)
        want += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    nll, tokens = runtime.score(windows, "law")
    assert tokens == 14 and abs(nll - want) < 1e-3 * want
    monkeypatch.setattr("koff_export.scoring.CHUNK", 4)
    assert runtime.score(windows, "law")[0] == pytest.approx(nll, rel=1e-5)
    off, _ = runtime.score(windows)
    assert abs(off - nll) > 0.1


def test_windows_begin_with_bos_and_lose_no_token(runtime: Runtime) -> None:
    text = "The quick brown fox, jumping over lazy dogs."
    windows = runtime.windows(text)
    assert all(w[0] == BOS and len(w) <= WINDOW for w in windows) and len(windows[0]) == WINDOW
    assert [token for w in windows for token in w[1:]] == runtime.encode(text, bos=False)
    assert runtime.score_text(text)[1] == len(text)


def test_text_streams_in_whole_characters(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = " naïve 漢字 🙂!"
    tokens = runtime.encode(answer, bos=False)
    monkeypatch.setattr(runtime, "generate_tokens", lambda *a, **k: iter(tokens))
    pieces = list(runtime.generate("hello"))
    assert "".join(pieces) == answer and not any("\ufffd" in p for p in pieces)
    assert "".join(runtime.generate("hello", stop=["字 ", "never"])) == " naïve 漢"
    monkeypatch.setattr(runtime, "generate_tokens", lambda *a, **k: iter(tokens[:-2]))
    assert "".join(runtime.generate("hello")).startswith(" naïve 漢字 ")


def test_what_spells_a_control_token_is_text_to_score_as_it_is_to_learn(runtime: Runtime) -> None:
    assert runtime.encode("a</s>", bos=False)[1:] == [2], "a prompt may hold it"
    assert 2 not in runtime.windows("a</s>b")[0] and runtime.score_text("a</s>b")[1] == 6
    assert runtime.tokenizer.encode("</s>", add_special_tokens=False).ids == [2]


def test_an_answer_ends_at_a_control_token_that_is_named(runtime: Runtime) -> None:
    """Such a token shows in no text, where another stop would be looked for."""
    asked: dict[str, Any] = {"max_new_tokens": 60, "temperature": 3.0}
    ids = runtime.encode("ab")
    for seed in range(100):
        drawn = list(runtime.generate_tokens(ids, **asked, seed=seed))
        if 2 in drawn[1:]:
            break
    wanted = runtime.tokenizer.decode(drawn[: drawn.index(2)])
    assert "".join(runtime.generate("ab", stop=["</s>"], seed=seed, **asked)) == wanted
    [batched] = runtime.generate_batch(["ab"], [None], stop=["</s>"], seed=seed, **asked)
    assert batched == wanted
    with pytest.raises(KoffError, match=r"'</s>\\n' holds the control token '</s>'"):
        runtime.generate("ab", stop=["</s>\n"])


def test_draws_repeat_with_a_seed(runtime: Runtime) -> None:
    def draw(**kw: float) -> list[int]:
        return list(runtime.generate_tokens([BOS, 9], None, 6, temperature=5.0, **kw))

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    greedy = list(runtime.generate_tokens([BOS, 9], None, 6))
    assert draw(seed=1, top_k=1) == greedy
    assert draw(seed=1, top_p=1e-9) == greedy


def test_context_is_shared_by_memory_and_text(runtime: Runtime) -> None:
    prompt = [BOS] * 120
    assert len(list(runtime.generate_tokens(prompt, None, 50))) == 8
    assert len(list(runtime.generate_tokens(prompt, "law", 50))) == 1
    with pytest.raises(KoffError, match="memory of 7"):
        runtime.generate_tokens([BOS] * 122, "law", 1)


def test_mistakes_are_told_in_one_sentence(runtime: Runtime, exported: Exported) -> None:
    with pytest.raises(KoffError, match="no memory 'latin'; it has: law, math, music"):
        runtime.generate("x", "latin")
    with pytest.raises(KoffError, match="no precision 'int3'; it has: fp32"):
        Runtime.open(exported.folder, "int3")
    with pytest.raises(KoffError, match="outside of 0…299"):
        runtime.score([[1, 300]])
    for options, told in (
        ({"seed": -1}, "seed -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0 must be above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
    ):
        with pytest.raises(KoffError, match=told):
            runtime.generate("x", **options)
    assert runtime.generate("x", temperature=1e-320, seed=0, max_new_tokens=2) is not None


def test_a_prompt_is_neither_cut_nor_filled_up(copy: Path) -> None:
    """A tokenizer is saved with the truncation and padding that it was last called with."""
    from tokenizers import Tokenizer

    whole = Runtime.open(copy).encode("any court shall hear " * 9)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(copy / "tokenizer.json"))
    stamped(copy)
    assert Runtime.open(copy).encode("any court shall hear " * 9) == whole and len(whole) > 12


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.01), (4, 1.0)])
def test_quantised_graphs_keep_their_slots(
    exported: Exported, tmp_path: Path, bits: int, limit: float
) -> None:
    from koff_export.bundle import write_manifest
    from koff_export.quantize import quantize

    folder = tmp_path / "bundle"
    shutil.copytree(exported.folder, folder)
    quantize(folder / "onnx/model.onnx", folder / f"onnx/model_int{bits}.onnx", bits)
    manifest = json.loads((folder / "koff.json").read_text())
    manifest["graph"]["precisions"] = {"int": f"onnx/model_int{bits}.onnx", "fp32": "onnx/model.onnx"}
    write_manifest(folder, manifest)
    low, full = Runtime.open(folder, "int", threads=1), Runtime.open(folder, threads=1)
    ids = ids_of(1, 12)
    mask = torch.ones_like(ids)
    for memory in (None, "law"):
        a = torch.tensor(graph_logits(full, ids, mask, memory)).log_softmax(-1)
        b = torch.tensor(graph_logits(low, ids, mask, memory)).log_softmax(-1)
        kl = float((a.exp() * (a - b)).sum(-1).mean())
        assert 0 < kl < limit, (memory, kl)
    assert np.abs(graph_logits(low, ids, mask, "law") - graph_logits(low, ids, mask, None)).max() > 0.5


def stamped(folder: Path, **changes: object) -> None:
    """Writes the manifest again with all checksums, as `koff-prune memory` leaves it."""
    old = json.loads((folder / "koff.json").read_text())
    write_manifest(folder, {**{k: v for k, v in old.items() if k not in ("format", "files")}, **changes})


def test_a_running_bundle_sees_what_was_added_replaced_and_removed(
    copy: Path, exported: Exported, tmp_path: Path
) -> None:
    running = Runtime.open(copy, threads=1)
    before = running.logits([BOS, 5, 6], "music")
    domains = json.loads((copy / "koff.json").read_text())["domains"]
    sea = "onnx/memories/sea.onnx_adapter"
    shutil.copy(copy / "onnx/memories/law.onnx_adapter", copy / sea)
    # ONNX Runtime maps the file that it has loaded, so a new one must be renamed over it, as koff-prune does
    shutil.copy(copy / "onnx/memories/law.onnx_adapter", copy / "onnx/memories/.new")
    (copy / "onnx/memories/.new").rename(copy / "onnx/memories/music.onnx_adapter")
    (copy / "onnx/memories/math.onnx_adapter").unlink()
    told = {"sea": {**domains["law"], "adapter": sea}, "music": {**domains["music"], "kv_tokens": 7}}
    stamped(copy, domains={"law": domains["law"], **told})
    law = running.logits([BOS, 5, 6], "law")
    assert np.array_equal(running.logits([BOS, 5, 6], "sea"), law)
    assert np.array_equal(running.logits([BOS, 5, 6], "music"), before), "what is loaded stays"
    running.evict("music")
    assert np.array_equal(running.logits([BOS, 5, 6], "music"), law)
    other = Runtime.open(copy, threads=1)
    (copy / sea).rename(tmp_path / "sea")
    stamped(copy, domains={"law": domains["law"], "music": told["music"]})
    assert set(route(other, [BOS, 5, 6]).losses) == {"none", "law", "music"}
    (tmp_path / "sea").rename(copy / sea)
    stamped(copy, domains={"law": domains["law"], **told})
    with pytest.raises(KoffError, match="no memory 'math'; it has: law, sea, music"):
        running.memory("math")
    damaged = bytearray((copy / sea).read_bytes())
    damaged[-1] ^= 1
    (copy / sea).write_bytes(bytes(damaged))
    running.evict("sea")
    with pytest.raises(KoffError, match="another sha256"):
        running.memory("sea")


def test_another_backbone_under_a_running_bundle_is_told(copy: Path) -> None:
    running = Runtime.open(copy, threads=1)
    stamped(copy, plan="1")
    with pytest.raises(KoffError, match="another backbone by now: open it again"):
        running.memory("law")
    stamped(copy, plan="0")
    running.memory("law")
    weights = copy / "onnx" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    stamped(copy)
    with pytest.raises(KoffError, match="another backbone by now"):
        running.memory("math")


def fallback_tokenizer() -> Tokenizer:
    """As SentencePiece's: what has no token of its own is bytes, and bytes are decoded run by run."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "▁b"):
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("prompt", ["a 漢漢漢", "🙂漢🙂é", "b a b", "é" * 40])
def test_characters_of_several_bytes_stream_whole_behind_such_a_prompt(prompt: str) -> None:
    tokenizer = fallback_tokenizer()
    for answer in ("漢 a", "🙂", "ab é b", "漢é"):
        before = tokenizer.encode(prompt, add_special_tokens=False).ids
        whole = tokenizer.encode(prompt + answer, add_special_tokens=False).ids
        assert whole[: len(before)] == before
        assert "".join(stream_text(tokenizer, before, whole[len(before) :])) == answer


def test_a_text_that_was_begun_is_gone_on_with_by_one_answer_under_one_memory(
    copy: Path, exported: Exported
) -> None:
    runtime = Runtime.open(copy, threads=1)
    first, second = [BOS, 5, 6], [BOS, 9]
    wanted = [list(runtime.generate_tokens(ids, "law", 6)) for ids in (first, second)]
    text = CachedText(runtime, "law")
    running = runtime.generate_tokens(first, "law", 6, text=text)
    assert [next(running), next(running)] == wanted[0][:2]
    assert list(runtime.generate_tokens(second, "law", 6, text=text)) == wanted[1]
    with pytest.raises(KoffError, match="another answer"):
        next(running)
    runtime.memory("law", copy / "onnx/memories/music.onnx_adapter")  # another goes by its name by now
    other = list(Runtime.open(copy, threads=1).generate_tokens(first, "music", 6))
    assert list(runtime.generate_tokens(first, "law", 6, text=text)) == other
    runtime.evict("law")
    assert list(runtime.generate_tokens(first, "law", 6, text=text)) == wanted[0]
    with pytest.raises(KoffError, match="a memory has a name"):
        runtime.memory("")


def test_a_prompt_that_leaves_no_room_for_an_answer_is_told(runtime: Runtime) -> None:
    for memory, room in ((None, 128), ("law", 121)):
        assert len(list(runtime.generate_tokens([BOS] * (room - 1), memory, 5))) == 1
        with pytest.raises(KoffError, match="and an answer do not fit"):
            runtime.generate_tokens([BOS] * room, memory, 5)
        assert list(runtime.generate_tokens([BOS] * room, memory, 0)) == []
    # a memory without room is passed over, not held against the others
    assert set(route(runtime, [BOS] * 124).losses) == {"none", "math"}
    with pytest.raises(KoffError, match="list of prompts"):
        runtime.generate_batch("ab", ["law", "law"])
    assert list(until_stop(["hello kn"], "kn")) == ["hello "], "one text is one text, not its letters"
    with pytest.raises(KoffError, match="threads: -1"):
        Runtime.open(runtime.folder, threads=-1)


def test_a_memory_of_no_numbers_is_told(copy: Path, exported: Exported) -> None:
    lora, kv = exported.memories["law"]
    write_adapter(
        copy / "onnx/memories/bad.onnx_adapter",
        {name: (a * float("nan"), b, scale) for name, (a, b, scale) in lora.items()}, kv,
    )  # fmt: skip
    runtime = Runtime.open(copy, threads=1)
    with pytest.raises(KoffError, match="not finite"):
        list(runtime.generate_tokens([BOS, 5], "bad", 3))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_drawn_by_the_softmax_of_logits_over_temperature(top_p: float) -> None:
    logits = np.array([0.0, 2.0, 4.0])
    picker = Sampling(temperature=2.0, top_p=top_p, seed=0).picker([], 3)
    drawn = np.bincount([picker.pick(logits) for _ in range(3000)], minlength=3) / 3000
    wanted = np.exp(logits / 2) / np.exp(logits / 2).sum()  # 0.09, 0.24, 0.67
    if top_p < 1:  # the fewest that make 0.8
        wanted = np.where(wanted > 0.1, wanted, 0) / wanted[1:].sum()
    assert np.abs(drawn - wanted).max() < 0.03
