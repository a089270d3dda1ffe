"""Size and speed of a bundle beside the dense model in the same formats: ratios within one run.

python benchmarks/bundle_speed.py RUN [--tokens 32] [--repeat 3]

RUN is a finished run whose bundle holds ONNX graphs. The dense model is exported with its slots and
precisions into RUN/dense-onnx, once. Every session runs in its own process, on the same threads, slim and
dense in turns. Where RUN also has bundle-<first domain>/ (export --merge), that stands beside them. Writes
benchmarks/bundle_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPTS = (16, 512)


def measure(graph: str, adapter: str | None, tokens: int) -> dict[str, float]:
    """Opens one graph and times it: prefill and decode in tokens/s, opening a memory in ms."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    begun = time.perf_counter()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found: dict[str, float] = {"open_s": time.perf_counter() - begun}
    run = ort.RunOptions()
    if adapter:
        begun = time.perf_counter()
        loaded = ort.LoraAdapter()
        loaded.Load(adapter)
        run.add_active_adapter(loaded)
        found["swap_ms"] = (time.perf_counter() - begun) * 1e3
    empty = {
        i.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32))
        for i in session.get_inputs() if i.name.startswith("past_key_values")
    }  # fmt: skip
    outputs = [o.name for o in session.get_outputs()]

    def call(ids: Any, at: int, past: dict[str, Any]) -> dict[str, Any]:
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, at + ids.shape[1]), np.int64),
            "position_ids": np.arange(at, at + ids.shape[1])[None],
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        result = session.run_with_ort_values(outputs, {**values, **past}, run)
        return dict(zip(past, result[1:], strict=True))

    call(np.ones((1, 4), np.int64), 0, empty)
    for prompt in PROMPTS:
        ids = np.random.default_rng(0).integers(3, 250, (1, prompt))
        begun = time.perf_counter()
        past = call(ids, 0, empty)
        found[f"prefill_{prompt}"] = prompt / (time.perf_counter() - begun)
        begun = time.perf_counter()
        for n in range(tokens):
            past = call(ids[:, :1], prompt + n, past)
        found[f"decode_{prompt}"] = tokens / (time.perf_counter() - begun)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        found["peak_mb"] = int(line.split()[1]) / 1024
    return found


def in_a_process(graph: Path, adapter: Path | None, tokens: int) -> dict[str, float]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", graph, adapter or "none", "--tokens", str(tokens)]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(answer.stdout)
    return result


def size_mb(graph: Path) -> float:
    """Of a graph with the data beside it."""
    return sum(p.stat().st_size for p in graph.parent.glob(f"{graph.name}*")) / 1e6


def dense_graphs(run: Path) -> dict[str, Path]:
    """The dense model's graphs with the slots and precisions of the run's bundle."""
    from koff_export.bundle import open_manifest
    from koff_export.onnx import export_onnx
    from koff_export.quantize import quantize
    from koff_prune.run import finished_run

    graph = open_manifest(run / "bundle").graph
    assert graph is not None
    folder = run / "dense-onnx"
    modules = [i.removesuffix(".lora_A.weight") for i in graph.inputs if i.endswith(".lora_A.weight")]
    if not (folder / "onnx" / "model.onnx").exists():
        with finished_run(run) as opened:
            export_onnx(opened.dense.model, folder, lora_modules=modules, progress=print)
    paths = {name: folder / path for name, path in graph.precisions.items()}
    for name, path in paths.items():
        if not path.exists():
            quantize(folder / "onnx/model.onnx", path, {"int8": 8, "int4": 4}[name])
    return paths


def compare(run: Path, tokens: int, repeat: int) -> dict[str, Any]:
    """Medians of every measure, and slim beside dense."""
    from koff_export.bundle import open_manifest

    manifest = open_manifest(run / "bundle")
    assert manifest.graph is not None
    name, told = next(iter(manifest.domains.items()))
    adapter = run / "bundle" / str(told.adapter)
    dense = dense_graphs(run)
    result: dict[str, Any] = {
        "parameters": manifest.parameters,
        "arithmetic": manifest.parameters["dense"] / manifest.parameters["slim"],
        "memory": name,
        "adapter_mb": adapter.stat().st_size / 1e6,
        "precision": {},
    }
    for precision, path in manifest.graph.precisions.items():
        slim = run / "bundle" / path
        cases = {"dense": (dense[precision], None), "slim": (slim, None), "slim+memory": (slim, adapter)}
        merged = run / f"bundle-{name}" / path
        if merged.exists():
            cases["merged"] = (merged, None)
        taken: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(repeat):
            for case, (graph, memory) in cases.items():
                taken[case].append(in_a_process(graph, memory, tokens))
        table = {
            case: {key: round(statistics.median(t[key] for t in rows), 2) for key in rows[0]}
            | {"file_mb": round(size_mb(cases[case][0]), 3)}
            for case, rows in taken.items()
        }
        ratios = {
            f"{case}/dense": {key: round(row[key] / table["dense"][key], 3) for key in table["dense"]}
            for case, row in table.items() if case != "dense"
        }  # fmt: skip
        if "merged" in table:
            ratios["slim+memory/merged"] = {
                key: round(table["slim+memory"][key] / table["merged"][key], 3) for key in table["merged"]
            }
        result["precision"][precision] = {"medians": table, "ratios": ratios}
    return result


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        graph, adapter = args.measure
        print(json.dumps(measure(graph, None if adapter == "none" else adapter, args.tokens)))
        return
    found = compare(args.run, args.tokens, args.repeat)
    found["prompts"] = PROMPTS
    found["command"] = " ".join(["python benchmarks/bundle_speed.py", args.run.name, *sys.argv[2:]])
    (HERE / "bundle_speed.json").write_text(json.dumps(found, indent=1) + "\n")
    for precision, part in found["precision"].items():
        for pair, ratios in part["ratios"].items():
            print(precision, pair, {k: v for k, v in ratios.items() if not k.startswith("open")})


if __name__ == "__main__":
    main()
