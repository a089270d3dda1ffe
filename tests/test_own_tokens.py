"""Tokens that one domain alone writes go with its memory: `memory.tokens`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import SHAPES, tiny_config, tiny_model
from run_helpers import koff_prune, mistake, recipe_of
from safetensors.torch import load_file, save_file
from text_helpers import trained_tokenizer
from torch.nn import functional
from transformers import AutoTokenizer

import koff_prune as package
from koff_export.cli import main as koff_run
from koff_export.router import route
from koff_export.runtime import Runtime
from koff_export.ship import ship
from koff_prune.evaluate import window_losses
from koff_prune.leaks import shared_text
from koff_prune.learner import Learner
from koff_prune.losses import predicted_tokens
from koff_prune.memory import Memories
from koff_prune.own_tokens import OwnTokens
from koff_prune.recipe import Learn, Memory
from koff_prune.run import finished_run
from koff_prune.units import token_parameters
from koff_prune.weights import EMBEDDINGS, Weights

LAW = "the court shall hear of any party of the court"
CEILING = {"method": "dense", "trained_with": "same"}


def told_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "koff.json").read_text())
    return found


def ids_of(bundle: Path, memory: str | None, text: str) -> list[int]:
    found: list[int] = package.load_tokenizer(bundle, memory)(text, add_special_tokens=False)["input_ids"]
    return found


def counts_of(run: Path, domain: str) -> list[int]:
    """Of its held-out windows, the dense model's tokens."""
    with finished_run(run) as opened:
        return predicted_tokens(opened, opened.domains[domain].heldout)


