"""Size and speed of a bundle beside the dense model in the same formats: ratios within one run.

python benchmarks/bundle_speed.py RUN [--tokens 32] [--rounds 5] [--precision int4] [--threads N] [--genai]

RUN is a finished run whose bundle holds ONNX graphs, best of both profiles and all precisions. The dense
model is exported with the same slots, profiles and precisions into RUN/dense-onnx, once. Where RUN also has
bundle-<first domain>/ (export --merge), that stands beside them; with --genai, onnxruntime-genai's own int4
build of the dense model too, run by onnxruntime-genai.

What is compared is open in one process and takes turns every few tokens, so that whatever disturbs the
machine disturbs all alike; ratios are taken round by round, and their median is told. Slots are alike on both
sides: dense and slim have them, and they are empty. Writes benchmarks/bundle_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPTS = (16, 512)
BATCHES = (1, 8)
TURN = 4  # tokens before the next one is at it
BITS = {"fp16": 16, "int8": 8, "int4": 4}

# A bundle, profile, precision and memory; or a folder that onnxruntime-genai opens, and three times nothing.
Case = tuple[str, str | None, str | None, str | None]


class Graph:
    """One open graph, with a memory or without, as `koff-run` runs it."""

    def __init__(self, folder: str, profile: str, precision: str, memory: str | None, threads: int) -> None:
        """Opens it; how long that took is in `told`."""
        import numpy as np

        from koff_export.runtime import Runtime

        self.np, self.memory = np, memory
        begun = time.perf_counter()
        self.runtime = Runtime.open(folder, precision, verify=False, threads=threads or None, profile=profile)
        self.told = {"open_s": time.perf_counter() - begun}
        if memory:
            begun = time.perf_counter()
            self.runtime.memory(memory)
            self.told["swap_ms"] = (time.perf_counter() - begun) * 1e3

    def prefill(self, prompt: int) -> None:
        """Reads a prompt of so many tokens, one row."""
        self.cache, self.length, self.batch = self.runtime.cache(self.memory), 0, 1
        self._call(self.np.random.default_rng(0).integers(3, 250, (1, prompt)))

    def widen(self, batch: int) -> None:
        """Makes the text so many equal ones."""
        one, self.batch = self.cache, batch
        self.cache = self.runtime.cache(self.memory, batch)
        self.cache.join([one] * batch)

    def decode(self, tokens: int) -> None:
        """Reads so many more, one at a time."""
        for _ in range(tokens):
            self._call(self.np.full((self.batch, 1), 5))

    def _call(self, ids: Any) -> None:
        end = self.length + ids.shape[1]
        positions = self.np.arange(self.length, end)[None].repeat(len(ids), 0)
        self.cache.read(ids.astype(self.np.int64), self.np.ones((len(ids), end), self.np.int64), positions)
        self.length = end


class Genai:
    """The same for a folder that onnxruntime-genai opens."""

    def __init__(self, folder: str, threads: int) -> None:
        """Opens it."""
        import numpy as np
        import onnxruntime_genai as genai

        self.np, self.genai, self.told = np, genai, {}
        config = genai.Config(folder)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = genai.Model(config)

    def prefill(self, prompt: int) -> None:
        """Reads a prompt of so many tokens, one row."""
        self.prompt = self.np.random.default_rng(0).integers(3, 250, (1, prompt)).astype(self.np.int32)
        self.widen(1)

    def widen(self, batch: int) -> None:
        """Makes the text so many equal ones."""
        settings = self.genai.GeneratorParams(self.model)
        limit = self.prompt.shape[1] + 1024
        settings.set_search_options(do_sample=False, max_length=limit, min_length=limit, batch_size=batch)
        self.generator = self.genai.Generator(self.model, settings)
        self.generator.append_tokens(self.prompt.repeat(batch, 0))

    def decode(self, tokens: int) -> None:
        """Reads so many more, one at a time."""
        for _ in range(tokens):
            self.generator.generate_next_token()


def race(cases: dict[str, Case], tokens: int, rounds: int, threads: int) -> list[dict[str, dict[str, float]]]:
    """Seconds by case and measure, of every round. All cases are open at once and take turns."""
    opened: dict[str, Any] = {
        name: Graph(folder, profile, precision, memory, threads)
        if profile and precision
        else Genai(folder, threads)
        for name, (folder, profile, precision, memory) in cases.items()
    }

    def timed(row: dict[str, float], key: str, work: Callable[[], None]) -> None:
        begun = time.perf_counter()
        work()
        row[key] = row.get(key, 0.0) + time.perf_counter() - begun

    for case in opened.values():
        case.prefill(4)
        case.decode(2)
    found = []
    for n in range(rounds):
        rows: dict[str, dict[str, float]] = {name: {} for name in opened}
        order = list(opened.items())[:: 1 if n % 2 else -1]  # nobody is always behind the same one
        for prompt in PROMPTS:
            for name, case in order:
                timed(rows[name], f"prefill_{prompt}", partial(case.prefill, prompt))
            for batch in BATCHES:
                for _, case in order:
                    case.prefill(prompt)
                    case.widen(batch)
                    case.decode(1)
                for _ in range(0, tokens, TURN):
                    for name, case in order:
                        timed(rows[name], f"decode_{prompt}x{batch}", partial(case.decode, TURN))
        found.append(rows)
    return found


def footprint(case: Case, threads: int) -> dict[str, float]:
    """Seconds to open a graph, milliseconds to open a memory, and the process's peak of memory."""
    folder, profile, precision, memory = case
    graph = Graph(folder, str(profile), str(precision), memory, threads)
    graph.prefill(16)
    graph.decode(2)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        graph.told["peak_mb"] = int(line.split()[1]) / 1024
    return graph.told


