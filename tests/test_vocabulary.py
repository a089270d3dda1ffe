"""Trimmed vocabularies: which tokens stay, that text is read as before, and the road through a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_helpers import SHAPES, TIED, tiny_config, token_ids
from run_helpers import koff_prune, mistake, recipe_of
from text_helpers import save_tiny_model, tiny_tokenizer, trained_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from koff_export.errors import KoffError
from koff_prune.chat import tokens
from koff_prune.cut import cut_on_disk, load_backbone
from koff_prune.domains import count_tokens, split_documents
from koff_prune.models import Dense, open_dense
from koff_prune.plan import make_plan
from koff_prune.recipe import Domain, ModelSection, Structure
from koff_prune.retokenise import read_again
from koff_prune.scores import score_units
from koff_prune.tokenizer_file import trim_tokenizer
from koff_prune.units import read_units
from koff_prune.vocabulary import ASKED, KEPT, covering, trimmed, write_vocabulary
from koff_prune.weights import EMBEDDINGS, HEAD, Weights

_LINES = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").splitlines(True)
DOCS = ["".join(_LINES[n : n + 40]) for n in range(0, len(_LINES), 40)]  # a text that does not change
STRANGE = [
    "naïve Ünïcode — “quotes”",
    "日本語のテキスト",
    "🙂🙃 emoji",
    "  two  spaces\n\n\ttabs",
    "",
    "<unused0>",
]
KINDS = {"bytes": False, "pieces": True}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return found


def reopened(tokenizer: PreTrainedTokenizerFast, folder: Path, wanted: set[int]) -> tuple[Any, list[int]]:
    tokenizer.save_pretrained(folder)
    kept = trim_tokenizer(folder, wanted, [0], 10**6, ASKED)
    return AutoTokenizer.from_pretrained(folder), kept


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_kept_tokens_is_read_as_before_and_any_other_stays_whole(kind: str, tmp_path: Path) -> None:
    whole = trained_tokenizer(DOCS, 2000, pieces=KINDS[kind])
    lines = [line for doc in DOCS for line in doc.splitlines()]
    wanted = {token for line in lines[::7] for token in ids_of(whole, line)}
    small, kept = reopened(whole, tmp_path / "small", wanted)
    assert len(small) == len(kept) < len(whole)
    same = [line for line in lines if set(ids_of(whole, line)) <= set(kept)]
    assert len(same) > len(lines) // 7  # not only those that were asked for
    other = [line for line in lines if line not in same]
    assert other
    for line in same:
        assert [kept[token] for token in ids_of(small, line)] == ids_of(whole, line)
    for line in [*other, *STRANGE]:
        assert small.decode(ids_of(small, line)) == whole.decode(ids_of(whole, line)) == line


@pytest.mark.parametrize("kind", KINDS)
def test_what_its_merges_pass_through_stays_with_a_token(kind: str, tmp_path: Path) -> None:
    whole = trained_tokenizer(DOCS, 2000, pieces=KINDS[kind])
    longest = max(range(len(whole)), key=lambda token: len(whole.convert_ids_to_tokens(token)))
    text = whole.decode([longest])
    small, kept = reopened(whole, tmp_path / "small", {longest})
    assert [kept[token] for token in ids_of(small, text)] == [longest] == ids_of(whole, text)


def test_tokens_with_a_part_to_play_stay_and_spare_ones_go(tmp_path: Path) -> None:
    whole = trained_tokenizer(DOCS, 500)
    small, kept = reopened(whole, tmp_path / "small", {400})
    assert (small.bos_token, small.eos_token) == ("<bos>", "<eos>")
    assert {0, 1, 3} <= set(kept)
    assert 2 not in kept
    assert small("<sep>")["input_ids"] == [kept.index(3)]
    assert "<unused0>" not in small.get_vocab()


def test_what_a_tokenizer_puts_in_front_is_numbered_anew(tmp_path: Path) -> None:
    made = json.loads(trained_tokenizer(DOCS, 500).backend_tokenizer.to_str())
    special = {"<sep>": {"id": "<sep>", "ids": [3], "tokens": ["<sep>"]}}
    parts = [{"SpecialToken": {"id": "<sep>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": special}
    made["post_processor"] = {"type": "Sequence", "processors": [template]}
    whole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), bos_token="<bos>", eos_token="<eos>"
    )
    small, kept = reopened(whole, tmp_path / "small", {300})
    assert [kept[token] for token in small("a")["input_ids"]] == whole("a")["input_ids"]


def test_whole_words_that_no_merge_makes_stay_whole(tmp_path: Path) -> None:
    made = json.loads(trained_tokenizer(DOCS, 500).backend_tokenizer.to_str())
    made["model"]["ignore_merges"] = True  # as Llama 3's
    made["model"]["vocab"]["xyzzy"] = 500
    whole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), bos_token="<bos>", eos_token="<eos>"
    )
    assert ids_of(whole, "xyzzy") == [500]
    small, kept = reopened(whole, tmp_path / "small", {500})
    assert [kept[token] for token in ids_of(small, "xyzzy")] == [500]


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, structure={"vocabulary": 1.0})
    letters = [(chr(n), -1.0) for n in range(32, 127)]
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("<eos>", 0.0), *letters], unk_id=0))
    PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    mistake(answer, "structure.vocabulary", "byte-pair", "leave it out")
    assert not (tmp_path / "run" / "vocabulary").exists()


def test_the_fewest_tokens_cover_every_domain() -> None:
    counts = {"a": torch.tensor([90, 9, 1, 0, 0]), "b": torch.tensor([0, 1, 0, 999, 0])}
    assert covering(counts, 0.9) == [0, 3]
    assert covering(counts, 0.99) == [0, 1, 3]
    assert covering(counts, 1.0) == [0, 1, 2, 3]


def opened(folder: Path, shape: str = "llama") -> tuple[Dense, Dense]:
    """A tiny dense model that was saved, and the same with every second token."""
    family, options = SHAPES[shape]
    save_tiny_model(folder / "model", tiny_config(family, **options))
    dense = open_dense(ModelSection(source=str(folder / "model"), dtype="float32"))
    (folder / "vocabulary").mkdir()
    dense.tokenizer.save_pretrained(folder / "vocabulary")
    trim_tokenizer(folder / "vocabulary", [], [], 258, ASKED)
    kept = sorted(
        {*range(0, 258, 2), 1}
    )  # the tiny tokenizer's tokens are bytes, which all stay: here alone not
    (folder / "vocabulary" / KEPT).write_text(json.dumps(kept))
    return dense, trimmed(dense, folder / "vocabulary")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_trimmed_model_says_what_the_dense_one_says_of_the_tokens_that_stay(
    shape: str, tmp_path: Path
) -> None:
    dense, small = opened(tmp_path, shape)
    kept = torch.tensor(json.loads((tmp_path / "vocabulary" / KEPT).read_text()))
    ids = token_ids(2, 9) % len(kept)
    with torch.no_grad():
        expected = dense.model(kept[ids]).logits[..., kept]
        assert torch.equal(small.model(ids).logits, expected)
    assert small.config.vocab_size == small.model.config.vocab_size == len(kept)
    assert small.config_sha256 != dense.config_sha256
    assert dense.model.config.vocab_size == 258, "the dense model is as it was"
    assert small.weights is not None
    assert small.weights.fit(small.skeleton())
    state = small.model.state_dict()
    for name, tensor in small.weights.read().items():
        assert torch.equal(tensor, state[name]), name
    tied = dense.config.tie_word_embeddings
    gone = (258 - len(kept)) * 32 * (1 if tied else 2)
    assert read_units(small.outline()).parameters == read_units(dense.outline()).parameters - gone


def test_a_trimmed_model_is_cut_from_disk_to_disk_as_in_memory(tmp_path: Path) -> None:
    dense, small = opened(tmp_path, "qwen3")
    units, structure = read_units(small.outline()), Structure(sparsity=0.2, round_to=1)
    identity = {"source": "", "revision": None, "config_sha256": ""}
    scores = score_units("magnitude", small.outline(), units, structure, None, 0, small.weights)
    plan = make_plan(scores, units, structure, model=identity, method="magnitude", ranking="global")
    assert small.weights is not None
    cut_on_disk(small.skeleton, small.weights, plan, tmp_path / "slim")
    backbone = load_backbone(tmp_path / "slim")
    stored = Weights.open(tmp_path / "slim").read([EMBEDDINGS, HEAD])
    assert torch.equal(stored[EMBEDDINGS], small.model.model.embed_tokens.weight)
    assert torch.equal(stored[HEAD], small.model.lm_head.weight)
    assert backbone.config.vocab_size == small.config.vocab_size
    assert backbone.num_parameters() == plan.parameters["slim"]


def test_ids_of_configurations_are_numbered_anew(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(DOCS, 400)
    save_tiny_model(tmp_path / "model", tiny_config(vocab_size=400, eos_token_id=[1, 3], pad_token_id=3))
    tokenizer.save_pretrained(tmp_path / "model")
    generation = {"eos_token_id": [1, 3], "bos_token_id": 0, "suppress_tokens": [2, 399], "pad_token_id": 3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    dense = open_dense(ModelSection(source=str(tmp_path / "model"), dtype="float32"))
    (tmp_path / "small").mkdir()
    counts = {"a": torch.zeros(400, dtype=torch.long).index_fill(0, torch.tensor([399]), 5)}
    write_vocabulary(dense, counts, 1.0, tmp_path / "small")
    small = trimmed(dense, tmp_path / "small")
    kept = json.loads((tmp_path / "small" / KEPT).read_text())
    sep = kept.index(3)
    assert small.config.eos_token_id == [1, sep]
    assert small.config.pad_token_id == sep
    for model in (small.model, small.skeleton()):
        told = model.generation_config
        assert told.eos_token_id == [1, sep]
        assert told.suppress_tokens == [kept.index(399)]
        assert model.get_input_embeddings().padding_idx == sep


def test_two_vocabularies_of_one_size_are_two_networks(tmp_path: Path) -> None:
    _, small = opened(tmp_path)
    kept = json.loads((tmp_path / "vocabulary" / KEPT).read_text())
    (tmp_path / "vocabulary" / KEPT).write_text(json.dumps([*kept[:-1], 257]))
    other = trimmed(open_dense(ModelSection(source=str(tmp_path / "model"))), tmp_path / "vocabulary")
    assert other.config.vocab_size == small.config.vocab_size
    assert other.config_sha256 != small.config_sha256


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_read_back_as_the_whole_tokenizer_reads_their_text(kind: str, tmp_path: Path) -> None:
    whole = trained_tokenizer(DOCS, 2000, pieces=KINDS[kind])
    texts = [" ".join(doc.split()[:60]) for doc in DOCS[:4]]
    small, kept = reopened(whole, tmp_path / "small", set(ids_of(whole, texts[0])))
    end = whole.eos_token_id
    rows, expected = [], []
    for text in texts:
        rows.append([*ids_of(small, text), kept.index(end), *[-1 - t for t in ids_of(small, "said so")]])
        expected.append([*ids_of(whole, text), end, *[-1 - t for t in ids_of(whole, "said so")]])
    assert any(len(row) > len(wanted) for row, wanted in zip(rows, expected, strict=True))
    for row, wanted in zip(rows, expected, strict=True):
        assert read_again(torch.tensor([row]), dict(enumerate(kept)), small, whole)[0].tolist() == wanted


def trimmed_recipe(folder: Path, config: PretrainedConfig | None = None, **structure: Any) -> Path:
    """A recipe in miniature whose model has 600 tokens, of which its domains use a part."""
    config = config or tiny_config(num_hidden_layers=2, vocab_size=640, **TIED)
    recipe = recipe_of(
        folder, config,
        structure={"vocabulary": 1.0, "sparsity": 0.4, **structure},
        compare=[{"method": method, "trained_with": "same"} for method in ("dense", "magnitude")],
        export={"formats": ["safetensors", "onnx"], "onnx": {"precision": ["fp32", "int8"]}},
    )  # fmt: skip
    trained_tokenizer(DOCS, 600).save_pretrained(folder / "model")
    return recipe


def test_a_run_with_a_trimmed_vocabulary_ends_in_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    answer = koff_prune(capsys, "apply", trimmed_recipe(tmp_path), "--out", run)
    assert answer.code == 0, answer.err
    kept = json.loads((run / "vocabulary" / KEPT).read_text())
    plan = json.loads((run / "plan.json").read_text())
    config = json.loads((run / "bundle" / "config.json").read_text())
    assert config["vocab_size"] == len(kept) < 600
    assert abs(1 - plan["parameters"]["slim"] / plan["parameters"]["dense"] - 0.4) < 0.002
    assert abs(plan["realised"] - 0.4) < 0.002
    assert f"{len(kept)} of 640 tokens stay" in " ".join(answer.out.split())
    assert load_backbone(run / "bundle").num_parameters() == plan["parameters"]["slim"]
    rows = json.loads((run / "report.json").read_text())["rows"]
    dense, koff, ceiling = rows[0], rows[1], rows[3]
    assert dense["parameters"]["backbone"] == plan["parameters"]["dense"]
    assert (ceiling["method"], ceiling["memory"]) == ("dense", "lora+kv")
    gone = plan["parameters"]["dense"] - ceiling["parameters"]["backbone"]
    assert gone == (640 - len(kept)) * 32
    assert koff["parameters"]["backbone"] == plan["parameters"]["slim"]
    checked = koff_prune(capsys, "verify", run / "bundle")
    assert checked.code == 0, checked.err
    assert f"{len(kept)} of 640 tokens" in (run / "bundle" / "README.md").read_text()
    again = koff_prune(capsys, "compare", tmp_path / "recipe.yaml", "--out", run, "--resume")
    assert again.code == 0, again.err
    for row, before in zip(json.loads((run / "report.json").read_text())["rows"], rows, strict=True):
        assert {**row, "seconds": 0} == {**before, "seconds": 0}


def test_its_dense_row_is_the_model_as_it_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by the same tokens on the same text, in whichever run."""
    recipe = trimmed_recipe(tmp_path)
    found = {}
    for name, vocabulary in (("trimmed", "1.0"), ("plain", "none")):
        answer = koff_prune(
            capsys, "compare", recipe, "--out", tmp_path / name, "--set", "compare=[]",
            "--set", f"structure.vocabulary={vocabulary}", "--set", "structure.sparsity=0.298",
            "--set", "structure.of=blocks",
        )  # fmt: skip
        assert answer.code == 0, answer.err
        found[name] = json.loads((tmp_path / name / "report.json").read_text())["rows"]
    trimmed_row, plain_row = found["trimmed"][0], found["plain"][0]
    assert trimmed_row["perplexity"]["law"] == pytest.approx(plain_row["perplexity"]["law"], rel=0.05)
    assert trimmed_row["parameters"] == plain_row["parameters"]
    # of the blocks alone: what left with tokens is no part of it
    assert found["trimmed"][1]["sparsity"]["realised"] == found["plain"][1]["sparsity"]["realised"]
    # a head without the tokens that never come is surer of the others
    assert found["trimmed"][1]["perplexity"]["gmean"] < found["plain"][1]["perplexity"]["gmean"]


