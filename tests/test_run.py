"""Whole runs in miniature: repeatable, resumable after any interruption, and koff at rate 0 is its start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_helpers import hub_snapshot
from model_helpers import tiny_config
from run_helpers import koff_prune, memory_bytes, recipe_of
from safetensors.torch import load_file, save_file
from text_helpers import tiny_tokenizer
from transformers import AutoTokenizer

import koff_prune as package
from koff_export.errors import KoffError
from koff_export.files import read_json, sha256_file
from koff_prune.checkpoints import whole_checkpoints
from koff_prune.domains import load_domain
from koff_prune.learn import LearnTrainer
from koff_prune.memory import load_memory
from koff_prune.needs import steps_of, steps_of_both
from koff_prune.plan import Plan
from koff_prune.reading import load_recipe
from koff_prune.recipe import Learn
from koff_prune.run import Run
from koff_prune.tensor_file import load_tensors

# Runs koff-prune in a process of its own that kills itself at the named point.
KILLED = """
import os, signal, sys
from pathlib import Path
point = sys.argv.pop(1)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
import koff_prune.bundling, koff_prune.stages
from koff_prune.learn import LearnTrainer as trainer
save = trainer._save_checkpoint
def after(self, *a, **k):
    save(self, *a, **k)
    die()
def inside(self, output_dir=None, state_dict=None):
    assert ".writing" in str(output_dir)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / "state.safetensors").write_bytes(b"half")
    die()
if point == "learn":
    trainer._save_checkpoint = after
elif point == "checkpoint":
    trainer._save = inside
elif point == "cut":
    koff_prune.stages.copy_tokenizer = lambda *a: die()
elif point == "export":
    koff_prune.bundling.write_manifest = lambda *a: die()