def in_a_process(kind: str, *arguments: Any) -> Any:
    """`race` or `footprint` in a fresh interpreter."""
    command = [sys.executable, __file__, "--child", json.dumps([kind, *arguments])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def size_mb(case: Case) -> float:
    """Of a graph and all the files that its weights lie in."""
    from koff_export.bundle import open_manifest
    from koff_export.graph import check_onnx

    folder, profile, precision, _ = case
    graph = open_manifest(Path(folder)).graph
    assert graph is not None
    path = Path(folder) / graph.profiles[str(profile)][str(precision)]
    return sum(p.stat().st_size for p in (path, *check_onnx(path, Path(folder)))) / 1e6


def dense_graphs(run: Path) -> Path:
    """The dense model with the slots, profiles and precisions of the run's bundle: a bundle of its own."""
    from koff_export.bundle import open_manifest, write_manifest
    from koff_export.fused import export_fused
    from koff_export.onnx import export_onnx
    from koff_export.quantize import quantize
    from koff_prune.run import finished_run

    slim = open_manifest(run / "bundle")
    graph = slim.graph
    assert graph is not None
    folder = run / "dense-onnx"
    if (folder / "koff.json").exists():
        there = open_manifest(folder).graph
        if there and (there.profiles, there.inputs) == (graph.profiles, graph.inputs):
            return folder
    modules = [i.removesuffix(".lora_A.weight") for i in graph.inputs if i.endswith(".lora_A.weight")]
    portable = folder / graph.precisions["fp32"]
    with finished_run(run) as opened:
        model = opened.dense.model.float()
        info = export_onnx(model, folder, lora_modules=modules, progress=print)
        if graph.fused:
            export_fused(model, folder / graph.fused["fp32"], portable)
        if graph.in_place:
            export_fused(model, folder / graph.in_place["fp32"], folder / graph.fused["fp32"], in_place=True)
    for name in graph.precisions.keys() - {"fp32"}:
        beside = None
        for table in graph.profiles.values():
            quantize(folder / table["fp32"], folder / table[name], BITS[name], beside)
            beside = folder / table[name]
    paths = {"precisions": graph.precisions, "fused": graph.fused, "in_place": graph.in_place}
    told = {**vars(info), **{key: table for key, table in paths.items() if table}}
    write_manifest(folder, {
        "window": slim.window, "bos": slim.bos, "eos": slim.eos, "domains": {}, "graph": told,
    })  # fmt: skip
    return folder


def genai_build(run: Path) -> Path:
    """Onnxruntime-genai's own int4 build of the dense model, made once."""
    from koff_prune.run import finished_run

    folder, source = run / "dense-genai", run / "dense-hf"
    if not (folder / "genai_config.json").exists():
        from koff_prune.cut import save_backbone

        source.mkdir(exist_ok=True)
        with finished_run(run) as opened:
            save_backbone(opened.dense.model, source)
            opened.dense.tokenizer.save_pretrained(source)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder]
        command += ["-p", "int4", "-e", "cpu", "-c", run / "genai-cache"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return folder


def first_token(bundle: Path, precision: str, rounds: int) -> dict[str, float]:
    """Seconds from `koff-run` to its end after one token, imports and checks of the files included."""
    from koff_export.bundle import open_manifest

    manifest = open_manifest(bundle)
    assert manifest.graph is not None
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for profile in manifest.graph.profiles:
            for check in ((), ("--no-verify",)):
                command = [sys.executable, "-m", "koff_export.cli", str(bundle), "--profile", profile, *check]
                command += ["--precision", precision, "--prompt", "The", "--max-new-tokens", "1"]
                begun = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                name = " ".join([profile, *check])
                found.setdefault(name, []).append(time.perf_counter() - begun)
    return {name: round(statistics.median(seconds), 3) for name, seconds in found.items()}


def tell(rounds: list[dict[str, dict[str, float]]], tokens: int) -> dict[str, Any]:
    """Median tokens/s by case, and the median of the ratios to every other case that a claim is about."""
    cases, keys = list(rounds[0]), list(next(iter(rounds[0].values())))
    first = cases[0]

    def amount(key: str) -> float:
        kind, _, rest = key.partition("_")
        prompt, _, batch = rest.partition("x")
        return float(prompt) if kind == "prefill" else -(-tokens // TURN) * TURN * float(batch)

    def ratio(a: str, b: str, key: str) -> float:
        return round(statistics.median(row[b][key] / row[a][key] for row in rounds), 3)

    pairs = [(case, first) for case in cases[1:]]
    if "merged" in cases:
        pairs.append(("slim+memory", "merged"))
    return {
        "tokens_per_s": {
            case: {key: round(amount(key) / statistics.median(row[case][key] for row in rounds), 2)
                   for key in keys} for case in cases
        },
        "ratios": {f"{a}/{b}": {key: ratio(a, b, key) for key in keys} for a, b in pairs},
    }  # fmt: skip


def compare(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every race, precision by precision."""
    from koff_export.bundle import open_manifest

    manifest = open_manifest(run / "bundle")
    assert manifest.graph is not None
    name, told = next(iter(manifest.domains.items()))
    dense = str(dense_graphs(run))
    genai = genai_build(run) if args.genai else None
    result: dict[str, Any] = {
        "parameters": manifest.parameters,
        "arithmetic": manifest.parameters["dense"] / manifest.parameters["slim"],
        "memory": {"name": name, "lora_rank": told.lora_rank, "kv_tokens": told.kv_tokens},
        "first_token_s": {},
        "races": {},
        "footprint": {},
    }
    slim, merged = str(run / "bundle"), run / f"bundle-{name}"
    for precision in args.precision or manifest.graph.precisions:
        races: dict[str, dict[str, Case]] = {}
        for profile in manifest.graph.profiles:
            races[profile] = {
                "dense": (dense, profile, precision, None),
                "slim": (slim, profile, precision, None),
                "slim+memory": (slim, profile, precision, name),
            }
            if (merged / "koff.json").exists():
                races[profile]["merged"] = (str(merged), profile, precision, None)
            result["footprint"][f"{precision} {profile}"] = {
                label: {"file_mb": size_mb(case), **in_a_process("footprint", case, args.threads)}
                for label, case in races[profile].items()
            }
        if len(races) > 1:
            races["profiles"] = {profile: races[profile]["slim"] for profile in manifest.graph.profiles}
            if genai and precision == "int4":
                best = [*manifest.graph.profiles][-1]
                ours = {f"{best} {label}": case for label, case in races[best].items()}
                races["genai"] = {"genai dense": (str(genai), None, None, None), **ours}
        for race_name, cases in races.items():
            rounds = in_a_process("race", cases, args.tokens, args.rounds, args.threads)
            found = result["races"][f"{precision} {race_name}"] = tell(rounds, args.tokens)
            for pair, ratios in found["ratios"].items():
                print(precision, race_name, pair, ratios, flush=True)
        result["first_token_s"][precision] = first_token(run / "bundle", precision, args.rounds)
        print(precision, "first token after", result["first_token_s"][precision], flush=True)
    return result


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", action="append", help="only this one; repeatable")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; default: its own choice")
    parser.add_argument("--genai", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *arguments = json.loads(args.child)
        print(json.dumps({"race": race, "footprint": footprint}[kind](*arguments)))
        return
    found = compare(args.run, args)
    found |= {"prompts": PROMPTS, "batches": BATCHES, "threads": args.threads}
    found["command"] = " ".join(["python benchmarks/bundle_speed.py", args.run.name, *sys.argv[2:]])
    (HERE / "bundle_speed.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
