"""From documents to blocks: the split and the windows."""

from __future__ import annotations

import hashlib
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import jsonl, tiny_tokenizer

from koff_export.errors import KoffError
from koff_prune import domains, spool
from koff_prune.domains import load_blocks, load_domain, save_blocks, split_documents
from koff_prune.recipe import Domain, Recipe, TextSource
from koff_prune.spool import pieces

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def recipe(domains: dict[str, Any], **sections: Any) -> Recipe:
    small = {
        "learn": {"tokens": 600, "settle_tokens": 200, "window": 32},
        "scoring": {"tokens": 70, "window": 32},
        "evaluate": {"tokens": 100, "window": 32},
        "memory": {"kv": {"tokens": 8}},
    }
    return Recipe.model_validate({"model": {"source": "x"}, "domains": domains, **small, **sections})


def load(whole: Recipe, name: str = "d", bos: int | None = None) -> Any:
    return load_domain(name, whole.domains[name], TOKENIZER, whole, bos=bos)


# the split


def share(key: str) -> float:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) / 2**256


def split(*sources: dict[str, Any], heldout: float = 0.3, seed: int = 0) -> Any:
    domain = Domain.model_validate({"source": list(sources), "split": {"heldout": heldout}})
    return split_documents("d", domain, seed=seed)


words = st.text("abc", min_size=1, max_size=3)


@settings(deadline=None)
@given(st.lists(st.tuples(words, words, st.sampled_from(["split", "train", "heldout"]))), st.randoms())
def test_nothing_held_out_is_trained_on(rows: list[tuple[str, str, str]], rng: random.Random) -> None:
    """Over sources that repeat each other's keys and texts, in any order."""
    rows = [*rows, ("train", "train-only", "train"), ("held", "held-only", "heldout")]

    def held(key: str, use: str) -> bool:
        return share(key) < 0.3 if use == "split" else use == "heldout"

    def sides_of(rows: list[tuple[str, str, str]]) -> Any:
        given = {f"{i}": [row[:2]] for i, row in enumerate(rows)}
        sources = [{"path": f"{i}", "key": "{k}", "use": use} for i, (_, _, use) in enumerate(rows)]
        with mock.patch.object(domains, "documents", lambda source, cache: given[source.path]):
            return split(*sources)

    sides = sides_of(rows)
    held_texts = {text for key, text, use in rows if held(key, use)}
    held_keys = {key for key, text, _ in rows if text in held_texts}
    assert sorted(sides.heldout) == sorted(held_texts)
    clean = {t for _, t, _ in rows} - held_texts - {t for key, t, _ in rows if key in held_keys}
    assert sorted(sides.train) == sorted(clean)
    rng.shuffle(rows)
    again = sides_of(rows)
    assert [*again.train] == [*sides.train] and [*again.heldout] == [*sides.heldout]
    assert (again.digest, again.counts) == (sides.digest, sides.counts)


def test_a_key_decides_its_side_by_its_hash_alone(tmp_path: Path) -> None:
    texts = [{"k": f"k{i}", "a": f"A{i}", "b": f"B{i}"} for i in range(200)]
    path = str(jsonl(tmp_path / "a.jsonl", texts))
    one, two = (split({"path": path, "key": "{k}", "text": t}, seed=s) for t, s in (("{a}", 0), ("{b}", 5)))
    expected = {i for i in range(200) if share(f"k{i}") < 0.3}
    assert {int(t[1:]) for t in one.heldout} == {int(t[1:]) for t in two.heldout} == expected
    assert [t[1:] for t in one.train] != [t[1:] for t in two.train]  # the seed shuffles