from koff_prune.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    recipe_of(folder)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An uninterrupted run."""
    torch.set_num_threads(1)
    return package.apply(place / "recipe.yaml", place / "whole")


def same(a: Path, b: Path) -> None:
    """Two runs that ended alike: plan, memories, report, and every byte of the bundle."""
    assert Plan.load(a / "plan.json") == Plan.load(b / "plan.json")
    assert sha256_file(a / "gates.safetensors") == sha256_file(b / "gates.safetensors")
    for domain in ("law", "code"):
        for kind in ("learned", "memories"):
            assert memory_bytes(a / kind, domain) == memory_bytes(b / kind, domain), (kind, domain)
    manifests = [read_json(x / "bundle" / "koff.json") for x in (a, b)]
    assert manifests[0]["files"] == manifests[1]["files"]
    rows = [
        [r["perplexity"] for r in read_json(x / "report.json")["rows"]]
        for x in (a, b)
        if (x / "report.json").exists()
    ]
    assert all(r == rows[0] for r in rows)


def made(recipe: Path, out: Path) -> dict[str, Any]:
    """report.json after `compare`."""
    package.compare(recipe, out)
    report: dict[str, Any] = read_json(out / "report.json")
    return report


def test_a_run_leaves_what_the_design_names(whole: Path) -> None:
    for name in (
        "recipe.yaml", "run.json", "gates.safetensors", "plan.json", "backbone/model.safetensors",
        "report.json", "report.html", "bundle/koff.json", "memories/law/kv.safetensors",
        "memories/code/adapter_config.json",
    ):  # fmt: skip
        assert (whole / name).is_file(), name
    assert not [p for p in whole.rglob("*") if ".tmp" in p.name or p.suffix in (".pkl", ".pickle")]
    plan = Plan.load(whole / "plan.json")
    assert abs(plan.realised - 0.1) <= 0.002
    backbone = package.load_backbone(whole / "bundle")
    assert sum(p.numel() for p in backbone.parameters()) == plan.parameters["slim"]


def test_the_report_has_the_recipes_rows(whole: Path) -> None:
    report = read_json(whole / "report.json")
    rows = [(r["method"], r["memory"]) for r in report["rows"]]
    assert rows == [("dense", "none"), ("koff", "lora+kv"), ("koff", "none")]
    for row in report["rows"]:
        assert set(row["perplexity"]) == {"law", "code", "gmean"}
        assert row["sparsity"]["realised"] == (
            0.0 if row["method"] == "dense" else pytest.approx(0.1, abs=0.002)
        )
    koff, off = report["rows"][1:]
    assert koff["tokens"] == {"score": 256, "learn": 384, "settle": 128}
    assert koff["plan"] == off["plan"] == Plan.load(whole / "plan.json").digest
    assert koff["perplexity"]["gmean"] != off["perplexity"]["gmean"]


def test_the_same_recipe_and_seed_make_the_same_run(whole: Path, place: Path) -> None:
    same(whole, package.apply(place / "recipe.yaml", place / "again"))


def test_another_seed_makes_another(whole: Path, place: Path) -> None:
    text = (place / "recipe.yaml").read_text()
    (place / "seed.yaml").write_text("seed: 5\n" + text)
    other = package.learn(place / "seed.yaml", place / "other")
    assert sha256_file(other / "gates.safetensors") != sha256_file(whole / "gates.safetensors")


def test_stage_after_stage_is_the_whole(whole: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "stages"
    for n, stage in enumerate(("learn", "plan", "cut", "compare", "export")):
        answer = koff_prune(capsys, stage, place / "recipe.yaml", "--out", out, *["--resume"] * bool(n))
        assert answer.code == 0, answer.err
        if stage == "plan":
            assert Plan.load(out / "plan.json").digest in answer.out
        assert (out / "bundle").exists() == (stage == "export")
    same(whole, out)


def test_a_finished_run_answers_at_once(whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(LearnTrainer, "train", never)
    before = {p: p.stat().st_mtime_ns for p in (whole / "bundle").rglob("*")}
    package.apply(place / "recipe.yaml", whole, resume=True)
    assert before == {p: p.stat().st_mtime_ns for p in (whole / "bundle").rglob("*")}


def test_kill_9_anywhere_then_resume(whole: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run killed four times: after a checkpoint, inside one, in cut and in export."""
    out = place / "killed"
    for point in ("learn", "checkpoint", "cut", "export"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, point, "apply", str(place / "recipe.yaml"), "--out", str(out),
             "--resume", "--threads", "1"],
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == -9, done.stderr
        learning = out / "checkpoints" / "learning"
        if point == "learn":
            assert [p.name for p in whole_checkpoints(learning)] == ["checkpoint-2"]
        if point == "checkpoint":
            assert (learning / ".writing").exists()
            assert [p.name for p in whole_checkpoints(learning)] == ["checkpoint-2"]
        assert (out / "gates.safetensors").exists() == (point in ("cut", "export"))
        assert (out / "backbone").exists() == (point == "export")
        assert not (out / "bundle").exists()
    answer = koff_prune(capsys, "apply", place / "recipe.yaml", "--out", out, "--resume")
    assert answer.code == 0, answer.err
    same(whole, out)
    assert not [p for p in out.iterdir() if ".tmp" in p.name or ".old" in p.name]


def test_a_kill_before_the_first_stage_or_beside_a_file(whole: Path, place: Path) -> None:
    """What is half-written goes; a folder that is not ours keeps even what looks like it."""
    stray = ".statistics.safetensors.999999999.tmp"
    out = place / "early"
    (out / "domains").mkdir(parents=True)
    (out / ".run.json.999999999.tmp").write_text("{")
    (out / "run.json").write_bytes((whole / "run.json").read_bytes())  # killed before recipe.yaml
    (out / stray).write_bytes(b"half")
    (out / "domains" / ".law.safetensors.999999999.tmp").write_bytes(b"half")
    with Run(load_recipe(place / "recipe.yaml"), out, resume=True):
        assert sorted(p.name for p in out.iterdir()) == [".lock", "domains", "recipe.yaml", "run.json"]
    assert (out / "recipe.yaml").read_bytes() == (whole / "recipe.yaml").read_bytes()
    assert not list((out / "domains").iterdir())
    foreign = place / "foreign"
    foreign.mkdir()
    (foreign / stray).write_bytes(b"theirs")
    with pytest.raises(KoffError, match="holds no run"):
        Run(load_recipe(place / "recipe.yaml"), foreign, resume=True)
    assert (foreign / stray).exists()


