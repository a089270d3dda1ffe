"""Two processes on one run against one: the same gradients, the same plan, the same memories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from model_helpers import memories_on, tiny_model, token_ids
from run_helpers import koff_prune, recipe_of
from safetensors.torch import load_file

from koff_export.files import read_json
from koff_prune import ranks
from koff_prune.checkpoints import whole_checkpoints
from koff_prune.learner import Learner
from koff_prune.reading import load_recipe
from koff_prune.recipe import Learn

# What every process does: the command, its gradients written down as they are after the first step's sharing.
SCRIPT = """
import json
import os
import sys
import time
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
import koff_prune.learn
from koff_prune import ranks
from koff_prune.cli import main

seen, dies_at, waits_at = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
shared, calls = ranks.share_mean, []

def noting(tensors):
    tensors = list(tensors)
    calls.append(1)
    if ranks.rank() == 1 and len(calls) == dies_at:
        os._exit(9)
    if len(calls) == waits_at:
        (seen / f"waits-{ranks.rank()}").touch()
        while not (seen / "go").exists():
            time.sleep(0.01)
    shared(tensors)
    path = seen / f"{ranks.rank()}.pt"
    if not path.exists():
        torch.save([t.clone() for t in tensors], path)

ranks.share_mean = noting
learn = sys.modules["koff_prune.learn"]  # the package has a function of that name
share_out = learn.shard

def weighing(model):
    whole = sum(p.numel() for p in model.model.layers.parameters() if not p.requires_grad)
    share_out(model)
    parts = [p.to_local() for p in model.model.layers.parameters() if isinstance(p, DTensor)]
    path = seen / f"held-{ranks.rank()}.json"
    path.write_text(json.dumps({"whole": whole, "here": sum(p.numel() for p in parts)}))

learn.shard = weighing
main()
"""


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LARGE = sorted((Path(__file__).parents[1] / "recipes").glob("*/accelerate.yaml"))


def launching(
    folder: Path, processes: int, *arguments: object, dies_at: int = 0, waits_at: int = 0
) -> list[str]:
    """The command of `launch`."""
    script, seen = folder / "script.py", folder / f"seen-{processes}"
    script.write_text(SCRIPT)
    seen.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    rest = map(str, (script, seen, dies_at, waits_at, *arguments))
    return [sys.executable, *(launcher if processes > 1 else []), *rest]


def launch(
    folder: Path, processes: int, *arguments: object, dies_at: int = 0
) -> subprocess.CompletedProcess[str]:
    """`koff-prune` in so many processes; gradients go to <folder>/seen-<processes>/."""
    command = launching(folder, processes, *arguments, dies_at=dies_at)
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=ENVIRONMENT)


def until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Waits for it, or for the process's end."""
    while not happened() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.timeout(400)
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        learn={"tokens": 1024, "settle_tokens": 256, "batch": 4, "gates": {"prior_tokens": 1000}},
        compare=["fisher", {"method": "dense", "trained_with": "same"}],
    )
    for processes in (1, 2, 4):
        done = launch(tmp_path, processes, "apply", recipe, "--out", tmp_path / f"run-{processes}")
        assert done.returncode == 0, done.stderr
    one, first, second = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("seen-1/0.pt", "seen-2/0.pt", "seen-2/1.pt")
    )
    assert len(one) > 10 and any(float(t.abs().max()) > 0 for t in one)
    for a, b, c in zip(one, first, second, strict=True):
        assert torch.equal(b, c)
        assert float((a - b).abs().max()) <= 1e-6
    plans = [read_json(tmp_path / f"run-{n}" / "plan.json")["digest"] for n in (1, 2)]
    assert plans[0] == plans[1]
    for name in ("law", "code"):
        for file in ("adapter_model.safetensors", "kv.safetensors"):
            alone, together = (load_file(tmp_path / f"run-{n}" / "memories" / name / file) for n in (1, 2))
            for key, tensor in alone.items():
                assert torch.allclose(tensor, together[key], atol=1e-4), (name, key)
    rows = [read_json(tmp_path / f"run-{n}" / "report.json")["rows"] for n in (1, 2)]
    for a, b in zip(*rows, strict=True):
        assert a["perplexity"]["gmean"] == pytest.approx(b["perplexity"]["gmean"], rel=1e-3)
    assert done.stdout.count("bundle:") == 1 and (tmp_path / "run-2" / "bundle" / "koff.json").exists()