@pytest.mark.parametrize(
    "structure",
    [{"widths": "uniform", "sparsity": 0.386}, {"units": ["ffn_neurons", "kv_groups"]},
     {"of": "blocks", "sparsity": 0.2}],
)  # fmt: skip
def test_every_way_to_count_meets_its_target(
    structure: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = trimmed_recipe(tmp_path, **structure)
    answer = koff_prune(capsys, "plan", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert abs(plan["realised"] - plan["target"]) < 0.002


@pytest.mark.parametrize("form", ["hard_concrete", "straight_through"])
def test_gates_count_what_left_with_tokens(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = trimmed_recipe(tmp_path)
    told = yaml.safe_load(recipe.read_text())
    told["learn"]["gates"] = {"form": form, "start": "magnitude"}
    recipe.write_text(yaml.safe_dump(told))
    answer = koff_prune(capsys, "plan", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    log = json.loads((tmp_path / "run" / "checkpoints" / "learning" / "log.json").read_text())
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    share = (640 - len(json.loads((tmp_path / "run" / "vocabulary" / KEPT).read_text()))) * 32
    assert all(entry["sparsity"] >= share / plan["parameters"]["dense"] - 1e-6 for entry in log)
    assert plan["realised"] == pytest.approx(0.4, abs=0.002)


def test_a_target_that_tokens_alone_pass_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(capsys, "learn", trimmed_recipe(tmp_path, sparsity=0.1), "--out", tmp_path / "run")
    mistake(answer, "structure.sparsity 0.1", "leave with tokens alone", "of: blocks")


def test_a_dry_run_says_that_tokens_are_counted_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = trimmed_recipe(tmp_path, sparsity=0.1)
    answer = koff_prune(capsys, "plan", "--dry-run", recipe)
    assert answer.code == 0, answer.err
    assert "structure.vocabulary" in answer.out
    far = koff_prune(capsys, "plan", "--dry-run", recipe, "--set", "structure.sparsity=0.9")
    mistake(far, "structure.sparsity 0.9", "structure.vocabulary")


def test_a_share_below_a_half_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(capsys, "learn", trimmed_recipe(tmp_path, vocabulary=0.2), "--out", tmp_path / "run")
    mistake(answer, "structure.vocabulary", "0.2")


def test_a_damaged_vocabulary_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = trimmed_recipe(tmp_path), tmp_path / "run"
    assert koff_prune(capsys, "plan", recipe, "--out", run).code == 0
    kept = run / "vocabulary" / KEPT
    kept.write_text(kept.read_text().replace("[0,", "[1,"))
    mistake(koff_prune(capsys, "cut", recipe, "--out", run, "--resume"), str(kept), "remove", "--resume")


def test_chats_are_counted_by_what_is_read_and_said(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + m['content'] + '.' }}{% endfor %}"
    chat = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "told"}]
    lines = "".join(
        json.dumps({"messages": [*chat, {"role": "user", "content": f"{n}"}]}) + "\n" for n in range(30)
    )
    (tmp_path / "chat.jsonl").write_text(lines)
    domain = Domain.model_validate({"source": {"path": str(tmp_path / "chat.jsonl"), "messages": "messages"}})
    counts = count_tokens(split_documents("chat", domain, seed=0).train, tokenizer)
    letters = tokens(torch.tensor(ids_of(tokenizer, "asktold")))
    assert bool((counts[letters] > 0).all())
    assert int(counts[ids_of(tokenizer, "z")[0]]) == 0


def test_a_sweep_trims_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = trimmed_recipe(tmp_path, units=["ffn_neurons", "kv_groups"]), tmp_path / "sweep"
    asked = ("compare", recipe, "--out", out, "--set", "compare=[]", "--sparsity")
    mistake(koff_prune(capsys, *asked, "0.4,0.1"), "structure.sparsity 0.1", "tokens alone")
    answer = koff_prune(capsys, *asked, "0.4,0.45", "--resume")
    assert answer.code == 0, answer.err
    assert answer.err.count("counting tokens") == 0  # the refused sweep has counted them
    first, second = (out / "seed-0" / f"sparsity-{s}" / "vocabulary" / KEPT for s in (0.4, 0.45))
    assert first.read_bytes() == second.read_bytes()
    rows = json.loads((out / "sweep.json").read_text())["points"][1]["rows"]
    assert rows[1]["realised"] == pytest.approx(0.45, abs=0.002)


def trimmed_to(folder: Path, tokenizer: Any, used: list[int], **config: Any) -> tuple[Dense, list[int]]:
    """A tiny model of this tokenizer, trimmed to `used` and what has to stay."""
    save_tiny_model(folder / "model", tiny_config(**config))
    tokenizer.save_pretrained(folder / "model")
    dense = open_dense(ModelSection(source=str(folder / "model"), dtype="float32"))
    (folder / "small").mkdir()
    count = torch.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=torch.long)
    write_vocabulary(dense, {"a": count.index_fill(0, torch.tensor(used), 5)}, 1.0, folder / "small")
    return trimmed(dense, folder / "small"), json.loads((folder / "small" / KEPT).read_text())


