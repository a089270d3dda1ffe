"""Templates and readers: from a source in a recipe to keys and texts."""

from __future__ import annotations

import gzip
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_helpers import jsonl

from koff_export.errors import KoffError
from koff_prune.documents import documents
from koff_prune.recipe import TextSource
from koff_prune.templates import render


def read(**source: Any) -> list[tuple[str, str]]:
    return list(documents(TextSource(**{k: str(v) if isinstance(v, Path) else v for k, v in source.items()})))


# templates


@pytest.mark.parametrize(
    ("template", "out"),
    [
        ("{a}", "1"),
        ("{b.c}\n{b.d}", "x\ny"),
        ("{l[1]}", "q"),
        ("{l[i]}", "r"),
        ("{b.l[b.i]}", "n"),
        ("{none}{b.none}{n}", ""),
        ("{{a}}", "{a}"),
        ("{l}", "p\nq\nr"),
        ("{b.l}", "m\nn"),
        ("{s|literal}", "one\ntwo\n3"),
        ("{n|literal}", ""),
        ("{l[9]}{a.b}{a[0]}", ""),
        ("{t}", "True"),
        ("{l[-1]}", "r"),
        ("{b[c]}{a.__class__}", ""),
        ("{l[f]}", "q"),  # a table's whole numbers, where some are missing
        ("{l[n]}{b[n]}{b[l]}{l[l]}", ""),
    ],
)
def test_templates(template: str, out: str) -> None:
    record = {
        "a": 1,
        "b": {"c": "x", "d": "y", "l": ["m", "n"], "i": 1},
        "l": ["p", "q", "r"],
        "i": 2,
        "n": None,
        "s": "{'k': ['one', ('two', 3)], 'z': None}",
        "t": True,
        "f": 1.0,
    }
    assert render(template, record) == out


@pytest.mark.parametrize(
    "template", ["{a", "a}", "{}", "{a|upper}", "{a b}", "{a..b}", "{a[}", "{a[]}", "{a|literal|literal}"]
)
def test_malformed_templates(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        render(template, {"a": 1})


@pytest.mark.parametrize("text", ["__import__('os')", "(" * 5000, "[1", "x"])
def test_literals_are_only_literals(text: str) -> None:
    with pytest.raises(ValueError, match="no Python literal"):
        render("{a|literal}", {"a": text})


@given(st.text())
def test_text_without_braces_is_itself(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert render(escaped, {}) == text
    assert render("{a}", {"a": text}) == text


# documents


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_of_one_key_are_one_document(tmp_path: Path, name: str) -> None:
    rows = [
        {"doc": {"q": f"Q{i}", "c": ["no", "yes"], "gold": 1, "exp": None if i else "E"}, "id": i, "idx": j}
        for j in (0, 1)
        for i in range(3)
    ]
    path = jsonl(tmp_path / name, rows)
    found = read(path=path, text="{doc.q} {doc.c[doc.gold]} {doc.exp}", key="{id}")
    assert found == [("0", "Q0 yes E"), ("1", "Q1 yes"), ("2", "Q2 yes")]
    assert read(path=path, text="{doc.q}", where={"idx": 1, "doc.gold": 1}) == [
        (f"Q{i}", f"Q{i}") for i in range(3)
    ]
    assert read(path=path, text="{idx}", key="{id}") == [(str(i), "0\n1") for i in range(3)]
    assert len(read(path=path, text="{id} {idx}", limit=4)) == 4


def test_a_field_that_no_record_has_is_told(tmp_path: Path) -> None:
    """It would be trained on as a text without its half; one that is null, or there but once, is known."""
    rows = [{"question": "why", "answer": "so", "doc": {"note": None}}, {"question": "how", "more": 1}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(KoffError, match=r"no record has `anwser`.*the fields are question, answer"):
        read(path=path, text="Q: {question} A: {anwser}")
    with pytest.raises(KoffError, match=r"no record has `doc.note.a`"):
        read(path=path, text="{question} {doc.note.a}")
    assert len(read(path=path, text="{question} {answer} {doc.note} {more}")) == 2


def test_a_record_whose_fields_are_all_empty_is_no_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": "why", "a": "so"}, {"q": None, "a": ""}])
    assert [text for _, text in read(path=path, text="[INST] {q} [/INST] {a}")] == ["[INST] why [/INST] so"]
    told = capsys.readouterr().err
    assert 'under `text: "[INST] {q} [/INST] {a}"`, and are left out\n' in told, "brackets are no markup"


def test_where_tells_numbers_from_booleans(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"t": "a", "f": True}, {"t": "b", "f": False}])
    assert read(path=path, text="{t}", where={"f": True}) == [("a", "a")]
    with pytest.raises(KoffError, match="no record gives any text"):
        read(path=path, text="{t}", where={"f": 1})


def test_remove(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "2*3=<<2*3=6>>6"}])
    assert read(path=path, remove="<<[^>]*>>") == [("2*3=6", "2*3=6")]


def test_tables_of_other_kinds(tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["one", "two"], "key": ["a", "b"]})
    data.to_parquet(tmp_path / "a.parquet")
    data.to_csv(tmp_path / "a.csv")
    for name in ("a.parquet", "a.csv"):
        assert read(path=tmp_path / name, key="{key}") == [("a", "one"), ("b", "two")]