@pytest.mark.timeout(400)
def test_two_processes_share_out_the_frozen_model(tmp_path: Path) -> None:
    """Each holds half of every layer while training, and plan and memories are what they are without."""
    recipe = recipe_of(
        tmp_path,
        learn={"batch": 2, "non_finite": "skip", "gradient_checkpointing": True, "loss": {"kl": 1.0}},
        compare=[{"method": "dense", "trained_with": "same"}],
    )
    for name, more in (("whole", []), ("shared", ["--shard"])):
        done = launch(tmp_path, 2, "apply", recipe, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    held = [read_json(path) for path in sorted((tmp_path / "seen-2").glob("held-*.json"))]
    assert len(held) == 2 and all(0.5 <= h["here"] / h["whole"] < 0.51 for h in held), held
    plans = [read_json(tmp_path / name / "plan.json")["digest"] for name in ("whole", "shared")]
    assert plans[0] == plans[1]
    for name in ("law", "code"):
        for file in ("adapter_model.safetensors", "kv.safetensors"):
            whole, shared = (
                load_file(tmp_path / run / "memories" / name / file) for run in ("whole", "shared")
            )
            for key, tensor in whole.items():
                assert torch.allclose(tensor, shared[key], atol=1e-5), (name, key)
    rows = [read_json(tmp_path / name / "report.json")["rows"] for name in ("whole", "shared")]
    for a, b in zip(*rows, strict=True):
        assert a["perplexity"]["gmean"] == pytest.approx(b["perplexity"]["gmean"], rel=1e-4)


def test_one_process_has_nobody_to_share_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = koff_prune(capsys, "plan", recipe_of(tmp_path), "--out", tmp_path / "run", "--shard")
    assert answer.code == 2 and "--shard: there is one process" in answer.err


@pytest.mark.timeout(400)
def test_two_processes_go_on_where_two_stopped(tmp_path: Path) -> None:
    """The first one asks for statistics inside its turn at the plan, the second one does not."""
    recipe = recipe_of(tmp_path, learn={"batch": 2}, compare=["wanda"])
    out = tmp_path / "run"
    for command in (("learn", recipe, "--out", out), ("apply", recipe, "--out", out, "--resume")):
        done = launch(tmp_path, 2, *command)
        assert done.returncode == 0, done.stderr
    assert (out / "bundle" / "koff.json").exists()


@pytest.mark.timeout(300)
def test_a_process_that_dies_loses_no_more_than_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, learn={"tokens": 1024, "settle_tokens": 0, "batch": 4})
    done = launch(tmp_path, 2, "plan", recipe, "--out", tmp_path / "run", dies_at=6)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: process 0 of 2 lost another; see its message, then use --resume"
    ], done.stderr
    assert not (tmp_path / "run" / "gates.safetensors").exists()
    assert list((tmp_path / "run" / "checkpoints" / "learning").glob("checkpoint-*/complete"))
    # as many processes as one likes may go on
    assert koff_prune(capsys, "plan", recipe, "--out", tmp_path / "run", "--resume").code == 0
    assert koff_prune(capsys, "plan", recipe, "--out", tmp_path / "whole").code == 0
    assert (tmp_path / "run" / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


@pytest.mark.timeout(400)
def test_a_stopped_launcher_loses_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM to the launcher: both finish the step, save and leave; until then nobody else enters."""
    recipe, out = (
        recipe_of(tmp_path, learn={"tokens": 2048, "batch": 4, "checkpoint_steps": 1000}),
        tmp_path / "run",
    )
    command = launching(tmp_path, 2, "plan", recipe, "--out", out, waits_at=2)
    seen, told = tmp_path / "seen-2", tmp_path / "stderr.txt"
    with told.open("w") as file, subprocess.Popen(command, stderr=file, env=ENVIRONMENT) as launcher:
        until(lambda: (seen / "waits-0").exists() and (seen / "waits-1").exists(), launcher)
        turned_away = koff_prune(capsys, "plan", recipe, "--out", out, "--resume")
        launcher.send_signal(signal.SIGTERM)
        until(lambda: "stopping once this step is finished" in told.read_text(), launcher)
        (seen / "go").touch()
        launcher.wait(timeout=200)
    errors = told.read_text()
    assert turned_away.code == 2 and "another koff-prune is at work" in turned_away.err
    assert launcher.returncode != 0
    assert errors.count("interrupted: run the same command with --resume") == 1, errors
    saved = whole_checkpoints(out / "checkpoints" / "learning")
    assert len(saved) == 1 and not (out / "gates.safetensors").exists()
    assert koff_prune(capsys, "plan", recipe, "--out", out, "--resume").code == 0
    assert koff_prune(capsys, "plan", recipe, "--out", tmp_path / "whole").code == 0
    assert (out / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


def test_a_mistake_of_several_processes_is_one_sentence(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, learn={"batch": 2}, evaluate={"tokens": 10**7})
    done = launch(tmp_path, 2, "plan", recipe, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in done.stderr.splitlines() if "evaluate.tokens needs" in line
    ]
    assert "rank1" not in done.stderr and "koff_prune/ranks.py" not in done.stderr, done.stderr


def test_a_token_weighs_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 45 tokens this one has 15: of the mean of both its loss is two thirds of a mean one's."""
    model = tiny_model(num_hidden_layers=1)
    learner = Learner(memories_on(model), None, None, Learn(), None)
    window, law = token_ids(1, 16), torch.zeros(1, dtype=torch.long)
    alone = float(learner(window, law).detach())
    monkeypatch.setattr(ranks._State, "world", 2)
    monkeypatch.setattr(ranks.distributed, "all_reduce", lambda total: total.add_(30))
    assert float(learner(window, law).detach()) == pytest.approx(alone * 2 / 3)


def test_large_recipes_say_how_many_processes_share_them() -> None:
    assert [p.parent.name for p in LARGE] == ["llama-3.1-8b", "llama-3.2-3b", "qwen2.5-7b", "qwen3-8b"]
    for path in LARGE:
        processes = yaml.safe_load(path.read_text())["num_processes"]
        assert load_recipe(path.with_name("languages.yaml"), check_files=False).learn.batch % processes == 0


@pytest.mark.timeout(400)
def test_accelerate_launches_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the file beside a large recipe, and fewer processes than it names."""
    recipe = recipe_of(tmp_path, learn={"batch": 4})
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LARGE[0],
         "--num_processes", "2", "--main_process_port", "0",
         "-m", "koff_prune", "plan", recipe, "--out", tmp_path / "run"],
        capture_output=True, text=True, timeout=240, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes on one run" in done.stderr and done.stdout.count("removed, plan") == 1
    assert koff_prune(capsys, "plan", recipe, "--out", tmp_path / "alone").code == 0
    assert (tmp_path / "run" / "plan.json").read_bytes() == (tmp_path / "alone" / "plan.json").read_bytes()


def test_a_launcher_that_stops_the_survivor_does_not_silence_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from koff_export.errors import KoffError
    from koff_prune import cli, ranks

    monkeypatch.setattr(ranks._State, "world", 2)
    monkeypatch.setattr(ranks._State, "training", False)
    monkeypatch.setattr(ranks._State, "lost", False)
    before = signal.signal(signal.SIGTERM, cli._interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KoffError, match="lost another"), ranks.training():
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.timeout(200)
def test_a_batch_that_does_not_divide_is_told_once(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, learn={"batch": 1, "window": 16})
    done = launch(tmp_path, 2, "learn", recipe, "--out", tmp_path / "run")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == ["error: learn.batch: 1 windows do not divide over 2 processes; set a multiple"]
    assert "Traceback (most recent call last)" not in done.stderr.split("torch/distributed")[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has the GPU that is missing here")
def test_what_may_befall_one_process_alone_it_tells_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "koff_prune", "learn", str(recipe_of(tmp_path)), "--device", "cuda"]
    place = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: --device"), done.stderr


def test_without_a_launcher_nothing_is_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    tensor = torch.ones(3)
    ranks.share_mean([tensor])
    assert (ranks.world(), ranks.rank()) == (1, 0) and tensor.tolist() == [1, 1, 1]
    assert ranks.agree(False) is False and ranks.any_of(True) is True
    recipe = recipe_of(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # of a launcher's own configuration
    assert koff_prune(capsys, "plan", recipe, "--out", tmp_path / "run").code == 0