def test_a_kill_between_memories_and_checkpoints(whole: Path, place: Path) -> None:
    """Checkpoints of finished stages do not stay for ever."""
    out = place / "late"
    shutil.copytree(whole, out)
    for name in ("learning/checkpoint-4", "settling/.writing"):
        (out / "checkpoints" / name).mkdir(parents=True)
    package.cut(place / "recipe.yaml", out, resume=True)
    assert {p.name for p in out.glob("checkpoints/*/*")} == {"log.json"}


@pytest.mark.parametrize("phase", ["learning", "settling"])
def test_an_error_inside_a_checkpoint_then_resume(
    whole: Path, place: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LearnTrainer._save

    def breaks(self: LearnTrainer, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.args.output_dir.endswith(phase) and self.state.global_step >= (
            4 if phase == "learning" else 2
        ):
            raise KeyboardInterrupt

    monkeypatch.setattr(LearnTrainer, "_save", breaks)
    out = place / f"broken-{phase}"
    with pytest.raises(KeyboardInterrupt):
        package.apply(place / "recipe.yaml", out)
    monkeypatch.setattr(LearnTrainer, "_save", save)
    same(whole, package.apply(place / "recipe.yaml", out, resume=True))


@pytest.mark.parametrize("widths", ["per_layer", "uniform"])
def test_koff_with_gate_rate_0_is_the_fisher_row(widths: str, tmp_path: Path) -> None:
    rows = [{"method": "koff", "gates_learning_rate": 0, "learned_with": "none"}, "fisher"]
    recipe = recipe_of(
        tmp_path,
        tiny_config(num_hidden_layers=2, intermediate_size=64),
        compare=rows,
        learn={"gates": {"start": "fisher"}},
        structure={"round_to": 2, "widths": widths, "sparsity": 0.0766, "of": "total"}
        if widths == "per_layer"
        else {"round_to": 1, "widths": widths, "sparsity": 0.0863, "of": "total"},
    )
    report = made(recipe, tmp_path / "out")
    still, fisher = report["rows"][-2:]
    assert (still["method"], fisher["method"]) == ("koff", "fisher")
    assert still["plan"] == fisher["plan"]
    assert still["perplexity"] == fisher["perplexity"]
    assert report["rows"][1]["plan"] != fisher["plan"]


def test_every_method_and_both_rankings_share_the_road(tmp_path: Path) -> None:
    asked: list[object] = [
        "magnitude",
        "wanda",
        "taylor",
        "random",
        {"method": "fisher", "ranking": "per_layer"},
    ]
    asked += [
        {"method": "dense", "trained_with": "same"},
        {"method": "fisher", "trained_with": "lora", "compensate": "none"},
        {"method": "koff", "learned_with": "none", "trained_with": "same"},
        {"method": "koff", "gates_form": "hard_concrete", "learned_with": "kv", "trained_with": "kv"},
        {"method": "wanda", "ranking": "better"},
    ]
    recipe = recipe_of(tmp_path, compare=asked, cut={"compensate": "none"})
    report = made(recipe, tmp_path / "out")
    rows = report["rows"]
    methods = [r["method"] for r in rows[3:]]
    assert methods[:9] == [
        "magnitude",
        "wanda",
        "taylor",
        "random",
        "fisher",
        "dense",
        "fisher",
        "koff",
        "koff",
    ]
    ceiling = rows[8]
    assert ceiling["sparsity"]["realised"] == 0 and ceiling["memory"] == "lora+kv"
    assert ceiling["tokens"]["settle"] == rows[1]["tokens"]["learn"] + rows[1]["tokens"]["settle"] == 512
    assert rows[9]["compensate"] == "none" and rows[9]["memory"] == "lora"
    assert rows[10]["tokens"] == {"score": 256, "learn": 384, "settle": 512}
    unscored = {r["method"] for r in rows if r["tokens"]["score"] == 0}
    assert unscored == {"dense", "magnitude", "random"}, "the others read the scoring text, wanda too"
    assert {r["tokens"]["score"] for r in rows if r["method"] not in unscored} == {256}
    assert rows[11]["gates"] == "hard_concrete" and rows[11]["memory"] == "kv"
    assert all(abs(r["sparsity"]["realised"] - 0.1) <= 0.002 for r in rows if r["method"] != "dense")
    assert len({r["plan"] for r in rows}) >= 6
    json.dumps(report, allow_nan=False)


def test_a_row_may_have_memories_of_another_size(tmp_path: Path) -> None:
    """LoRA alone and KV alone at the bytes of both: each is trained, saved and counted in its own size."""
    asked = [
        {"method": "koff", "learned_with": "lora", "trained_with": "lora", "lora_rank": 3},
        {"method": "koff", "learned_with": "kv", "trained_with": "kv", "kv_tokens": 24},
    ]
    recipe = recipe_of(tmp_path, compare=asked, memory={"lora": {"rank": 2, "alpha": 4}, "kv": {"tokens": 4}})
    report = made(recipe, tmp_path / "out")
    both, lora, kv = report["rows"][1], *report["rows"][-2:]
    sizes = load_memory(tmp_path / "out" / "memories" / "law")
    part = {name: sum(t.numel() for t in group.values()) for name, group in sizes.items()}
    assert both["parameters"]["memory"] == part["lora"] + part["kv"]
    assert lora["parameters"]["memory"] == part["lora"] * 3 / 2 and lora["note"] == "LoRA rank 3"
    assert kv["parameters"]["memory"] == part["kv"] * 6 and kv["note"] == "KV of 24"
    folder = next((tmp_path / "out" / "rows").glob("*rank3")) / "memories" / "law"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)


def test_an_automatic_dtype_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 where bfloat16 is emulated; a run that moves to another machine keeps what it began in."""
    recipe = load_recipe(recipe_of(tmp_path, model={"source": "model", "dtype": "auto"}))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    with Run(recipe, tmp_path / "run", resume=False) as run:
        assert run.recipe.model.dtype == "float32"
        assert next(run.dense.model.parameters()).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    with Run(recipe, tmp_path / "run", resume=True) as run:
        assert run.recipe.model.dtype == "float32"
    with Run(recipe, tmp_path / "other", resume=False) as run:
        assert next(run.dense.model.parameters()).dtype == torch.bfloat16


def test_tokens_that_make_no_step_are_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, learn={"tokens": 40, "settle_tokens": 640, "window": 64, "batch": 4})
    answer = koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and "learn.tokens: 40 make no step of 512 tokens" in answer.err, answer.err


def test_koff_and_a_rival_take_as_many_steps() -> None:
    """One and a half steps joint and settling, rounded each for itself, would be four steps against three."""
    learn = Learn(tokens=96, settle_tokens=96, window=16, batch=4)
    assert steps_of_both(learn, 1) == (2, 1) and steps_of(192, learn, 1) == 3
    learn = Learn(tokens=96, settle_tokens=64, window=16, batch=4)
    assert steps_of_both(learn, 1) == (2, 1), "a whole step is never rounded away"


def test_a_loss_that_is_no_number_stops_no_report(whole: Path, place: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    losses = read_json(run / "losses-off.json")
    losses["law"][0] = None
    (run / "losses-off.json").write_text(json.dumps(losses))
    answer = koff_prune(capsys, "compare", place / "recipe.yaml", "--out", run, "--resume")
    assert answer.code == 0, answer.err
    assert "inf" in answer.out


def test_a_report_says_what_versions_its_rows_are_of(whole: Path, place: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    stamp = read_json(run / "run.json")
    stamp["versions"]["torch"] = "1.0"
    (run / "run.json").write_text(json.dumps(stamp))
    answer = koff_prune(capsys, "compare", place / "recipe.yaml", "--out", run, "--resume")
    assert answer.code == 0 and "torch 1.0 to" in answer.out, answer.out


def test_an_interrupted_training_keeps_its_log(place: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The step that a signal finishes is saved between two checkpoints, and so is what led to it."""
    ended = LearnTrainer.training_step
    steps: list[int] = []

    def stopping(self: LearnTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return ended(self, *args, **kwargs)

    monkeypatch.setattr(LearnTrainer, "training_step", stopping)
    run, recipe = tmp_path / "run", load_recipe(place / "recipe.yaml", ["learn.checkpoint_steps=1000"])
    with pytest.raises(KeyboardInterrupt):
        package.learn(recipe, run)
    monkeypatch.undo()
    package.learn(recipe, run, resume=True)
    log = read_json(run / "checkpoints" / "learning" / "log.json")
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))


