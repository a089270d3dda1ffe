"""kill -9 and full disks in every stage: no finished stage is lost, and every run ends alike."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from run_helpers import memory_bytes, recipe_of

from koff_export.bundle import check_files, open_manifest
from koff_export.files import check_safetensors, read_json, sha256_file
from koff_prune.plan import Plan

# What the end of each stage leaves behind, in their order.
LANDMARKS = {"read": "statistics.safetensors", "learn": "gates.safetensors", "cut": "backbone",
             "settle": "memories", "compare": "report.html", "export": "bundle"}  # fmt: skip
STAGES = list(LANDMARKS)
KEPT = ("domains", "statistics.safetensors", "gates.safetensors", "learned", "plan.json", "backbone",
        "memories", "bundle")  # fmt: skip
ONNX = {"formats": ["safetensors", "onnx"], "onnx": {"precision": ["fp32"]}}

# A disk of $2 kB at $1, in a namespace of its own: a run that fills it, what is left of that, and the run
# again with room. $3 is the recipe, $4 where both are copied to, $5 Python.
FULL = """
mount -t tmpfs -o size=$2k tmpfs "$1"
"$5" -m koff_prune apply "$3" --out "$1/run" --resume --threads 1; echo $? > "$4/code"
cp -a "$1/run" "$4/partial"
mount -o remount,size=4g "$1"
"$5" -m koff_prune apply "$3" --out "$1/run" --resume --threads 1 2> "$4/log" && cp -a "$1/run" "$4/whole"
"""

# Every process is forked from one that has imported everything: the moments lie in the stages.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["koff_prune.api", "koff_prune.cli", "koff_prune.learn"])


def koff_apply(recipe: str, out: str, log: str) -> None:
    """`koff-prune apply --resume` as the leader of a process group of its own; both streams go to `log`."""
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    from koff_prune.cli import main

    sys.argv = ["koff-prune", "apply", recipe, "--out", out, "--resume", "--threads", "1"]
    main()


def worked(pid: int | None) -> float:
    """Seconds of the processor that a process has had, all threads: a busy machine does not move them."""
    total = 0.0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            total += int(path.read_text().split()[0]) / 1e9
    return total


class Trial:
    """One run directory, its processes and what they have finished."""

    def __init__(self, place: Path, name: str) -> None:
        self.recipe, self.out, self.log = place / "recipe.yaml", place / name, place / f"{name}.log"
        self.finished: dict[Path, tuple[int, str]] = {}

    def begin(self) -> multiprocessing.process.BaseProcess:
        arguments = tuple(map(str, (self.recipe, self.out, self.log)))
        process = CONTEXT.Process(target=koff_apply, args=arguments)
        process.start()
        while process.is_alive() and os.getpgid(process.pid) != process.pid:  # type: ignore[arg-type]
            time.sleep(0.0005)
        return process

    def stage(self) -> str:
        """The stage that is being worked on."""
        return next((s for s in STAGES if not (self.out / LANDMARKS[s]).exists()), "done")

    def end(self) -> dict[str, float]:
        """Lets it end by itself; seconds of the processor that each stage took."""
        process, times, before, now = self.begin(), {}, 0.0, 0.0
        while process.is_alive():
            now = worked(process.pid) or now
            for name in (s for s in STAGES if s not in times and (self.out / LANDMARKS[s]).exists()):
                times[name], before = now - before, now
            time.sleep(0.002)
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return times

    def kill(self, after: str | None, delay: float) -> str:
        """Kills it `delay` seconds of its own work after the landmark of `after`; the stage that was hit."""
        process = self.begin()
        while process.is_alive() and after and not (self.out / LANDMARKS[after]).exists():
            time.sleep(0.001)
        begun = worked(process.pid)
        while process.is_alive() and worked(process.pid) < begun + delay:
            time.sleep(0.001)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        return self.stage() if process.exitcode else "done"

    def check(self) -> None:
        """What is there is whole, and what was finished before is as it was."""
        for path in self.files():
            if path.suffix == ".safetensors":
                check_safetensors(path)
            elif path.suffix == ".json":
                read_json(path)
        if (self.out / "plan.json").exists():
            Plan.load(self.out / "plan.json")
        if (self.out / "bundle").exists():
            check_files(self.out / "bundle", open_manifest(self.out / "bundle"))
        for path, (changed, digest) in self.finished.items():
            assert path.exists(), f"{path} was lost"
            assert path.stat().st_mtime_ns == changed, f"{path} was made again"
            assert sha256_file(path) == digest, f"{path} has changed"
        done = STAGES.index(self.stage()) if self.stage() != "done" else len(STAGES)
        # learned/ is finished once gates.safetensors says so
        kept = [k for k in KEPT if k != "learned" or done > STAGES.index("learn")]
        for path in self.files():
            if path.relative_to(self.out).parts[0] in kept:
                self.finished[path] = (path.stat().st_mtime_ns, sha256_file(path))

    def files(self) -> list[Path]:
        return [p for k in KEPT for p in sorted((self.out / k).rglob("*") if (self.out / k).is_dir() else
                [self.out / k]) if p.is_file() and ".tmp" not in str(p)]  # fmt: skip


def outcome(run: Path) -> dict[str, object]:
    """Everything that two runs of one recipe must agree on."""
    manifest = read_json(run / "bundle" / "koff.json")
    return {
        "plan": Plan.load(run / "plan.json").digest,
        "gates": sha256_file(run / "gates.safetensors"),
        "backbone": {p.name: sha256_file(p) for p in sorted((run / "backbone").iterdir())},
        "memories": {(kind, name): memory_bytes(run / kind, name)
                     for kind in ("learned", "memories") for name in ("law", "code")},
        "perplexity": [row["perplexity"] for row in read_json(run / "report.json")["rows"]],
        "bundle": manifest["files"],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("formats,trials", [("safetensors", 40), ("onnx", 12)])
def test_kills_at_random_moments(formats: str, trials: int, tmp_path: Path) -> None:
    """40 runs that end with a bundle for torch, and 12 whose long stage is the export of ONNX."""
    if formats == "onnx":
        recipe_of(tmp_path, export=ONNX)
    else:
        recipe_of(tmp_path, learn={"tokens": 1536, "settle_tokens": 768})
    whole = Trial(tmp_path, "whole")
    times = whole.end()
    expected = outcome(whole.out)
    chance = random.Random(formats)
    hits: Counter[str] = Counter()
    for n in range(trials):
        trial = Trial(tmp_path, f"trial-{n}")
        aim = STAGES[n % len(STAGES)] if formats == "safetensors" else "export"
        before = STAGES[STAGES.index(aim) - 1] if aim != "read" else None
        # a little beyond the stage's own length, so that its last moments are hit too
        hits[trial.kill(before, chance.uniform(0, 1.1) * times[aim])] += 1
        trial.check()
        for _ in range(chance.randrange(3)):
            hits[trial.kill(None, chance.uniform(0, 1) * sum(times.values()))] += 1
            trial.check()
        trial.end()
        trial.check()
        assert outcome(trial.out) == expected, f"trial {n} ended otherwise"
        left = [str(p) for p in trial.out.rglob("*") if p.name.startswith((".", "checkpoint-"))]
        assert left == [str(trial.out / ".lock")]
    print(json.dumps({"seconds": times, "killed in": hits, "kills": sum(hits.values()) - hits["done"]}))
    assert all(hits[stage] for stage in (STAGES if formats == "safetensors" else ["export"])), hits


@pytest.mark.slow
def test_disks_that_are_full(tmp_path: Path) -> None:
    """Real ones (tmpfs), full after any share of what a run writes: a sentence, and with room it goes on."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs unshare, and to be let mount a tmpfs in a namespace")
    recipe_of(tmp_path, learn={"tokens": 1536, "settle_tokens": 768}, export=ONNX)
    whole = Trial(tmp_path, "run")
    whole.end()
    expected = outcome(whole.out)
    files = {p.stat().st_ino: p.stat().st_blocks // 2 for p in whole.out.rglob("*") if p.is_file()}
    used = sum(files.values())  # a bundle shares the backbone's weights with its run
    hits: Counter[str] = Counter()
    for n, size in enumerate([*(used * n // 12 for n in range(1, 12)), used - 16, used - 4]):
        place, disk = tmp_path / f"disk-{n}", tmp_path / "mnt"
        place.mkdir()
        disk.mkdir(exist_ok=True)
        arguments = [disk, str(size), tmp_path / "recipe.yaml", place, sys.executable]
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", FULL, "sh", *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stderr, (place / "log").read_text())
        code = int((place / "code").read_text())
        told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert code == 2 and len(told) == 1 and "the disk is full" in told[0], done.stderr
        assert "Traceback" not in done.stderr
        trial = Trial(place, "partial")
        hits[trial.stage()] += 1
        trial.check()
        assert outcome(place / "whole") == expected, f"disk {n} ended otherwise"
        shutil.rmtree(place)
    print(json.dumps({"kB": used, "full in": hits}))
    assert len(hits) > 2, hits
