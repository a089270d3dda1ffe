"""The frozen model in 4 bits while it is trained around, and as it was everywhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from model_helpers import memories_on, tiny_model, token_ids
from run_helpers import koff_prune, recipe_of
from safetensors.torch import load_file
from torch import nn

from koff_export.files import read_json
from koff_prune.quantise import quantise


def test_the_frozen_layers_are_packed_and_what_is_trained_is_not() -> None:
    """And they compute what their unpacked weights would, in both directions."""
    model = tiny_model("llama")
    before = {n: m.weight.numel() for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    memories = memories_on(model)
    quantise(memories.base)
    packed = [m for m in memories.base.model.layers.modules() if type(m).__name__ == "Linear4bit"]
    assert len(packed) == len(before)
    assert sum(m.weight.numel() * m.weight.element_size() for m in packed) == sum(before.values()) / 2
    assert all(p.dtype == torch.float32 and p.requires_grad for p in memories.lora_parameters())
    found = []
    for _ in range(2):
        memories.activate("law")
        logits = memories.base(input_ids=token_ids(1, 12)).logits
        logits.square().mean().backward()
        learned = [p.grad.clone() for p in memories.lora_parameters() if p.grad is not None]
        found.append([logits.detach(), *learned])
        for p in memories.lora_parameters():
            p.grad = None
        for parent in list(memories.base.model.layers.modules()):
            for name, module in list(parent.named_children()):
                if type(module).__name__ == "Linear4bit":
                    setattr(parent, name, unpacked(module))
    assert len(found[0]) > 10
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


def unpacked(module: nn.Module) -> nn.Linear:
    """A plain layer with the weights that a 4-bit one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    made = nn.Linear(module.in_features, module.out_features, bias=False)
    made.weight = nn.Parameter(dequantize_4bit(module.weight.data, module.weight.quant_state), False)
    return made


def test_a_run_around_four_bits_cuts_and_reports_the_full_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, compare=[{"method": "dense", "trained_with": "same"}])
    for base in ("full", "nf4"):
        done = koff_prune(capsys, "apply", recipe, "--out", tmp_path / base, "--set", f"learn.base={base}")
        assert done.code == 0, done.err
    full, packed = (read_json(tmp_path / base / "report.json")["rows"] for base in ("full", "nf4"))
    assert packed[0]["perplexity"] == full[0]["perplexity"]  # dense: never quantised
    backbone = load_file(tmp_path / "nf4" / "backbone" / "model.safetensors")
    assert {t.dtype for t in backbone.values()} == {torch.float32}
    for a, b in zip(full, packed, strict=True):
        assert b["perplexity"]["gmean"] == pytest.approx(a["perplexity"]["gmean"], rel=0.05)
    assert packed[1]["perplexity"]["gmean"] != full[1]["perplexity"]["gmean"]


def test_without_bitsandbytes_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    recipe = recipe_of(tmp_path, learn={"base": "nf4"})
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and "pip install bitsandbytes" in answer.err
    assert not (tmp_path / "run" / "statistics.safetensors").exists(), "told before the scoring"
