"""A merged bundle with the tokens of its domain alone: `export.merged_vocabulary`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import tiny_config
from run_helpers import Answer, koff_prune, mistake, recipe_of
from text_helpers import trained_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import koff_prune as package
from koff_export.runtime import Runtime
from koff_prune.bundling import load_bundle
from koff_prune.cut import load_backbone
from koff_prune.weights import EMBEDDINGS, HEAD, Weights

ALL = "export.merged_vocabulary=1.0"


def export(capsys: pytest.CaptureFixture[str], place: Path, *more: str) -> Answer:
    return koff_prune(
        capsys, "export", place / "recipe.yaml", "--out", place / "run", "--resume",
        *(part for setting in more for part in (("--set", setting) if "=" in setting else (setting,))),
    )  # fmt: skip


def ids_of(bundle: Path, text: str) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(bundle)(text, add_special_tokens=False)["input_ids"]
    return found


def told_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "koff.json").read_text())
    return found


@pytest.fixture(scope="module", params=["tied", "untied"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with bundle-law in whole/ and, narrowed, in run/."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config(num_hidden_layers=2, vocab_size=400, tie_word_embeddings=request.param == "tied")
    recipe = recipe_of(
        folder, config,
        export={"formats": ["safetensors", "onnx"], "onnx": {"precision": ["fp32", "int8", "int4"]}},
    )  # fmt: skip
    texts = [path.read_text() for name in ("law", "code") for path in sorted((folder / name).iterdir())]
    trained_tokenizer(texts, 380).save_pretrained(folder / "model")
    package.apply(recipe, folder / "run")
    package.export(recipe, folder / "run", resume=True, merge="law")
    shutil.copytree(folder / "run" / "bundle-law", folder / "whole")
    package.export(package.load_recipe(recipe, [ALL]), folder / "run", resume=True, merge="law")
    return folder


def test_it_computes_the_same_logits_of_the_tokens_that_stay(place: Path) -> None:
    whole, small = place / "whole", place / "run" / "bundle-law"
    text = (place / "law" / "3.txt").read_text()
    before, after = ids_of(whole, text), ids_of(small, text)
    assert len(before) == len(after) > 20  # read by the same tokens
    there, here = (
        AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
        for folder, ids in ((whole, before), (small, after))
    )
    assert there == here
    old = AutoTokenizer.from_pretrained(whole).get_vocab()
    new = AutoTokenizer.from_pretrained(small).get_vocab()
    rows = [old[token] for token in sorted(new, key=new.__getitem__)]
    assert len(rows) < 380
    expected = Runtime.open(whole).logits(before)[:, rows]
    assert np.abs(Runtime.open(small).logits(after) - expected).max() < 1e-4
    with torch.no_grad():
        torch_says = load_bundle(small)(input_ids=torch.tensor([after])).logits[0].numpy()
    assert np.abs(torch_says - expected).max() < 1e-4


def test_text_of_another_domain_is_read_in_pieces(place: Path) -> None:
    whole, small = place / "whole", place / "run" / "bundle-law"
    text = (place / "code" / "3.txt").read_text()
    assert len(ids_of(small, text)) > len(ids_of(whole, text))
    assert AutoTokenizer.from_pretrained(small).decode(ids_of(small, text)) == text


def test_it_is_told_and_checked(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole, small = place / "whole", place / "run" / "bundle-law"
    told, before = told_of(small), told_of(whole)
    kept, width = told["vocabulary"]["kept"], 32
    weights, config = Weights.open(small).entries, json.loads((small / "config.json").read_text())
    assert config["vocab_size"] == kept == weights[EMBEDDINGS].shape[0] < told["vocabulary"]["of"] == 400
    copies = 2 if HEAD in weights else 1
    assert before["parameters"]["slim"] - told["parameters"]["slim"] == (400 - kept) * width * copies
    assert load_backbone(small).num_parameters() == told["parameters"]["slim"]
    assert told["eos"] == [AutoTokenizer.from_pretrained(small).eos_token_id] and "vocabulary" not in before
    assert not (small / "kept.json").exists()
    card = (small / "README.md").read_text()
    assert f"{kept} of 400 tokens, those that law uses" in card
    assert f"{told['parameters']['slim']:,} parameters" in card
    assert f"| {told['vocabulary']['perplexity']:.2f} |" in card
    assert koff_prune(capsys, "verify", small).code == 0
    damaged = shutil.copytree(small, tmp_path / "damaged")
    told["vocabulary"]["of"] = 399
    (damaged / "koff.json").write_text(json.dumps(told))
    mistake(koff_prune(capsys, "verify", damaged), "parameters, plan.json says")


def test_its_perplexity_is_by_the_same_tokens(place: Path) -> None:
    """A head without the tokens that never come is surer of the others, and no more than a little."""
    whole, small = place / "whole", place / "run" / "bundle-law"
    losses = json.loads((place / "run" / "losses.json").read_text())["law"]
    before, after = math.exp(sum(losses) / len(losses)), told_of(small)["vocabulary"]["perplexity"]
    assert after < before
    held = (place / "run" / "domains" / "law.heldout.jsonl").read_text().splitlines()
    model, nats, count = load_bundle(small), 0.0, 0
    own, other = AutoTokenizer.from_pretrained(whole), AutoTokenizer.from_pretrained(small)
    for line in held:
        ids = json.loads(line)["tokens"]
        read = torch.tensor([other(own.decode(ids), add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=read).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits[:-1], read[0, 1:], reduction="sum"))
        count += len(ids) - 1
    assert after == pytest.approx(math.exp(nats / count), rel=1e-3)


def test_only_what_is_asked_is_written_anew(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, bundle = (place / "run" / name / "koff.json" for name in ("bundle-law", "bundle"))
    stamps = small.stat().st_ino, bundle.stat().st_ino
    assert export(capsys, place, ALL, "--merge", "law").code == 0
    assert export(capsys, place, ALL).code == 0  # of no concern to a bundle without --merge
    assert (small.stat().st_ino, bundle.stat().st_ino) == stamps
    answer = export(capsys, place, "export.merged_vocabulary=0.6", "--merge", "law")
    assert answer.code == 0, answer.err
    fewer = told_of(small.parent)["vocabulary"]
    assert f"{fewer['kept']} of 400 tokens stay" in answer.err and "(with all " in answer.err
    assert export(capsys, place, ALL, "--merge", "law").code == 0
    assert fewer["kept"] < told_of(small.parent)["vocabulary"]["kept"]


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_of(tmp_path)
    words = {word: n for n, word in enumerate(["[UNK]", "[END]", "the", "court", "party", "f", "x"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[END]").save_pretrained(tmp_path / "model")
    assert koff_prune(capsys, "apply", tmp_path / "recipe.yaml", "--out", tmp_path / "run").code == 0
    answer = export(capsys, tmp_path, ALL, "--merge", "law")
    mistake(answer, "export.merged_vocabulary: the model's tokenizer is no plain byte-pair encoding")
    assert not (tmp_path / "run" / "bundle-law").exists()
