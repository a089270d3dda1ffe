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
from model_helpers import SHAPES, tiny_config
from run_helpers import Answer, koff_prune, mistake, recipe_of
from text_helpers import trained_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import koff_prune as package
from koff_export.cli import main as koff_run
from koff_export.runtime import Runtime
from koff_export.ship import ship
from koff_prune.bundling import load_bundle
from koff_prune.cut import load_backbone
from koff_prune.vocabulary import MARK
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


@pytest.fixture(scope="module", params=["tied", "again"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with bundle-law in whole/ and, narrowed, in run/.

    tied: a Llama as it came, its vocabulary of bytes. again: a Gemma of pieces, already trimmed.
    """
    folder, again = tmp_path_factory.mktemp(request.param), request.param == "again"
    family, options = SHAPES["gemma3-mha"] if again else SHAPES["llama-tied-mha-biases"]
    recipe = recipe_of(
        folder, tiny_config(family, vocab_size=700 if again else 400, max_position_embeddings=40, **options),
        structure={"vocabulary": 1.0, "of": "blocks"} if again else {},
        export={"formats": ["safetensors", "onnx"], "onnx": {"precision": ["fp32", "int8", "int4"]}},
        evaluate={"window": 36, "tokens": 72},
    )  # fmt: skip
    texts = [path.read_text() for name in ("law", "code") for path in sorted((folder / name).iterdir())]
    trained_tokenizer(texts, 600 if again else 380, pieces=again).save_pretrained(folder / "model")
    package.apply(recipe, folder / "run")
    package.export(recipe, folder / "run", resume=True, merge="law")
    shutil.copytree(folder / "run" / "bundle-law", folder / "whole")
    package.export(package.load_recipe(recipe, [ALL]), folder / "run", resume=True, merge="law")
    return folder


def test_it_computes_the_same_logits_of_the_tokens_that_stay(place: Path) -> None:
    whole, small = place / "whole", place / "run" / "bundle-law"
    text = (place / "law" / "3.txt").read_text()
    before, after = ids_of(whole, text), ids_of(small, text)
    assert len(before) == len(after) > 10  # read by the same tokens
    there, here = (
        AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
        for folder, ids in ((whole, before), (small, after))
    )
    assert there == here
    old = AutoTokenizer.from_pretrained(whole).get_vocab()
    new = AutoTokenizer.from_pretrained(small).get_vocab()
    rows = [old[token] for token in sorted(new, key=new.__getitem__)]
    assert len(rows) < len(old)
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
    kept, of, width = told["vocabulary"]["kept"], told["vocabulary"]["of"], 32
    weights, config = Weights.open(small).entries, json.loads((small / "config.json").read_text())
    assert config["vocab_size"] == kept == weights[EMBEDDINGS].shape[0] < of
    other = json.loads((whole / "config.json").read_text())
    assert other["vocab_size"] == of
    ids = {"vocab_size", MARK, "bos_token_id", "eos_token_id", "pad_token_id"}
    assert {key for key in config.keys() | other.keys() if config.get(key) != other.get(key)} <= ids
    copies = 2 if HEAD in weights else 1
    assert before["parameters"]["slim"] - told["parameters"]["slim"] == (of - kept) * width * copies
    assert load_backbone(small).num_parameters() == told["parameters"]["slim"]
    assert told["eos"] == [AutoTokenizer.from_pretrained(small).eos_token_id] and "vocabulary" not in before
    assert not (small / "kept.json").exists()
    card = (small / "README.md").read_text()
    assert f" {kept} of " in card and "tokens, those that law uses" in card
    assert f"{told['parameters']['slim']:,} parameters" in card
    assert f"| {told['vocabulary']['perplexity']:.2f} |" in card
    assert koff_prune(capsys, "verify", small).code == 0
    damaged = shutil.copytree(small, tmp_path / "damaged")
    for wrong, says in (
        ({"counted": of - 1}, "parameters, plan.json and koff.json say"),
        ({"of": of - 1}, "another vocabulary"),
        ({"of": 10**4299}, "another vocabulary"),
        ({"kept": 7}, "another vocabulary"),
        ({"perplexity": "x"}, "another vocabulary"),
    ):
        (damaged / "koff.json").write_text(
            json.dumps({**told, "vocabulary": {**told["vocabulary"], **wrong}})
        )
        mistake(koff_prune(capsys, "verify", damaged), says)


def test_windows_of_the_run_are_of_other_tokens(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ship(place / "run" / "bundle-law", tmp_path / "part", "int8")
    assert "tokens that law uses" in (tmp_path / "part" / "README.md").read_text()
    for bundle in (place / "run" / "bundle-law", tmp_path / "part"):
        scored = place / "run" / "domains" / "law.heldout.jsonl"
        assert koff_run([str(bundle), "--score", str(scored)]) == 2
        assert 'give {"text": "…"} instead' in capsys.readouterr().err
        assert koff_run([str(bundle), "--prompt", "the court", "--max-new-tokens", "2"]) == 0


def test_its_perplexity_is_by_the_same_tokens(place: Path) -> None:
    """A head without the tokens that never come is surer of the others, and no more than a little."""
    whole, small = place / "whole", place / "run" / "bundle-law"
    losses = json.loads((place / "run" / "losses.json").read_text())["law"]
    before, after = math.exp(sum(losses) / len(losses)), told_of(small)["vocabulary"]["perplexity"]
    assert after < before
    held = (place / "run" / "domains" / "law.heldout.jsonl").read_text().splitlines()
    model, nats, count = load_bundle(small), 0.0, 0
    room = model.config.max_position_embeddings - 4  # the learned KV
    own, other, dense = map(AutoTokenizer.from_pretrained, (whole, small, place / "model"))
    for line in held:
        ids = json.loads(line)["tokens"]
        read = torch.tensor([other(own.decode(ids), add_special_tokens=False)["input_ids"]])
        for start in range(0, read.shape[1] - 1, room - 1):
            part = read[:, start : start + room]
            with torch.no_grad():
                logits = model(input_ids=part).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits[:-1], part[0, 1:], reduction="sum"))
        count += len(dense(own.decode(ids), add_special_tokens=False)["input_ids"]) - 1
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
    assert f"{fewer['kept']} of {fewer['of']} tokens stay" in answer.err and "(with all " in answer.err
    assert export(capsys, place, ALL, "--merge", "law").code == 0
    assert fewer["kept"] < told_of(small.parent)["vocabulary"]["kept"]


def test_other_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path)
    assert koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run").code == 0
    (tmp_path / "law" / "3.txt").write_text("another text than was learned")
    mistake(export(capsys, tmp_path, ALL, "--merge", "law"), "domains.law.source: the text has changed")
    assert not (tmp_path / "run" / "bundle-law").exists()


def test_chats_are_read_again_as_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is read alone stays so: no loss is told of it, and int4 is rounded on both."""
    recipe = recipe_of(
        tmp_path,
        tiny_config(num_hidden_layers=2, vocab_size=300),
        domains={
            "chat": {"source": {"path": "chat.jsonl", "messages": "messages"}},
            "law": {"source": "law"},
        },
        export={"formats": ["safetensors", "onnx"], "onnx": {"precision": ["fp32", "int4"]}},
    )
    made = trained_tokenizer([path.read_text() for path in sorted((tmp_path / "law").iterdir())], 300)
    made.chat_template = "{% for m in messages %}{{ m['role'][0] + m['content'] + '.' }}{% endfor %}"
    made.save_pretrained(tmp_path / "model")
    rows = [
        [
            {"role": "user", "content": f"ask the court {n}"},
            {"role": "assistant", "content": f"any party {n}"},
        ]
        for n in range(120)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    answer = koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    answer = export(capsys, tmp_path, ALL, "--merge", "chat")
    assert answer.code == 0, answer.err
    told = told_of(tmp_path / "run" / "bundle-chat")
    losses = json.loads((tmp_path / "run" / "losses.json").read_text())["chat"]
    assert told["vocabulary"]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=0.3)
    assert told["numerics"]["precision"]["int4"]["kl"] > 0


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
