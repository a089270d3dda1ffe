"""Text that one domain holds out and another trains on is told, in the run and in its report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from model_helpers import tiny_config
from run_helpers import koff_prune, recipe_of

from koff_prune.domains import DomainBlocks
from koff_prune.leaks import SPAN, sentences, shared_text

SIZES = {"learn": {"window": 64, "batch": 1, "settle_tokens": 192}, "scoring": {"tokens": 128, "window": 64},
         "evaluate": {"tokens": 256, "window": 64}}  # fmt: skip


def write_prose(folder: Path, seed: int) -> dict[str, str]:
    """Two documents drawn letter by letter: no two have 32 letters in common. Returns them as a source."""
    chance = random.Random(seed)
    folder.mkdir()
    for n in range(2):
        (folder / f"{n}.txt").write_text("".join(chance.choice("abcdefgh ") for _ in range(200)))
    return {"path": folder.name}


def test_two_domains_of_one_text_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, fourth = (write_prose(tmp_path / name, n) for n, name in enumerate("abcd"))
    domains = {
        "law": {"source": [{**first, "use": "train"}, {**second, "use": "heldout"}]},
        "code": {"source": [{**third, "use": "train"}, {**first, "use": "heldout"}]},
        "prose": {"source": [{**fourth, "use": "train"}, {**second, "use": "heldout"}]},
    }
    recipe = recipe_of(tmp_path, tiny_config(num_hidden_layers=1), **SIZES)
    made = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**made, "domains": domains}))
    answer = koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    (told,) = [line for line in answer.err.splitlines() if "held-out text" in line]
    assert "of domain code is trained on in domain law" in told
    notes = json.loads((tmp_path / "run/report.json").read_text())["notes"]
    assert [note for note in notes if note.startswith(told.strip())]  # the terminal wraps it


def blocks(name: str, train: torch.Tensor, heldout: torch.Tensor) -> DomainBlocks:
    return DomainBlocks(name, train, train[:1], heldout, [0] * len(heldout), train[0, :4], "", {})


def test_the_share_is_that_of_a_search_by_hand() -> None:
    chance = torch.Generator().manual_seed(0)
    train = torch.randint(0, 50_000, (6, 256), generator=chance)
    heldout = torch.randint(0, 50_000, (4, 160), generator=chance)
    heldout[1, :96] = train[2, 17:113]  # three spans of its five
    heldout[3, 64:96] = torch.cat([-1 - train[5, 200:231], train[5, 231:232]])  # one token of it is said
    heldout[0, 64:96] = -1 - train[4, 200:232]  # none is: a system prompt, such as conversations share
    heldout[2, 32:63] = train[0, 10:41]  # one token short of a span
    other = torch.randint(0, 50_000, (3, 256), generator=chance)
    shared = shared_text({"a": blocks("a", other, heldout), "b": blocks("b", train, other)})
    known = {tuple(row[i : i + SPAN]) for row in train.tolist() for i in range(256 - SPAN + 1)}
    plain = torch.where(heldout < 0, -1 - heldout, heldout).tolist()
    spans = [tuple(row[i : i + SPAN]) for row in plain for i in range(0, 160, SPAN)]
    assert sum(span in known for span in spans) == 5 and len(spans) == 20
    assert shared["a", "b"] == 4 / 19
    assert shared["a", "a"] == 0 and shared["b", "b"] == 0
    assert shared["b", "a"] == 1  # held out in b, trained on in a, all of it
    assert len(sentences(shared)) == 2
