"""What a file says is what is read: no guesses, no neighbours, no tracebacks."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from model_helpers import tiny_config
from run_helpers import koff_prune, recipe_of

from koff_export.errors import KoffError
from koff_prune.documents import documents
from koff_prune.recipe import TextSource


def read(path: Path, **keys: Any) -> list[tuple[str, str]]:
    return list(documents(TextSource(path=str(path), **keys)))


def test_a_files_name_is_no_pattern(tmp_path: Path) -> None:
    for name, text in (("data[1].jsonl", "this"), ("data1.jsonl", "another"), ("a::b.jsonl", "third")):
        (tmp_path / name).write_text(f'{{"text": "{text}"}}\n')
    (tmp_path / "t[1].csv").write_text("text\nthis\n")
    (tmp_path / "t1.csv").write_text("text\nanother\n")
    assert read(tmp_path / "data[1].jsonl") == [("this", "this")]
    assert read(tmp_path / "a::b.jsonl") == [("third", "third")]
    assert read(tmp_path / "t[1].csv") == [("this", "this")]


def test_json_is_read_as_it_is_written(tmp_path: Path) -> None:
    """No dates, no floats, byte order marks and archives and all."""
    lines = '\ufeff{"d": "2024-01-01", "n": 1}\n\n{"d": "n/a", "n": 2.5}\n'
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text('[{"d": "2024-01-01", "n": 1},\n {"d": "n/a", "n": 2.5}]')
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        assert [text for _, text in read(tmp_path / name, text="{d} {n}")] == ["2024-01-01 1", "n/a 2.5"]
    assert read(tmp_path / "a.jsonl", text="{n}", where={"d": "2024-01-01"}) == [("1", "1")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "record 2 is no JSON"),
        ("a.jsonl", b'["a"]\n', "record 1 is no object"),
        ("a.json", b"[1, 2]", "record 1 is no object"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("a.jsonl.gz", b"no archive at all", "cannot be read as json"),
        ("a.jsonl", b"[" * 100_000, "cannot be read as json"),
        ("a.parquet", b"PAR1 and nothing more", "cannot be read as parquet"),
    ],
)
def test_what_is_no_json_is_told(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KoffError, match=says):
        read(tmp_path / name)


def test_other_endings_of_json_and_parquet_are_known(tmp_path: Path) -> None:
    for name in ("a.ndjson", "a.jsonlines"):
        (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
        assert [text for _, text in read(tmp_path / name)] == ["one", "two"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.pq")
    assert [text for _, text in read(tmp_path / "a.pq")] == ["one"]


@pytest.mark.parametrize("name", ["a.zip", "a.jsonl.zip", "a.tar.gz", "a.TGZ", "a.tar"])
def test_an_archive_of_files_is_no_text(tmp_path: Path, name: str) -> None:
    """Its first member would be read, or its members' names and modes."""
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("two")
    if "zip" in name:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in ("one.txt", "two.txt"):
                archive.write(tmp_path / file, file)
    else:
        with tarfile.open(tmp_path / name, "w" if name.endswith("tar") else "w:gz") as archive:
            for file in ("one.txt", "two.txt"):
                archive.add(tmp_path / file, file)
    with pytest.raises(KoffError, match="is an archive; unpack it"):
        read(tmp_path / name)


def test_what_holds_nul_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"some \0 bytes")
    with pytest.raises(KoffError, match="NUL"):
        read(tmp_path / "a.bin")


def test_tables_of_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,ok\n007,NA,True\n7,null,False\n1e3,,True\n")
    (tmp_path / "b.tsv").write_text("id\ttext\n007\tone, two\n")
    assert read(tmp_path / "a.csv", key="{id}") == [("007", "NA"), ("7", "null")]
    assert read(tmp_path / "a.csv", key="{id}", where={"id": 7}) == [("7", "null")]
    assert read(tmp_path / "a.csv", key="{id}", where={"ok": True}) == [("007", "NA")]
    assert read(tmp_path / "b.tsv", key="{id}") == [("007", "one, two")]