def test_tokens_without_an_embedding_go(tmp_path: Path) -> None:
    """As Gemma 3's image token, which its text model has no row for."""
    tokenizer = trained_tokenizer(DOCS, 400)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == 402
    small, kept = trimmed_to(tmp_path, tokenizer, [399], vocab_size=400)
    assert max(kept) == 399
    assert len(small.tokenizer) == len(kept)
    assert "<image>" not in small.tokenizer.get_vocab()
    assert small.model(torch.tensor([[len(kept) - 1]])).logits.shape[-1] == len(kept)


def test_text_without_an_embedding_is_told(tmp_path: Path) -> None:
    with pytest.raises(KoffError, match="gives token 399, and the model has 390 embeddings"):
        trimmed_to(tmp_path, trained_tokenizer(DOCS, 400), [399], vocab_size=390)


def test_a_pad_token_that_is_a_reserved_one_stays(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(DOCS, 400)
    tokenizer.pad_token = "<unused0>"
    small, kept = trimmed_to(tmp_path, tokenizer, [399], vocab_size=400)
    assert 2 in kept
    assert small.tokenizer.pad_token_id == kept.index(2)


def test_ids_that_no_token_has_are_none(tmp_path: Path) -> None:
    """As old Llamas' pad_token_id of -1, or an end in the padding of a vocabulary."""
    small, kept = trimmed_to(
        tmp_path, trained_tokenizer(DOCS, 400), [399], vocab_size=420, pad_token_id=-1, eos_token_id=[1, 410]
    )
    assert small.config.pad_token_id is None
    assert small.config.eos_token_id == [kept.index(1)]


def test_words_of_a_generation_config_are_numbered_anew(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(DOCS, 400)
    save_tiny_model(tmp_path / "model", tiny_config(vocab_size=400))
    told = {"eos_token_id": 1, "bad_words_ids": [[399], [1, 2]]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(told))
    tokenizer.save_pretrained(tmp_path / "model")
    dense = open_dense(ModelSection(source=str(tmp_path / "model"), dtype="float32"))
    (tmp_path / "small").mkdir()
    count = torch.zeros(400, dtype=torch.long).index_fill(0, torch.tensor([399]), 1)
    write_vocabulary(dense, {"a": count}, 1.0, tmp_path / "small")
    kept = json.loads((tmp_path / "small" / KEPT).read_text())
    assert trimmed(dense, tmp_path / "small").model.generation_config.bad_words_ids == [[kept.index(399)]]


def prepending(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space stands in front of every text."""
    made = json.loads(trained_tokenizer(texts, size, pieces=True).backend_tokenizer.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    made["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    made["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), bos_token="<bos>", eos_token="<eos>"
    )


@pytest.mark.parametrize("kind", ["bytes", "pieces", "prepending"])
def test_where_every_token_stays_windows_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    words = [" ".join(doc.split()) for doc in DOCS]  # without line ends, which are bytes to one of them
    if kind == "prepending":
        whole = prepending(words, 2000)
    else:
        whole = trained_tokenizer(words, 2000, pieces=KINDS[kind])
    small, kept = reopened(whole, tmp_path / "small", set(range(4, len(whole))))
    ids = ids_of(small, words[0])
    windows = torch.tensor([ids[n : n + 16] for n in range(0, len(ids) - 16, 16)])
    read = read_again(windows, dict(enumerate(kept)), small, whole)
    # a word that a window's end cuts may be read otherwise
    same = [
        found.tolist()[:-3] == [kept[t] for t in row.tolist()][:-3]
        for found, row in zip(read, windows, strict=True)
    ]
    assert sum(same) > 0.97 * len(same)


def test_a_character_that_a_windows_end_cuts_is_all_that_is_left_out(tmp_path: Path) -> None:
    whole = trained_tokenizer(DOCS, 1000, pieces=True)
    small, kept = reopened(whole, tmp_path / "small", set(ids_of(whole, "the court")))
    ids = ids_of(small, "the court 日本語のテキスト")
    for cut in (1, 2):
        (read,) = read_again(torch.tensor([ids[:-cut]]), dict(enumerate(kept)), small, whole)
        assert whole.decode(read.tolist()) == "the court 日本語のテキス"


def test_a_refused_target_is_mended_in_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = trimmed_recipe(tmp_path, sparsity=0.1), tmp_path / "run"
    mistake(koff_prune(capsys, "plan", recipe, "--out", run), "leave with tokens alone")
    answer = koff_prune(capsys, "plan", recipe, "--out", run, "--set", "structure.sparsity=0.4")
    assert answer.code == 0, answer.err


def test_a_vocabulary_that_is_made_again_of_other_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = trimmed_recipe(tmp_path), tmp_path / "run"
    assert koff_prune(capsys, "learn", recipe, "--out", run).code == 0
    kept = (run / "vocabulary" / KEPT).read_bytes()
    shutil.rmtree(run / "vocabulary")
    again = koff_prune(capsys, "plan", recipe, "--out", run, "--resume")
    assert again.code == 0, again.err
    assert (run / "vocabulary" / KEPT).read_bytes() == kept
    shutil.rmtree(run / "vocabulary")
    for path in (tmp_path / "law").iterdir():
        path.write_text(path.read_text() + "\nmeasured perplexity of the dense model\n")
    mistake(koff_prune(capsys, "cut", recipe, "--out", run, "--resume"), "other tokens stay", "--out")
    assert not (run / "vocabulary").exists()