@pytest.fixture(scope="module", params=["tied", "untied", "pieces"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its bundle, compared with the ceiling."""
    folder, pieces = tmp_path_factory.mktemp(request.param), request.param == "pieces"
    shape = {"tied": "llama-tied-mha-biases", "untied": "qwen3", "pieces": "gemma3-mha"}[request.param]
    family, options = SHAPES[shape]
    if request.param == "untied":
        options = {**options, "head_dim": 16}  # as the fused graph wants
    profiles = ["portable", "fused"] if request.param == "untied" else ["portable"]
    config = tiny_config(family, vocab_size=700 if pieces else 400, max_position_embeddings=400, **options)
    recipe = recipe_of(
        folder, config, memory={"tokens": True}, compare=[CEILING],
        structure={"vocabulary": 0.95, "sparsity": 0.3, "of": "blocks" if pieces else "total"},
        evaluate={"window": 36, "tokens": 72}, scoring={"tokens": 64},
        export={"formats": ["safetensors", "onnx"],
                "onnx": {"precision": ["fp32", "int8", "int4"], "profiles": profiles}},
    )  # fmt: skip
    texts = [path.read_text() for name in ("law", "code") for path in sorted((folder / name).iterdir())]
    trained_tokenizer(texts, 600 if pieces else 380, pieces=pieces).save_pretrained(folder / "model")
    package.apply(recipe, folder / "run")
    return folder


def test_every_token_is_the_backbones_or_one_memorys(place: Path) -> None:
    bundle = place / "run" / "bundle"
    tokenizers = {name: package.load_tokenizer(bundle, name) for name in ("law", "code", None)}
    words = {name: set(tokenizer.get_vocab()) for name, tokenizer in tokenizers.items()}
    own = {name: words[name] - words[None] for name in ("law", "code")}
    assert words[None] < words["law"] and words[None] < words["code"]
    assert not own["law"] & own["code"]
    told = told_of(bundle)
    for name in ("law", "code"):
        vocab = tokenizers[name].get_vocab()
        assert {vocab[word] for word in words[None]} == set(range(len(words[None])))
        assert sorted(vocab.values()) == list(range(len(words[None]) + told["domains"][name]["tokens"]))
    court, other = (set(tokenizers["law"].convert_ids_to_tokens(ids_of(bundle, who, LAW)))
                    for who in ("law", "code"))  # fmt: skip
    assert court & own["law"]  # words of the law are whole with its memory
    assert len(ids_of(bundle, "code", LAW)) > len(ids_of(bundle, "law", LAW)) and court != other
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer(LAW, add_special_tokens=False)["input_ids"]) == LAW


def test_a_bundle_has_their_rows_where_they_belong(place: Path) -> None:
    bundle = place / "run" / "bundle"
    dense = Weights.open(place / "model").read([EMBEDDINGS])[EMBEDDINGS]
    whole = AutoTokenizer.from_pretrained(place / "model").get_vocab()
    shared = package.load_tokenizer(bundle)
    table = load_file(bundle / "model.safetensors")[EMBEDDINGS]
    assert torch.equal(table, dense[[whole[t] for t in shared.convert_ids_to_tokens(range(len(table)))]])
    for name in ("law", "code"):
        rows = load_file(bundle / "memories" / name / "tokens.safetensors")
        mine = package.load_tokenizer(bundle, name)
        ids = range(len(table), len(table) + told_of(bundle)["domains"][name]["tokens"])
        wanted = dense[[whole[token] for token in mine.convert_ids_to_tokens(list(ids))]]
        assert torch.equal(rows["embedding"], wanted) and len(wanted) > 5


def test_what_leaves_is_counted(place: Path) -> None:
    run, bundle = place / "run", place / "run" / "bundle"
    told, report = told_of(bundle), json.loads((run / "report.json").read_text())
    model = package.load_backbone(bundle)
    assert model.num_parameters() == told["parameters"]["slim"] == report["rows"][1]["parameters"]["backbone"]
    sizes = [domain["parameters"] for domain in told["domains"].values()]
    assert report["rows"][1]["parameters"]["memory"] == pytest.approx(sum(sizes) / 2, abs=1)
    gone = (400 if model.config.model_type != "gemma3_text" else 700) - model.config.vocab_size
    with finished_run(run) as opened:
        assert opened.units.trimmed == gone * token_parameters(model.config)
    own = [domain["tokens"] for domain in told["domains"].values()]
    notes = " ".join(report["notes"])
    assert f"{model.config.vocab_size} of" in notes and f"code {own[1]}, law {own[0]}" in notes
    card = (bundle / "README.md").read_text()
    assert "two domains or more use" in card and f"| {own[0]:,} |" in card and "load_tokenizer" in card


@pytest.mark.parametrize("memory", ["law", None])
def test_reported_losses_are_those_of_the_bundle(place: Path, memory: str | None) -> None:
    """With its memory a domain's text is read by its tokens, without one by the backbone's."""
    run, bundle = place / "run", place / "run" / "bundle"
    model = package.load_bundle(bundle, memory)
    windows = [json.loads(line)["tokens"] for line in (run / "domains/law.heldout.jsonl").open()]
    losses = json.loads((run / ("losses.json" if memory else "losses-off.json")).read_text())["law"]
    counts = counts_of(run, "law")
    for window, loss, count in zip(windows, losses, counts, strict=True):
        ids = window
        if memory is None:
            reader, ids = package.load_tokenizer(bundle, "law"), []
            for special, run_of in groupby(window, key=lambda token: token in (0, 1)):
                words = list(run_of)
                ids += words if special else ids_of(bundle, None, reader.decode(words))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        assert logits.shape[-1] == len(package.load_tokenizer(bundle, memory))
        nats = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
        assert loss == pytest.approx(float(nats) / count, rel=1e-4)


def test_onnx_runs_it_as_torch_does(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, bundle = place / "run", place / "run" / "bundle"
    assert koff_prune(capsys, "verify", bundle).code == 0
    model = package.load_bundle(bundle, "law")
    ids = ids_of(bundle, "law", LAW)
    assert max(ids) >= len(package.load_tokenizer(bundle))  # there are own ones among them
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    for profile in Runtime.open(bundle).manifest.graph.profiles:  # type: ignore[union-attr]
        runtime = Runtime.open(bundle, profile=profile)
        assert runtime.encode(LAW, "law", bos=False) == ids
        assert np.abs(runtime.logits(ids, "law") - expected).max() < 1e-4
        assert runtime.logits(ids_of(bundle, None, LAW)).shape[1] == runtime.vocab_size
        answer = "".join(runtime.generate(LAW, "law", 6))
        assert runtime.generate_batch([LAW, LAW], ["law", None], 6)[0] == answer
    shipped = ship(bundle, tmp_path / "device", "int8")
    small = Runtime.open(shipped)
    assert small.encode(LAW, "law", bos=False) == ids and small.logits(ids, "law").shape == expected.shape
    window = run / "domains" / "law.heldout.jsonl"
    capsys.readouterr()
    assert koff_run([str(bundle), "--memory", "law", "--score", str(window), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    losses = json.loads((run / "losses.json").read_text())["law"]
    assert scored["nll"] == pytest.approx(np.dot(losses, counts_of(run, "law")), rel=1e-4)
    # by another memory these numbers mean something else, and without one some mean nothing
    assert koff_run([str(bundle), "--score", str(window)]) == 2
    assert "from another tokenizer" in capsys.readouterr().err


def test_a_prompt_picks_its_memory_by_the_nats_of_the_same_text(place: Path) -> None:
    bundle = place / "run" / "bundle"
    runtime, router = Runtime.open(bundle), package.Router(bundle)
    for text in (LAW, "def f x return if else ( ) :"):
        bare = runtime.encode(text)
        here, there = route(runtime, bare), router.choose(text)
        assert here.losses == pytest.approx(there.losses, rel=1e-3)
        lead = runtime.manifest.eos[:1] if runtime.manifest.bos is None else []
        mine = [*lead, *runtime.encode(text, "law")]
        count = len(lead) + len(bare) - 1
        assert here.losses["law"] == pytest.approx(runtime.score([mine], "law")[0] / count, rel=1e-5)
    # a prompt that is one of a memory's own tokens is not free for it
    reader = package.load_tokenizer(bundle, "law")
    own = range(runtime.vocab_size, len(reader))
    word = next(w for token in own if len(runtime.encode(w := reader.decode([token]))) > 1)
    assert route(runtime, runtime.encode(word)).losses["law"] > 0


def test_one_memory_merged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its bundle has the backbone's tokens and its own, or with merged_vocabulary fewer."""
    bundle = place / "run" / "bundle"
    ids = ids_of(bundle, "law", LAW)
    expected = Runtime.open(bundle).logits(ids, "law")
    command = ("export", place / "recipe.yaml", "--out", place / "run", "--resume", "--merge", "law")
    assert koff_prune(capsys, *command).code == 0
    merged = place / "run" / "bundle-law"
    assert ids_of(merged, None, LAW) == ids
    assert np.abs(Runtime.open(merged).logits(ids) - expected).max() < 1e-4
    told = told_of(merged)["vocabulary"]
    assert told["kept"] == expected.shape[1] and told["counted"] == len(package.load_tokenizer(bundle))
    assert koff_prune(capsys, "verify", merged).code == 0
    assert koff_prune(capsys, *command, "--set", "export.merged_vocabulary=0.6").code == 0
    fewer = told_of(merged)["vocabulary"]["kept"]
    assert fewer < told["kept"] and koff_prune(capsys, "verify", merged).code == 0
    assert Runtime.open(merged).logits(ids_of(merged, None, LAW)).shape[1] == fewer


def test_wrong_memories_read_by_their_own_tokens(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "run"
    assert koff_prune(capsys, "analyze", run, "--tokens", 72).code == 0
    swaps = json.loads((run / "analysis.json").read_text())["swaps"]["nats"]
    for file, who in (("losses.json", "law"), ("losses-off.json", "none")):
        losses = json.loads((run / file).read_text())["law"]
        mean = float(np.average(losses, weights=counts_of(run, "law")))
        assert swaps["law"][who] == pytest.approx(mean, rel=1e-5)
    assert len({round(value, 6) for value in swaps["law"].values()}) == 3


def test_memories_of_such_a_bundle_come_and_go(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle = shutil.copytree(place / "run" / "bundle", tmp_path / "bundle")
    ids = ids_of(bundle, "law", LAW)
    before = Runtime.open(bundle).logits(ids, "law")
    packed = tmp_path / "law.koff"
    assert koff_prune(capsys, "memory", "pack", bundle, "law", "--out", packed).code == 0
    assert koff_prune(capsys, "memory", "remove", bundle, "law").code == 0
    assert not (bundle / "memories" / "law").exists()
    assert koff_prune(capsys, "memory", "unpack", packed, bundle).code == 0
    assert np.abs(Runtime.open(bundle).logits(ids, "law") - before).max() == 0
    assert koff_prune(capsys, "verify", bundle).code == 0
    composed = koff_prune(capsys, "memory", "compose", bundle, "--name", "both", "--of", "law+code")
    mistake(composed, "tokens of their own", "attach one alone")
    # one that is added reads by the backbone's tokens
    keys = (
        "learn.window=16",
        "learn.batch=2",
        "scoring.tokens=64",
        "scoring.window=16",
        "evaluate.tokens=64",
    )
    settings = [part for key in keys for part in ("--set", key)]
    command = ("memory", "add", bundle, "--name", "more", "--data", place / "code", "--tokens", 64, *settings)
    assert koff_prune(capsys, *command).code == 0
    assert told_of(bundle)["domains"]["more"].get("tokens", 0) == 0
    assert Runtime.open(bundle).encode(LAW, "more") == Runtime.open(bundle).encode(LAW)


def test_a_replaced_memory_reads_by_its_new_tokenizer(place: Path, tmp_path: Path) -> None:
    """Its tokenizer comes and goes with it, and is read at once: what becomes of the disk is no matter."""
    bundle = shutil.copytree(place / "run" / "bundle", tmp_path / "bundle")
    runtime = Runtime.open(bundle, verify=False)
    runtime.memory("law")
    before = runtime.encode(LAW, "law")
    file = bundle / "memories" / "law" / "tokenizer.json"
    data, backbone = json.loads(file.read_text()), runtime.vocab_size
    own = {text: n for text, n in data["model"]["vocab"].items() if n >= backbone}
    data["model"]["vocab"] |= {text: backbone + len(own) - 1 - (n - backbone) for text, n in own.items()}
    file.write_text(json.dumps(data))
    told = told_of(bundle)
    entry = told["files"]["memories/law/tokenizer.json"]
    (bundle / "koff.json").write_text(json.dumps(told | {"files": told["files"] | {
        "memories/law/tokenizer.json": {**entry, "size": file.stat().st_size}}}))  # fmt: skip
    assert runtime.encode(LAW, "law") == before
    runtime.evict("law")
    after = runtime.encode(LAW, "law")
    assert after != before and runtime.tokenizer_of("law").decode(after) == LAW


def test_a_memory_with_anothers_tokenizer_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle = shutil.copytree(place / "run" / "bundle", tmp_path / "bundle")
    told = told_of(bundle)
    told["domains"]["law"]["tokenizer"] = "memories/code/tokenizer.json"
    (bundle / "koff.json").write_text(json.dumps(told))
    with pytest.raises(package.KoffError, match="tokenizer of another memory"):
        Runtime.open(bundle).encode(LAW, "law")
    mistake(koff_prune(capsys, "verify", bundle), "tokenizer of another memory")
    told["domains"]["law"]["tokenizer"] = "memories/law/tokenizer.json"
    told["graph"]["vocab_size"] += 5
    (bundle / "koff.json").write_text(json.dumps(told))
    with pytest.raises(package.KoffError, match="fetch the bundle again"):
        Runtime.open(bundle, profile="portable").logits([5, 6])
    shutil.copy2(bundle / "onnx/memories/law.onnx_adapter", bundle / "onnx/memories/other.onnx_adapter")
    with pytest.raises(package.KoffError, match="no tokenizer is listed"):
        Runtime.open(bundle).memory("other")


def test_text_that_another_domain_trains_on_is_found_in_its_tokens(place: Path) -> None:
    """Two domains read the same words by different tokens."""
    with finished_run(place / "run") as run:
        mine, theirs, own = run.domains["law"], run.domains["code"], run.dense.own
        assert own is not None
        texts = [run.dense.tokenizer.decode(w) for w in mine.heldout]
        reader = run.dense.reader("code")
        ids = [i for text in texts for i in reader(text, add_special_tokens=False)["input_ids"]]
        leaked = dataclasses.replace(theirs, train=torch.tensor([ids]))
        found = shared_text({"law": mine, "code": leaked}, run.dense.in_common)
        assert found["law", "code"] > 0.5
        assert shared_text({"law": mine, "code": theirs}, run.dense.in_common)["law", "code"] == 0


def test_damage_is_told(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle = shutil.copytree(place / "run" / "bundle", tmp_path / "bundle")
    rows = bundle / "memories" / "law" / "tokens.safetensors"
    tensors = load_file(rows)
    save_file({key: tensor[1:].contiguous() for key, tensor in tensors.items()}, rows)
    with pytest.raises(package.KoffError, match="koff.json tells of"):
        package.load_bundle(bundle, "law")
    save_file({key: tensor[:, 1:].contiguous() for key, tensor in tensors.items()}, rows)
    with pytest.raises(package.KoffError, match="do not fit this backbone"):
        package.load_bundle(bundle, "law")
    told = told_of(bundle)
    told["domains"]["law"]["tokens"] += 1
    (bundle / "koff.json").write_text(json.dumps(told))
    with pytest.raises(package.KoffError, match="not as koff.json says"):
        Runtime.open(bundle, verify=False).memory("law")
    told["domains"]["law"]["tokenizer"] = "../elsewhere.json"
    told["domains"]["law"]["tokens"] -= 1
    (bundle / "koff.json").write_text(json.dumps(told))
    with pytest.raises(package.KoffError, match="lists|listed"):
        Runtime.open(bundle, verify=False).encode(LAW, "law")


def test_learning_and_judging_have_the_same_tokens() -> None:
    """A memory learns the very loss that it is judged by, over the tokens that are there with it."""
    own = OwnTokens(100, {"law": (100, 160), "code": (160, 258)}, {})
    prefills = dict.fromkeys(own.spans, torch.arange(4))
    memories = Memories(tiny_model(), Memory.model_validate({"kv": {"tokens": 4}}), prefills, 0, own=own)
    window = torch.cat([torch.arange(90, 100), torch.arange(160, 174)])[None]
    (judged,) = window_losses(memories, window, "code")
    learner = Learner(memories, None, None, Learn(), None)
    learned = learner(window, torch.tensor([1]))
    assert float(learned.detach()) == pytest.approx(judged, rel=1e-5)
    memories.activate("law")
    logits = memories.base(input_ids=window).logits
    assert (logits[..., 160:] == -torch.inf).all() and logits[..., :160].isfinite().all()
    memories.activate(None)
    logits = memories.base(input_ids=window).logits
    assert (logits[..., 100:] == -torch.inf).all() and logits[..., :100].isfinite().all()
    plain = memories.unwrap()
    assert plain(input_ids=window).logits.isfinite().all()


def test_numbers_of_a_bundle() -> None:
    own = OwnTokens(10, {"law": (10, 13), "code": (13, 17)}, {})
    ids = torch.tensor([0, 9, 13, 16, -1, -10, -14, -17])
    assert own.numbered(ids, "code").tolist() == [0, 9, 10, 13, -1, -10, -11, -14]
    assert own.numbered(ids[:2], None).tolist() == [0, 9]
    assert own.rows("code").tolist() == [*range(10), 13, 14, 15, 16]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({}, "structure.vocabulary"),
        ({"structure": {"vocabulary": 0.9}, "domains": {"law": {"source": "law"}}}, "two domains"),
        ({"structure": {"vocabulary": 0.9}, "memory": {"lora": "none", "kv": "none", "tokens": True},
          "learn": {"settle_tokens": 0}}, "memory.lora or memory.kv"),
        ({"structure": {"vocabulary": 0.9}, "export": {"formats": ["safetensors", "gguf"]}}, "gguf"),
        ({"structure": {"vocabulary": 0.9},
          "export": {"formats": ["safetensors", "onnx"], "onnx": {"javascript": True}}}, "javascript"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], says: str
) -> None:
    recipe = recipe_of(tmp_path, **{"memory": {"tokens": True}, **sections})
    if "domains" in sections:
        told = recipe.read_text().replace("  code:\n    source: code\n", "")
        recipe.write_text(told)
    mistake(koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run"), "memory.tokens", says)


def test_a_recipe_without_it_is_the_recipe_it_was(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    plain = package.load_recipe(recipe)
    assert plain.digest() == package.load_recipe(recipe, ["memory.tokens=false"]).digest()
    other = package.load_recipe(recipe, ["memory.tokens=true", "structure.vocabulary=0.9"])
    assert other.digest() != package.load_recipe(recipe, ["structure.vocabulary=0.9"]).digest()