def test_bytes_are_text_or_an_error(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(["café one".encode()], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [text for _, text in read(tmp_path / "a.parquet")] == ["café one"]
    base = sqlite3.connect(tmp_path / "a.db")
    base.execute("create table t (k, v)")
    base.execute("insert into t values ('a', ?)", (b"hello",))
    base.commit()
    base.close()
    assert read(tmp_path / "a.db", query="select k, v from t") == [("a", "hello")]


def test_changes_beside_a_database_are_not_overlooked(tmp_path: Path) -> None:
    base = sqlite3.connect(tmp_path / "a.db")
    base.execute("pragma journal_mode=wal")
    base.execute("create table t (k, v)")
    base.commit()
    with pytest.raises(KoffError, match="a.db-wal beside it"):
        read(tmp_path / "a.db", query="select k, v from t")
    base.close()
    assert read(tmp_path / "a.db", query="select 1, 'text'") == [("1", "text")]


def test_what_a_database_has_not_settled_is_not_read(tmp_path: Path) -> None:
    """Rows of a transaction that was never committed lie in the file until its journal is played back."""
    code = (
        "import os, sqlite3, sys\n"
        "base = sqlite3.connect(sys.argv[1])\n"
        "base.execute('create table t (k, v)')\n"
        "base.executemany('insert into t values (?, ?)', [(n, 'old' * 200) for n in range(500)])\n"
        "base.commit()\n"
        "base.execute('pragma cache_size=2')\n"
        "base.execute('update t set v = ?', ('new' * 200,))\n"
        "os._exit(0)\n"
    )
    path = tmp_path / "a.db"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    with pytest.raises(KoffError, match="a.db-journal beside it"):
        read(path, query="select k, v from t")
    base = sqlite3.connect(path)
    base.execute("select count(*) from t").fetchall()
    base.close()
    assert {text for _, text in read(path, query="select k, v from t")} == {"old" * 200}


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_an_archive_with_a_wrong_byte_is_told(tmp_path: Path, ending: str) -> None:
    packed = {"gz": gzip.compress, "xz": lzma.compress}[ending](
        "".join(f'{{"text": "{n * 7919 % 1000}"}}\n' for n in range(5000)).encode()
    )
    damaged = bytearray(packed)
    for place in range(len(packed) // 2, len(packed) // 2 + 40):
        damaged[place] ^= 0xFF
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(bytes(damaged))
    with pytest.raises(KoffError, match="cannot be read as json"):
        read(path)


def test_a_table_without_rows_is_no_mistake(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert [text for _, text in read(tmp_path)] == ["one"]


def test_records_that_a_key_cannot_name_are_documents_of_their_own(tmp_path: Path) -> None:
    lines = [{"text": f"t{n}", **({"repo": "r", "path": str(n)} if n % 2 else {})} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = dict(read(tmp_path / "a.jsonl", key="{repo}/{path}"))
    assert found == {"r/1": "t1", "r/3": "t3", "r/5": "t5", "t0": "t0", "t2": "t2", "t4": "t4"}


def test_a_lone_text_that_ends_where_a_piece_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left over, and so nothing is said to have no text."""
    (tmp_path / "a.txt").write_text("word " * 500 + "\n\n")
    assert len(read(tmp_path / "a.txt")) == 1
    assert "give no text" not in capsys.readouterr().err


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "more" / "b.txt").write_text("two")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "loop").symlink_to(tmp_path / "texts")
    assert read(tmp_path / "texts") == [("a.txt", "one"), ("linked/b.txt", "two")]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"key": "id"}, "`key: .id.` names no field"),
        ({"text": "{{text}}"}, "names no field"),
        ({"path": "~nobody-of-this-name/x"}, "is no path"),
        ({"path": "loop"}, "is no path"),
        ({"path": "x" * 5000}, "is no path"),
    ],
)
def test_sources_that_cannot_be_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], says: str
) -> None:
    import re

    (tmp_path / "loop").symlink_to("loop")
    recipe = recipe_of(tmp_path, domains={"law": {"source": {"path": "law", **settings}}})
    answer = koff_prune(capsys, "plan", "--dry-run", recipe)
    answer = answer if answer.code else koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and re.search(says, answer.err) and "law" in answer.err, answer.err


def test_a_name_that_is_no_text_is_a_key_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path)
    for n in range(3):
        Path(os.fsdecode(os.fsencode(tmp_path / "law") + b"/caf\xe9%d.txt" % n)).write_text("the court")
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err


def test_an_override_changes_one_of_two_aliases(tmp_path: Path) -> None:
    from koff_prune.reading import load_recipe

    path = recipe_of(tmp_path)
    text = "  law: {source: law, split: &s {heldout: 0.2}}\n  code: {source: code, split: *s}\n"
    head, _, rest = path.read_text().partition("domains:\n")
    path.write_text(head + "domains:\n" + text + rest[rest.index("structure:") :])
    recipe = load_recipe(path, ["domains.code.split.heldout=0.5"])
    assert [d.split.heldout for d in recipe.domains.values()] == [0.2, 0.5]
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    path.write_text(bomb)
    with pytest.raises(KoffError, match="stand for more than"):
        load_recipe(path)


def test_a_dry_run_tells_of_windows_without_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path)
    answer = koff_prune(capsys, "plan", "--dry-run", recipe, "--set", "learn.window=4096")
    assert answer.code == 2 and "learn.window: 4096 is more than" in answer.err, answer.err


def test_tokens_that_the_model_has_not_are_told_on_either_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte AD, the tokenizer's last letter, stands in what is held out alone."""
    sources = [{"path": "law", "use": "train"}, {"path": "strange", "use": "heldout"}]
    recipe = recipe_of(
        tmp_path, tiny_config(num_hidden_layers=2, vocab_size=250), domains={"law": {"source": sources}}
    )
    (tmp_path / "strange").mkdir()
    for n in range(9):
        (tmp_path / "strange" / f"{n}.txt").write_text("\u00ad" * 60 + str(n))
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and "embeddings; give it the tokenizer" in answer.err, answer.err


def test_a_config_that_cannot_be_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for wrong in ({"num_attention_heads": 0}, {"hidden_size": "32"}):
        told = {k: v for k, v in config.items() if k not in ("num_key_value_heads", "head_dim")} | wrong
        (tmp_path / "model" / "config.json").write_text(json.dumps(told))
        answer = koff_prune(capsys, "plan", "--dry-run", recipe)
        assert answer.code == 2 and answer.err.startswith("error: ") and answer.err.count("\n") == 1


def test_a_head_of_its_own_under_a_tied_config_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers leaves such a head untied; the cut would drop it."""
    recipe = recipe_of(tmp_path, tiny_config(num_hidden_layers=2, tie_word_embeddings=False))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and "tie_word_embeddings to false" in answer.err, answer.err


def test_a_rotation_that_runs_nowhere_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5, "rope_theta": 1e4}
    recipe = recipe_of(tmp_path)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    answer = koff_prune(capsys, "plan", "--dry-run", recipe)
    assert answer.code == 2 and "runs nowhere" in answer.err, answer.err