def test_a_heavier_domain_gets_more_text_and_the_report_counts_it(tmp_path: Path) -> None:
    domains = {"law": {"source": "law", "weight": 2}, "code": {"source": "code"}}
    learn = {"tokens": 480, "settle_tokens": 96}
    report = made(recipe_of(tmp_path, domains=domains, learn=learn), tmp_path / "run")
    step = 16 * 2 * 3
    koff = next(row for row in report["rows"] if row["method"] == "koff")
    assert (koff["tokens"]["learn"], koff["tokens"]["settle"]) == (5 * step, step)
    blocks = {
        n: len(load_tensors(tmp_path / "run" / "domains" / f"{n}.safetensors")["train"]) for n in domains
    }
    assert blocks["law"] > 1.5 * blocks["code"]


def test_other_weights_do_not_go_on_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gates of one model and a cut of another would be a finished report that is wrong."""
    recipe, out = recipe_of(tmp_path), tmp_path / "run"
    assert koff_prune(capsys, "learn", recipe, "--out", out).code == 0
    file = tmp_path / "model" / "model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    answer = koff_prune(capsys, "cut", recipe, "--out", out, "--resume")
    assert answer.code == 2 and "the weights at" in answer.err and "have changed" in answer.err, answer.err


def test_a_run_stays_at_the_commit_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub model that is pushed to in between: the run goes on as it was, another one begins anew."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe, out = recipe_of(tmp_path, model={"source": "someone/slim"}), tmp_path / "run"
    old = hub_snapshot(tmp_path / "model", tmp_path / "hub")
    shutil.rmtree(tmp_path / "model")
    assert koff_prune(capsys, "learn", recipe, "--out", out).code == 0
    new = Path(shutil.copytree(old, old.with_name("89abcdef" * 5)))
    weights = {k: v + 0.01 for k, v in load_file(new / "model.safetensors").items()}
    (new / "model.safetensors").unlink()
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    (tmp_path / "hub/models--someone--slim/refs/main").write_text(new.name)
    for command, place, commit in (
        ("cut", out, old.name),
        ("plan", tmp_path / "other", new.name),
    ):
        answer = koff_prune(capsys, command, recipe, "--out", place, "--resume")
        assert answer.code == 0, answer.err
        assert read_json(place / "plan.json")["model"]["revision"] == commit
    sums = [sha256_file(run / "statistics.safetensors") for run in (out, tmp_path / "other")]
    assert sums[0] != sums[1]


def test_another_recipe_is_told_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = recipe_of(tmp_path), tmp_path / "run"
    assert koff_prune(capsys, "learn", recipe, "--out", out).code == 0
    other = koff_prune(capsys, "cut", recipe, "--out", out, "--resume", "--set", "learn.warmup=0.2")
    assert other.code == 2 and "learn.warmup is 0.2 here and" in other.err, other.err


def test_domains_in_another_order_are_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows are drawn by a domain's place: a run keeps the order that it began with."""
    recipe = recipe_of(tmp_path)
    assert koff_prune(capsys, "cut", recipe, "--out", tmp_path / "whole").code == 0
    assert koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run").code == 0
    told = yaml.safe_load(recipe.read_text())
    told["domains"] = dict(reversed(told["domains"].items()))
    recipe.write_text(yaml.safe_dump(told, sort_keys=False))
    assert koff_prune(capsys, "cut", recipe, "--out", tmp_path / "run", "--resume").code == 0
    for name in ("law", "code"):
        one, other = (memory_bytes(tmp_path / run / "memories", name) for run in ("whole", "run"))
        assert one == other


