"""A whole run in miniature: a saved model, two domains, a recipe; and koff-prune in this process."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_helpers import tiny_config
from text_helpers import save_tiny_model, tiny_tokenizer
from transformers import PretrainedConfig

from koff_prune.memory import load_memory


def write_texts(folder: Path) -> None:
    """Forty documents of each of two unlike domains."""
    for name, words in (
        ("law", "the court shall hear of any party"),
        ("code", "def f x return if else ( ) :"),
    ):
        chance = random.Random(name)
        (folder / name).mkdir(parents=True)
        for n in range(40):
            text = " ".join(chance.choice(words.split()) for _ in range(30)) + f" {n}\n"
            (folder / name / f"{n}.txt").write_text(text)


def recipe_of(folder: Path, config: PretrainedConfig | None = None, **sections: Any) -> Path:
    """Writes model/, texts and recipe.yaml into `folder`; sections are merged into the recipe's."""
    save_tiny_model(folder / "model", config or tiny_config(num_hidden_layers=2))
    tiny_tokenizer().save_pretrained(folder / "model")
    write_texts(folder)
    recipe: dict[str, Any] = {
        "version": 1,
        "model": {"source": "model", "dtype": "float32"},
        "domains": {"law": {"source": "law"}, "code": {"source": "code"}},
        "structure": {"units": ["ffn_neurons"], "sparsity": 0.1, "round_to": 1},
        "cut": {"compensate": "least_squares"},
        "memory": {"lora": {"rank": 2, "alpha": 4}, "kv": {"tokens": 4}},
        "learn": {"tokens": 384, "settle_tokens": 128, "window": 16, "batch": 2, "checkpoint_steps": 2},
        "scoring": {"tokens": 128, "window": 16},
        "evaluate": {"tokens": 128, "window": 16},
        "export": {"formats": ["safetensors"]},
    }
    for key, value in sections.items():
        recipe[key] = {**recipe[key], **value} if isinstance(recipe.get(key), dict) else value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


class Answer:
    """What one command left: its exit code and both streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def koff_prune(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """`koff-prune` with these arguments, in this process."""
    from koff_prune.cli import main

    before, sys.argv = sys.argv, ["koff-prune", *map(str, arguments)]
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return Answer(code, *capsys.readouterr())


def memory_bytes(folder: Path, domain: str) -> dict[str, bytes]:
    """Every tensor of a saved memory, as bytes."""
    tensors = load_memory(folder / domain)
    return {f"{p}/{k}": t.numpy().tobytes() for p, group in tensors.items() for k, t in group.items()}


def mistake(answer: Answer, *says: str) -> None:
    assert answer.code == 2, (answer.code, answer.err)
    assert "Traceback" not in answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, answer.err
    assert answer.err.splitlines()[-1] == errors[0]
    for text in says:
        assert text in errors[0], errors[0]
