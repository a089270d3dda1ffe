"""The road on the real model, small: what the README promises of SmolLM2 (`make test-slow`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from koff_prune import load_backbone, verify
from koff_prune.plan import Plan

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2" / "quickstart.yaml"
SMALL = [
    "learn.tokens=6144",
    "learn.settle_tokens=1536",
    "learn.checkpoint_steps=2",
    "scoring.tokens=2048",
    "evaluate.tokens=2048",
    "export={formats: [safetensors]}",
]


def command(out: Path) -> list[str]:
    """The quickstart with a small budget."""
    sets = [part for item in SMALL for part in ("--set", item)]
    return [sys.executable, "-m", "koff_prune", "apply", "--resume", str(RECIPE), "--out", str(out), *sets]


def test_a_killed_run_on_smollm2_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, timeout=1800)
    for seconds in (25, 45, 65):  # wherever it is by then
        running = subprocess.Popen(command(killed))
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
        time.sleep(0.5)
    subprocess.run(command(killed), check=True, timeout=1800)
    plans = [Plan.load(folder / "plan.json") for folder in (whole, killed)]
    assert plans[0].digest == plans[1].digest
    for name in ("python", "math", "medicine"):
        for file in ("adapter_model.safetensors", "kv.safetensors"):
            ours, theirs = ((f / "bundle" / "memories" / name / file).read_bytes() for f in (whole, killed))
            assert ours == theirs

    report = json.loads((whole / "report.json").read_text())
    rows = {(r["method"], r["memory"]): r for r in report["rows"]}
    koff = rows[("koff", "lora+kv")]
    assert abs(koff["sparsity"]["realised"] - 0.12) <= 0.002
    assert koff["perplexity"]["gmean"] < rows[("koff", "none")]["perplexity"]["gmean"]
    for method in ("magnitude", "wanda"):
        assert koff["perplexity"]["gmean"] < rows[(method, "none")]["perplexity"]["gmean"]
    verify(whole / "bundle")
    backbone = load_backbone(whole / "bundle")
    assert sum(p.numel() for p in backbone.parameters()) == plans[0].parameters["slim"]