def test_what_trades_time_for_memory_goes_on_with_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the sentence about too little memory says."""
    recipe, out = recipe_of(tmp_path), tmp_path / "run"
    assert koff_prune(capsys, "learn", recipe, "--out", out).code == 0
    more = ("--set", "learn.gradient_checkpointing=true", "--set", "learn.checkpoint_steps=1")
    answer = koff_prune(capsys, "cut", recipe, "--out", out, "--resume", *more)
    assert answer.code == 0, answer.err


def test_a_project_that_was_moved_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, texts, recipe and run folder, moved as one; a newer copy of a text is not that."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    recipe = recipe_of(here)
    assert koff_prune(capsys, "learn", recipe, "--out", here / "run").code == 0
    gates = sha256_file(here / "run" / "gates.safetensors")
    shutil.move(here, there)
    recipe = there / recipe.name
    command = ("cut", recipe, "--out", there / "run")
    unasked = koff_prune(capsys, *command)
    assert unasked.code == 2 and "holds a run of this recipe; continue it with --resume" in unasked.err
    moved = koff_prune(capsys, *command, "--resume")
    assert moved.code == 0 and "where the project lay before" in moved.err, moved.err
    assert sha256_file(there / "run" / "gates.safetensors") == gates
    assert str(here) not in (there / "run" / "recipe.yaml").read_text()
    assert str(here) not in (there / "run" / "run.json").read_text()
    again = koff_prune(capsys, *command, "--resume")
    assert again.code == 0 and "lay before" not in again.err
    newer = there / "newer" / "law"
    shutil.copytree(there / "law", newer)
    recipe.write_text(recipe.read_text().replace("source: law", "source: newer/law"))
    refused = koff_prune(capsys, *command, "--resume")
    assert refused.code == 2 and "another recipe" in refused.err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory": {"kv": {"tokens": 600}}}, "memory.kv.tokens: a cache of 600 and a window of 16 are more"),
        (
            {"learn": {"window": 4096, "tokens": 8192 * 3, "settle_tokens": 0}},
            "learn.window: 4096 is more than",
        ),
    ],
)
def test_what_has_no_positions_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], says: str
) -> None:
    recipe = recipe_of(tmp_path, **settings)
    for name in ("law", "code"):
        (tmp_path / name / "long.txt").write_text("the court " * 20_000)
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and says in answer.err, answer.err
    assert not (tmp_path / "run" / "gates.safetensors").exists()


def test_weights_that_are_no_numbers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    answer = koff_prune(capsys, "plan", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and "is not finite; name whole weights" in answer.err, answer.err


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["court"])
    tokenizer.save_pretrained(tmp_path / "model")
    for n in range(9):
        (tmp_path / "law" / f"x{n}.txt").write_text("court " * 99 + str(n))
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and "and the model has" in answer.err, answer.err


def test_records_without_text_and_texts_without_a_field_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path)
    rows = [{"body": f"the court of {n} " * 40} if n % 4 else {"other": 1} for n in range(120)]
    (tmp_path / "law.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "domains.law.source={path: law.jsonl, text: %s}"
    command = ("learn", recipe, "--out", tmp_path / "run", "--set")
    plain = koff_prune(capsys, *command, source % "body")
    assert plain.code == 2 and '`text: "body"` names no field; write "{body}"' in plain.err, plain.err
    told = koff_prune(capsys, *command, source % '"{body}"')
    assert told.code == 0 and "30 of 120 records give no text" in " ".join(told.err.split()), told.err


def test_little_text_is_told_to_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, learn={"tokens": 200_000})
    loaded = load_recipe(recipe)
    load_domain("law", loaded.domains["law"], tiny_tokenizer(), loaded, bos=None)
    assert "training tokens are read" in capsys.readouterr().err
