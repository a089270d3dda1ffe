"""Peak memory and time of plan, cut and export of a model that is larger than what may be in memory.

    python benchmarks/cut_memory.py [--config recipes/llama-3.2-3b/config.json] [--exact] [--onnx]
                                    [--precision int8] [--memory] [--keep FOLDER | --work FOLDER]
                                    [--out benchmarks/cut_memory.json]

Writes a random bfloat16 model of that shape, a tensor at a time, and runs the stages of `koff-prune` on it,
each in a process of its own: magnitude's plan at 12%, the cut (exact, and compensated under random second
moments), the export of the bundle, its verification. Memory is given as a ratio to the weights' bytes, time
as one to that of copying the same files. `anonymous` is memory that the system cannot take back; `resident`
counts the mapped pages of files too, which it can.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from koff_export.files import fsync_path
from koff_prune import api
from koff_prune.architecture import units_of_config
from koff_prune.bundling import verify
from koff_prune.reading import load_recipe
from koff_prune.run import versions
from koff_prune.weights import Weights, write_weights

WORDS = ["a", "model", "of", "many", "words", "that", "says", "nothing", "at", "all"]


def status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a function, and the memory of the whole process at its highest."""
    peak, done = [status("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(max(peak.pop(), status("RssAnon")))

    watcher = threading.Thread(target=watch)
    before = peak[0]
    watcher.start()
    begun = time.monotonic()
    try:
        work()
        seconds = time.monotonic() - begun
    finally:
        done.set()
        watcher.join()
    # as ru_maxrss, which a process inherits from the one that started it
    return {"seconds": seconds, "anonymous": peak[0], "anonymous_before": before, "resident": status("VmHWM")}


def write_model(config_file: Path, folder: Path) -> None:
    """Random bfloat16 weights of a config's shape, and a tokenizer of a few words."""
    folder.mkdir(parents=True)
    config = AutoConfig.from_pretrained(config_file)
    with torch.device("meta"):
        like = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    if config.tie_word_embeddings:
        del like["lm_head.weight"]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, empty in like.items():
            yield name, torch.empty(empty.shape, dtype=empty.dtype).normal_(0, 0.02, generator=generator)

    write_weights(folder, like, tensors())
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", *WORDS])}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    for n in range(40):
        (folder.parent / "words").mkdir(exist_ok=True)
        (folder.parent / "words" / f"{n}.txt").write_text(" ".join(random.Random(n).choices(WORDS, k=40)))


def write_moments(folder: Path, config_file: Path) -> None:
    """statistics.safetensors as a run leaves it, of the second moments alone; every layer has the same."""
    units = units_of_config(AutoConfig.from_pretrained(config_file).to_dict())
    width = units.layers[0].ffn_neurons
    x = torch.randn(1024, width, generator=torch.Generator().manual_seed(1))
    second, count = x.T @ x, torch.ones((), dtype=torch.float32)
    names = [f"second.{i}.ffn_neurons" for i in range(len(units.layers))]
    like = {**dict.fromkeys(names, second), "tokens": count}
    folder.mkdir(exist_ok=True)
    write_weights(folder, like, ((n, like[n]) for n in like), 1 << 62)
    (folder / "model.safetensors").rename(folder / "statistics.safetensors")


def recipe(folder: Path, compensate: str, export: dict[str, Any], memory: bool) -> Path:
    """Magnitude pruning of FFN neurons: no text is scored on, and at most a memory is trained, for a step."""
    path = folder / f"{compensate}.yaml"
    path.write_text(
        "version: 1\n"
        "model: {source: model, dtype: bfloat16}\n"
        "domains: {words: {source: words}}\n"
        "structure: {units: [ffn_neurons], sparsity: 0.12, round_to: 64}\n"
        f"cut: {{compensate: {compensate}}}\n"
        + ("" if memory else "memory: {lora: none, kv: none}\n")
        + f"learn: {{tokens: {16 if memory else 0}, settle_tokens: 0, window: 16,"
        " gates: {form: straight_through, start: magnitude}}\n"
        "scoring: {tokens: 16, window: 16}\n"
        "evaluate: {tokens: 16, window: 16}\n"
        f"export: {json.dumps(export)}\n"
    )
    return path


def copying(source: Path, target: Path) -> float:
    """Seconds of copying a folder's files and syncing them, as every stage syncs what it writes."""
    begun = time.monotonic()
    shutil.copytree(source, target)
    for file in target.iterdir():
        fsync_path(file)
    seconds = time.monotonic() - begun
    shutil.rmtree(target)
    return seconds


def stage(name: str, path: Path, out: Path) -> dict[str, float]:
    """One stage in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--stage", name, "--recipe", str(path), "--run", str(out)],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Makes the model, runs every stage, writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("recipes/llama-3.2-3b/config.json"))
    parser.add_argument(
        "--exact", action="store_true", help="without the compensated cut and its second moments"
    )
    parser.add_argument("--onnx", action="store_true", help="export the graph too, in float32")
    parser.add_argument("--precision", action="append", default=[], choices=["fp16", "int8", "int4"],
                        help="of more graphs, portable and fused; repeatable, with --onnx")  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="with a memory, trained for one step")
    parser.add_argument("--work", type=Path, help="a folder with about 25 GB free, made where there is none")
    parser.add_argument("--keep", type=Path, help="a new folder that keeps the model and its run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cut_memory.json"))
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stage:
        checked = load_recipe(asked.recipe)

        def work() -> Any:
            if asked.stage == "verify":
                return verify(asked.run / "bundle")
            return getattr(api, asked.stage)(checked, asked.run, resume=True)

        print(json.dumps(measured(work)))
        return
    config_file = asked.config.resolve()
    export: dict[str, Any] = {"formats": ["safetensors", "onnx"] if asked.onnx else ["safetensors"]}
    if asked.precision:
        export["onnx"] = {"precision": ["fp32", *asked.precision], "profiles": ["portable", "fused"],
                          "int4_rounding": "nearest"}  # fmt: skip
    keeping = asked.keep is not None
    if asked.work is not None:
        asked.work.mkdir(parents=True, exist_ok=True)
    with nullcontext(asked.keep) if keeping else tempfile.TemporaryDirectory(dir=asked.work) as place:
        folder = Path(place)
        write_model(config_file, folder / "model")
        weights = Weights.open(folder / "model")
        total = sum(file.stat().st_size for file in weights.files)
        copies = [copying(folder / "model", folder / "copy")]
        results: dict[str, Any] = {}
        for compensate in ("none",) if asked.exact else ("none", "least_squares"):
            path, out = recipe(folder, compensate, export, asked.memory), folder / f"run-{compensate}"
            if asked.memory:
                results[f"learn, {compensate}"] = stage("learn", path, out)
            results[f"plan, {compensate}"] = stage("plan", path, out)
            if compensate == "least_squares":
                write_moments(out, config_file)
            results[f"cut, {compensate}"] = stage("cut", path, out)
            copies.append(copying(folder / "model", folder / "copy"))
            if compensate == "none":
                results["export"] = stage("export", path, out)
                largest = max(f.stat().st_size for f in (out / "bundle").rglob("*") if f.is_file())
                results["verify"] = stage("verify", path, out)
            if not keeping:
                shutil.rmtree(out)
        copied = sum(copies) / len(copies)
        told = {
            name: {
                "anonymous_peak_ratio": round(found["anonymous"] / total, 3),
                "resident_peak_ratio": round(found["resident"] / total, 3),
                "anonymous_peak_gb": round(found["anonymous"] / 1e9, 2),
                "anonymous_after_imports_gb": round(found["anonymous_before"] / 1e9, 2),
                "seconds": round(found["seconds"], 1),
                "seconds_ratio_to_copying": round(found["seconds"] / copied, 2),
            }
            for name, found in results.items()
        }
    result = {
        "command": " ".join(["python", "benchmarks/cut_memory.py", *sys.argv[1:]]),
        "config": str(asked.config),
        "weights_gb": round(total / 1e9, 2),
        "largest_exported_file_gb": round(largest / 1e9, 2),
        "copying_seconds": [round(c, 1) for c in copies],
        "stages": told,
        "cut_and_export_to_copying": round(
            (results["cut, none"]["seconds"] + results["export"]["seconds"]) / copied, 2
        ),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[1], 1),
        "versions": versions(),
    }
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["stages"], indent=2))


if __name__ == "__main__":
    main()
