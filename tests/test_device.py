"""A run on a simulated device: the same plan and memories as on the CPU, and nothing in the wrong place.

Run by hand (`make test-slow`): the simulation stands on an experimental interface of torch, and some three
runs of sixty ended otherwise on a busy machine (docs/reliability.md).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import koff_prune, recipe_of
from safetensors.torch import load_file

from koff_export.files import read_json
from koff_prune.plan import Plan

SIMULATED = Path(__file__).with_name("simulated_device.py")


def on_sim(*arguments: object) -> str:
    """What a command printed, run on the simulated device."""
    done = subprocess.run(
        [sys.executable, str(SIMULATED), *map(str, arguments), "--device", "sim"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("re_estimated", {"structure": {"units": ["ffn_neurons", "kv_groups"]}}),
        ("hard_concrete", {"learn": {"loss": {"kl": 1.0}, "gradient_checkpointing": True}}),
        ("straight_through", {"learn": {"gates": {"form": "straight_through", "start": "fisher"}}}),
    ],
)
def test_a_run_on_another_device_makes_the_same_plan_and_memories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, more: dict
) -> None:
    """Fisher, Wanda and the ceiling take part, so every road to a row is walked."""
    if form == "hard_concrete":
        more["learn"]["gates"] = {"form": form, "start": "constant"}
    rows = [{"method": "dense", "trained_with": "same"}, {"method": "wanda", "trained_with": "lora"}]
    recipe = recipe_of(tmp_path, compare=rows, **more)
    here, there = tmp_path / "cpu", tmp_path / "sim"
    assert koff_prune(capsys, "apply", recipe, "--out", here, "--device", "cpu").code == 0
    told = on_sim("apply", recipe, "--out", there)
    assert int(told.rpartition("operators on sim: ")[2]) > 10_000
    assert Plan.load(there / "plan.json").digest == Plan.load(here / "plan.json").digest
    logs = [read_json(run / "checkpoints" / "learning" / "log.json") for run in (here, there)]
    for a, b in zip(*logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-4)
    assert len(logs[0]) == 6
    assert set(load_file(there / "bundle" / "memories" / "law" / "kv.safetensors"))
    rows_here, rows_there = (read_json(run / "report.json")["rows"] for run in (here, there))
    for a, b in zip(rows_here, rows_there, strict=True):
        assert b["perplexity"]["gmean"] == pytest.approx(a["perplexity"]["gmean"], rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_on_another_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned there, cut and settled here."""
    recipe = recipe_of(tmp_path)
    on_sim("learn", recipe, "--out", tmp_path / "run")
    assert koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run", "--resume").code == 0


@pytest.mark.slow
def test_what_a_finished_bundle_is_given_is_trained_there_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`memory add` and `analyze`."""
    recipe = recipe_of(tmp_path)
    run = tmp_path / "run"
    assert koff_prune(capsys, "apply", recipe, "--out", run).code == 0
    sizes = ["learn.window=16", "learn.batch=2", "evaluate.window=16", "evaluate.tokens=64"]
    told = on_sim(
        "memory", "add", run / "bundle", "--name", "more", "--data", tmp_path / "law", "--tokens", 128,
        *(part for size in sizes for part in ("--set", size)),
    )  # fmt: skip
    assert "held-out loss" in told
    assert "analysis:" in on_sim("analyze", run, "--tokens", 64)


def test_a_device_that_is_not_here_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, whether torch was built without it or has never heard of it."""
    recipe = recipe_of(tmp_path)
    for name in ("xpu", "abacus"):
        answer = koff_prune(capsys, "plan", recipe, "--out", tmp_path / "run", "--device", name)
        assert answer.code == 2
        assert f"--device: '{name}'" in answer.err
        assert "Traceback" not in answer.err