def test_file_names_are_not_keys_across_sources(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(5):
            (tmp_path / folder / f"{i}.txt").write_text(f"{folder} {i}")
    sides = split(
        {"path": str(tmp_path / "a"), "use": "train"}, {"path": str(tmp_path / "b"), "use": "heldout"}
    )
    assert sides.counts == {"read": 10, "duplicates": 0, "leaks": 0, "train": 5, "heldout": 5}


def test_sides_that_are_empty(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", [{"text": "a"}]))
    for use, told in (("train", "none is held out"), ("heldout", "none is left to train on")):
        with pytest.raises(KoffError, match=f"domain 'd'.*{told}.*domains.d.split.heldout"):
            split({"path": path, "use": use})
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(KoffError, match=r"gives no|no record gives"):
        split({"path": str(tmp_path / "a.txt")})


# the blocks


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    rng = random.Random(0)
    rows = [{"text": f"{i}: " + "".join(rng.choices("abc \n", k=rng.randrange(5, 700)))} for i in range(60)]
    return str(jsonl(tmp_path / "c.jsonl", rows))


@pytest.mark.parametrize("bos", [None, 0])
def test_windows(corpus: str, bos: int | None) -> None:
    whole = recipe({"d": {"source": corpus}, "other": {"source": corpus}})
    blocks = load(whole, bos=bos)
    assert blocks.train.shape == (math.ceil((400 + 70) / 32), 32)
    assert blocks.scoring.shape == (2, 32)
    assert blocks.heldout.shape == (3, 32)
    assert len(blocks.heldout_documents) == 3
    assert blocks.prefill.shape == (8,)
    lead = 0 if bos is None else 1
    for block in (blocks.train, blocks.scoring, blocks.heldout):
        assert block.dtype == torch.int64
        if bos is not None:
            assert (block[:, 0] == bos).all()
    stream = blocks.train[:, lead:].reshape(-1)
    assert torch.equal(blocks.scoring[:, lead:].reshape(-1), stream[: 2 * (32 - lead)])
    assert torch.equal(blocks.prefill[lead:], stream[: 8 - lead])
    sides = split_documents("d", whole.domains["d"], seed=0)
    for row, owner in zip(blocks.heldout, blocks.heldout_documents, strict=True):
        first = row[lead:].tolist()
        first = first[: first.index(EOS)] if EOS in first else first
        assert TOKENIZER.decode(first) in sides.heldout[owner]
    for text in TOKENIZER.decode(stream[: len(stream) // 2]).split("<eos>")[:-1]:
        assert any(text in document for document in sides.train)


def test_more_tokens_only_extend(corpus: str) -> None:
    def blocks(tokens: int) -> Any:
        return load(
            recipe({"d": {"source": corpus}}, learn={"tokens": tokens, "settle_tokens": 0, "window": 32})
        )

    few, many = blocks(300), blocks(3000)
    assert torch.equal(many.train[: len(few.train)], few.train)
    assert len(many.train) == math.ceil(3070 / 32)
    assert torch.equal(few.heldout, many.heldout)
    assert few.digest == many.digest
    endless = blocks(10**6).train  # all there is, to be cycled
    total = sum(
        len(t.encode()) for t in split_documents("d", Domain(source=TextSource(path=corpus)), seed=0).train
    )
    assert total // 32 <= len(endless) < 2 * total // 32


def test_the_same_from_a_file_and_in_small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of a text is in memory, and however few pieces are looked at first."""
    path = jsonl(tmp_path / "f.jsonl", [{"text": f"letter {i}"} for i in range(900)])
    whole = recipe({"d": {"source": str(path)}}, learn={"tokens": 3000, "settle_tokens": 0, "window": 32})
    before = load(whole)
    monkeypatch.setattr(spool, "IN_MEMORY", 10)
    monkeypatch.setattr(domains, "_FEW", 1)
    after = load(whole)
    assert before.documents["train_used"] > 8 * 3070 // 32 // 8  # more than are looked at first
    for name in ("train", "scoring", "heldout", "prefill"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert before.heldout_documents == after.heldout_documents


LARGE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_domains import load, recipe
from text_helpers import jsonl
def peak():  # not ru_maxrss, which a process inherits
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10
path = Path(sys.argv[2]) / "large.jsonl"
word = "".join(chr(97 + n * n % 26) for n in range(990)) + " "
with path.open("w") as file:
    for n in range(2500):
        file.write('{"text": "' + f"{n} " + word * 100 + '"}\\n')
load(recipe({"d": {"source": {"path": str(path), "limit": 20}}}))
before = peak()
blocks = load(recipe({"d": {"source": str(path)}}))
print(path.stat().st_size / 2**20, peak() - before, blocks.documents["read"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.timeout(200)
def test_a_corpus_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    """It is read and kept in a file; what stays in memory is where its texts are."""
    command = [sys.executable, "-c", LARGE, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    size, grown, read = map(float, done.stdout.split())
    assert size > 230 and read == 2500
    assert grown < size / 4, (grown, size)


def test_the_same_everywhere(tmp_path: Path) -> None:
    """A fixed digest and fixed tokens: neither Python's hash seed nor the platform enters."""
    path = jsonl(tmp_path / "f.jsonl", [{"text": f"document {i} " * 20} for i in range(30)])
    blocks = load(recipe({"d": {"source": str(path)}}, seed=3))
    assert blocks.digest[:16] == "ed375b7f68b0bdf3"
    assert hashlib.sha256(str(blocks.train.tolist()).encode()).hexdigest()[:16] == "95deb4b33c3c13ee"


def test_control_tokens_in_text_are_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"{i} <eos><bos> " * 10} for i in range(30)])
    blocks = load(recipe({"d": {"source": str(path)}}))
    assert 0 not in blocks.train
    assert (blocks.train == EOS).sum() <= blocks.documents["train_used"]


@settings(deadline=None)
@given(st.text("ab \n", max_size=200), st.integers(2, 50))
def test_pieces_are_the_text(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert all(size // 2 <= len(part) <= size * 3 // 2 for part in parts[:-1])


def test_pieces_end_where_lines_do() -> None:
    assert list(pieces("a\n" + "b" * 14 + "\n" + "c" * 40, 20))[0] == "a\n" + "b" * 14 + "\n"
    assert [len(part) for part in pieces("a\n" + "b" * 58, 20)] == [20, 20, 20]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"scoring": {"tokens": 10**6, "window": 32}},
            r"training text is too short, \d+ tokens in \d+ documents where scoring.tokens needs 1000000",
        ),
        ({"learn": {"window": 10**6}}, "learn.window needs 1000000; lower learn.window"),
        (
            {"memory": {"kv": {"tokens": 8000}}, "scoring": {"tokens": 16, "window": 16}, "limit": 9},
            "memory.kv.tokens needs 8000",
        ),
        (
            {"evaluate": {"tokens": 16, "window": 10**6}},
            "evaluate.window needs 1000000; lower evaluate.window",
        ),
        ({"scoring": {"tokens": 16, "window": 10**6}}, "scoring.window needs 1000000; lower scoring.window"),
        (
            {"evaluate": {"tokens": 10**6, "window": 32}},
            "held-out text is too short.*lower evaluate.tokens, or give more text in domains.d",
        ),
    ],
)
def test_too_little_text(corpus: str, sections: dict[str, Any], told: str) -> None:
    source = {"path": corpus, "limit": sections.pop("limit", None)}
    with pytest.raises(KoffError, match=f"domain 'd': .*{told}"):
        load(recipe({"d": {"source": source, "split": {"heldout": 0.3}}}, **sections))


def test_no_learned_cache_needs_no_prefill(corpus: str) -> None:
    assert load(recipe({"d": {"source": corpus}}, memory={"kv": "none"})).prefill.shape == (0,)


def test_saved_is_loaded(corpus: str, tmp_path: Path) -> None:
    blocks = load(recipe({"d": {"source": corpus}}))
    path = save_blocks(blocks, tmp_path / "run" / "domains")
    again = load_blocks(path)
    for name, value in vars(blocks).items():
        other = getattr(again, name)
        assert (
            torch.equal(other, value) and other.dtype == value.dtype
            if torch.is_tensor(value)
            else other == value
        )
    assert [p.name for p in path.parent.iterdir()] == ["d.safetensors"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(KoffError, match="damaged"):
        load_blocks(path)


def test_a_complaint_about_a_source_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("plain")
    sources = [TextSource(path=str(tmp_path / name)) for name in ("good.txt", "bad.txt")]
    with pytest.raises(KoffError, match=r"domains\.law\.source: .*not UTF-8"):
        split_documents("law", Domain(source=sources[1]), seed=0)
    with pytest.raises(KoffError, match=r"domains\.law\.source\[1\]: .*not UTF-8"):
        split_documents("law", Domain(source=sources), seed=0)