def test_folders_and_a_lone_text_file(tmp_path: Path) -> None:
    for name, text in {
        "b/x.txt": "X",
        "a.txt": "\ufeffA ",
        ".hidden/c.txt": "H",
        "a.md": "M",
        "e.txt": " ",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read(path=tmp_path, files="*.txt") == [("a.txt", "A"), ("b/x.txt", "X")]
    assert [key for key, _ in read(path=tmp_path)] == ["a.md", "a.txt", "b/x.txt"]
    paragraphs = [f"Paragraph {i}. " + "word " * 100 for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    found = read(path=tmp_path / "a.txt")
    assert [key for key, _ in found] == [f"a.txt#{i}" for i in range(len(found))]
    assert "".join("".join(t.split()) for _, t in found) == "".join("".join(paragraphs).split())
    assert len(found) > 5


def test_a_lone_text_file_of_one_line_is_divided_at_spaces(tmp_path: Path) -> None:
    (tmp_path / "text8").write_text("word " * 20_000)
    found = list(documents(TextSource(path=str(tmp_path / "text8"))))
    assert len(found) > 5 and " ".join(text for _, text in found) == ("word " * 20_000).strip()
    assert max(len(text) for _, text in found) <= 16_000


def test_the_standard_library() -> None:
    found = dict(documents(TextSource(python_stdlib=True)))
    assert "json/decoder.py" in found
    assert "class JSONDecoder" in found["json/decoder.py"]
    assert not [key for key in found if "test" in key.split("/")[:-1] or "site-packages" in key]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "b.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE verse (chapter TEXT, number INTEGER, text TEXT)")
        rows = [("1", 1, "a"), ("1", 2, "b"), ("2", 1, "c"), ("1", 3, "a")]
        connection.executemany("INSERT INTO verse VALUES (?, ?, ?)", rows)
    connection.close()
    return path


def test_a_query_groups_rows_in_order(database: Path) -> None:
    found = read(path=database, query="SELECT chapter, text FROM verse ORDER BY chapter, number")
    assert found == [("1", "a\nb\na"), ("2", "c")]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("DROP TABLE verse", "not authorized"),
        ("ATTACH 'x.db' AS x", "not authorized|too many attached"),
        ("DELETE FROM verse", "not authorized"),
        ("SELECT text FROM verse", "two columns"),
        ("SELEC", "syntax error"),
        ("SELECT 1, 2; DROP TABLE verse", "one statement"),
        (None, "set `query`"),
    ],
)
def test_a_query_only_reads(database: Path, query: str | None, told: str) -> None:
    before = database.read_bytes()
    with pytest.raises(KoffError, match=told):
        read(path=database, query=query)
    assert database.read_bytes() == before
    assert [p.name for p in database.parent.iterdir()] == ["b.db"]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KoffError, match="no such file"):
        read(path=tmp_path / "none")
    with pytest.raises(KoffError, match="matches"):
        read(path=tmp_path, files="*.txt")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(KoffError, match="is empty"):
        read(path=tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ')
    with pytest.raises(KoffError, match="cannot be read as json"):
        read(path=tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(KoffError, match="the fields are body"):
        read(path=tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KoffError, match="not UTF-8"):
        read(path=tmp_path / "a.txt")


def test_what_cannot_be_read_is_not_left_out_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without rights (which root has, so it is told so), and a link to nothing."""
    for name in ("a.txt", "locked/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words\n")
    scan = os.scandir

    def refuses(folder: str) -> object:
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", refuses)
        with pytest.raises(KoffError, match="cannot read the folder .*locked: permission denied"):
            read(path=tmp_path)
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KoffError, match="c.txt: is a link to nothing; fetch it, or leave it out"):
        read(path=tmp_path)
    found = read(path=tmp_path, files=["a.txt", "locked/*"])
    assert [text for _, text in found] == ["words", "words"]


def test_a_packed_text_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("gr\u00fc\u00dfe\n".encode()))
    assert [text for _, text in read(path=tmp_path)] == ["gr\u00fc\u00dfe"]
    (tmp_path / "b.txt.xz").write_bytes(b"no archive")
    with pytest.raises(KoffError, match="cannot read .*b.txt.xz"):
        read(path=tmp_path)
    (tmp_path / "b.txt.xz").rename(tmp_path / "b.jsonl.zst")
    monkeypatch.setattr(
        "koff_prune.records.get_compression", lambda *_: None
    )  # as where zstandard is not installed
    with pytest.raises(KoffError, match="b.jsonl.zst: .*pip install zstandard"):
        read(path=tmp_path)


def test_a_key_that_names_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else every record would stand for itself, and what belongs together be divided."""
    jsonl(tmp_path / "a.jsonl", [{"id": n // 2, "text": f"words {n}"} for n in range(6)])
    with pytest.raises(KoffError, match='gives any key under `key: "{idd}"`; the fields are id, text'):
        read(path=tmp_path / "a.jsonl", key="{idd}")
    jsonl(tmp_path / "a.jsonl", [{"id": n or None, "text": f"words {n}"} for n in range(6)])
    assert len(read(path=tmp_path / "a.jsonl", key="{id}")) == 6
    assert "1 of 6 records give no key" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("words")
    with pytest.raises(KoffError, match="no record gives any key"):
        read(path=tmp_path / "b", key="{id}")


def test_keys_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    for more, says in (
        ({"sha256": "0" * 64}, "`sha256` belongs to `package` and does nothing for path; leave it out"),
        ({"revision": "x"}, "`revision` belongs to `hub`"),
        ({"dataset_split": "test"}, "`dataset_split` belongs to `hub`"),
    ):
        with pytest.raises(ValueError, match=says):
            TextSource(path="a.txt", **more)  # type: ignore[arg-type]
    TextSource(path="a.txt", dataset_split="train")  # as a resolved recipe has it
    with pytest.raises(KoffError, match="holds no SQLite file for `query`"):
        read(path=tmp_path / "a.txt", query="select 1")
    with pytest.raises(KoffError, match="one file, which .* does not match"):
        read(path=tmp_path / "a.txt", files="*.md")
