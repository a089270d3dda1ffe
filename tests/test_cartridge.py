"""A learned cache in PEFT's own format, opened by PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_helpers import tiny_config, token_ids
from peft import PeftModel
from run_helpers import koff_prune, recipe_of

import koff_prune as package
from koff_prune import load_backbone, load_bundle


def bundle_of(folder: Path, family: str, memory: dict, structure: dict) -> Path:  # type: ignore[type-arg]
    config = tiny_config(family, num_hidden_layers=2)
    recipe = recipe_of(
        folder, config, memory=memory, structure=structure, export={"formats": ["safetensors"]}
    )
    return package.apply(recipe, folder / "run") / "bundle"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_peft_opens_it_and_says_the_same(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"lora": "none", "kv": {"tokens": 5}}
    bundle = bundle_of(tmp_path, family, memory, {"sparsity": 0.1, "round_to": 1})
    name = next(iter(json.loads((bundle / "koff.json").read_text())["domains"]))
    answer = koff_prune(capsys, "memory", "cartridge", bundle, name, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "without the LoRA" not in answer.out
    ids = token_ids(2, 9, seed=1)
    mine = load_bundle(bundle, memory=name)
    theirs = PeftModel.from_pretrained(load_backbone(bundle), tmp_path / "out").eval()
    with torch.no_grad():
        wanted = mine(input_ids=ids, use_cache=False).logits
        found = theirs(input_ids=ids).logits
        bare = load_backbone(bundle)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, bare, atol=1e-2)
    again = koff_prune(capsys, "memory", "cartridge", bundle, name, "-o", tmp_path / "out")
    assert (again.code, "is there already" in again.err) == (2, True)


def test_what_has_no_place_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA beside the cache is named; without a cache, or for no memory, nothing is written."""
    both = bundle_of(tmp_path / "both", "llama", {"kv": {"tokens": 4}}, {"sparsity": 0.1, "round_to": 1})
    name = next(iter(json.loads((both / "koff.json").read_text())["domains"]))
    told = koff_prune(capsys, "memory", "cartridge", both, name, "-o", tmp_path / "kv")
    assert (told.code, "without the LoRA" in told.out) == (0, True)
    lora = bundle_of(tmp_path / "lora", "llama", {"kv": "none"}, {"sparsity": 0.1, "round_to": 1})
    for bundle, asked, sentence in ((lora, name, "has no learned cache"), (both, "nobody", "not in")):
        answer = koff_prune(capsys, "memory", "cartridge", bundle, asked, "-o", tmp_path / "none")
        assert (answer.code, sentence in answer.err) == (2, True), answer.err
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_sliding_window_is_no_place_for_it(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text longer than the window would see another memory."""
    bundle = bundle_of(tmp_path, family, {"kv": {"tokens": 4}}, {"sparsity": 0.1, "round_to": 1})
    answer = koff_prune(capsys, "memory", "cartridge", bundle, "law", "-o", tmp_path / "none")
    assert (answer.code, "sliding window" in answer.err) == (2, True), answer.err
    assert not (tmp_path / "none").exists()
