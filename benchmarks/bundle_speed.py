"""Size and speed of a bundle beside the dense model in the same formats: ratios within one run.

python benchmarks/bundle_speed.py RUN [--tokens 32] [--rounds 5] [--precision int4] [--threads N] [--engine E]

RUN is a finished run whose bundle holds ONNX graphs, best of both profiles and all precisions. The dense
model is exported with the same slots, profiles and precisions into RUN/dense-onnx, once; both are raced in
torch and, as GGUF files of the type next to the precision, in llama.cpp, where a memory is its LoRA alone.
Where RUN also has bundle-<first domain>/ (export --merge), that stands beside them; and onnxruntime-genai's
own int4 build of the dense model, run by onnxruntime-genai.

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
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from engines import ENGINES, Case, opened

HERE = Path(__file__).parent
PROMPTS = (16, 512)
BATCHES = (1, 8)
TURN = 4  # tokens before the next one is at it
GGUF = {
    "fp32": "f32",
    "fp16": "f16",
    "int8_dynamic": "q8_0",
    "int4": "q4_0",
}  # the type that stands for a precision


def race(
    cases: dict[str, Case], tokens: int, rounds: int, threads: int, prompts: list[int], batches: list[int]
) -> list[dict[str, dict[str, float]]]:
    """Seconds by case and measure, of every round. All cases are open at once and take turns."""
    engines = {name: opened(case, threads) for name, case in cases.items()}

    def timed(row: dict[str, float], key: str, work: Callable[[], None]) -> None:
        begun = time.perf_counter()
        work()
        row[key] = row.get(key, 0.0) + time.perf_counter() - begun

    for case in engines.values():
        case.prefill(4)
        case.decode(2)
    found = []
    for n in range(rounds):
        rows: dict[str, dict[str, float]] = {name: {} for name in engines}
        order = list(engines.items())[:: 1 if n % 2 else -1]  # nobody is always behind the same one
        for prompt in prompts:
            for name, case in order:
                timed(rows[name], f"prefill_{prompt}", partial(case.prefill, prompt))
            for batch in batches:
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
    """Seconds to open a case, milliseconds to open an ONNX memory, and the process's peak of memory."""
    engine = opened(case, threads)
    engine.prefill(16)
    engine.decode(2)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        engine.told["peak_mb"] = int(line.split()[1]) / 1024
    return engine.told


def in_a_process(kind: str, cases: dict[str, Case], *arguments: Any) -> Any:
    """`race`, or `footprint` of each case, in a fresh interpreter."""
    told = json.dumps([kind, {name: asdict(case) for name, case in cases.items()}, *arguments])
    command = [sys.executable, __file__, "--child", told]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def as_a_child(told: str) -> Any:
    """The other side of `in_a_process`."""
    kind, cases, *arguments = json.loads(told)
    opened_later = {name: Case(**case) for name, case in cases.items()}
    if kind == "race":
        return race(opened_later, *arguments)
    (case,) = opened_later.values()
    return footprint(case, *arguments)


def size_mb(case: Case) -> float:
    """Of the files that its weights lie in, the memory's apart."""
    from koff_export.bundle import open_manifest
    from koff_export.graph import check_onnx

    path = Path(case.path)
    if case.engine == "onnx":
        graph = open_manifest(path).graph
        assert graph is not None
        file = path / graph.profiles[str(case.profile)][str(case.precision)]
        return sum(p.stat().st_size for p in (file, *check_onnx(file, path))) / 1e6
    return sum(p.stat().st_size for p in (path.glob("*.safetensors") if path.is_dir() else [path])) / 1e6


def dense_graphs(run: Path) -> Path:
    """The dense model with the slots, profiles and precisions of the run's bundle: a bundle of its own."""
    from koff_export.bundle import open_manifest, write_manifest
    from koff_export.fused import export_fused
    from koff_export.onnx import export_onnx
    from koff_export.quantize import BITS, INT4_KEEPS, quantize
    from koff_prune.rounding import round_matrices
    from koff_prune.run import finished_run

    slim = open_manifest(run / "bundle")
    graph = slim.graph
    assert graph is not None
    folder = run / "dense-onnx"
    asked = slim.numerics.get("asked", {})
    stamp = {"onnx": asked.get("export", {}).get("onnx"), "graphs": asked.get("graphs")}
    if (folder / "koff.json").exists():
        found = open_manifest(folder)
        there = found.graph
        same = there and (there.profiles, there.inputs) == (graph.profiles, graph.inputs)
        if same and found.numerics.get("asked") == stamp:
            return folder
    modules = [i.removesuffix(".lora_A.weight") for i in graph.inputs if i.endswith(".lora_A.weight")]
    portable = folder / graph.precisions["fp32"]
    with finished_run(run) as found:
        read = {name: blocks.scoring for name, blocks in found.domains.items()}
        model = found.dense.model.float()
        info = export_onnx(model, folder, lora_modules=modules)
        if graph.fused:
            export_fused(model, folder / graph.fused["fp32"], portable)
        if graph.in_place:
            export_fused(model, folder / graph.in_place["fp32"], folder / graph.fused["fp32"], in_place=True)
    onnx = stamp["onnx"] or {}
    keeps, rounded = onnx.get("int4_keeps", INT4_KEEPS), None
    if "int4" in graph.precisions and onnx.get("int4_rounding", "gptq") == "gptq":  # as the slim one is
        rounded = round_matrices(dense_backbone(run), read, keeps)
    for name in graph.precisions.keys() & BITS.keys():
        beside = None
        for table in graph.profiles.values():
            quantize(folder / table["fp32"], folder / table[name], BITS[name], beside, keeps, rounded)
            beside = folder / table[name]
    paths = {"precisions": graph.precisions, "fused": graph.fused, "in_place": graph.in_place}
    told = {**vars(info), **{key: table for key, table in paths.items() if table}}
    write_manifest(folder, {
        "window": slim.window, "bos": slim.bos, "eos": slim.eos, "domains": {}, "graph": told,
        "numerics": {"asked": stamp},
    })  # fmt: skip
    return folder


def dense_backbone(run: Path) -> Path:
    """The dense model as transformers saves it, made once."""
    from koff_prune.cut import save_backbone
    from koff_prune.run import finished_run

    folder = run / "dense-hf"
    if not (folder / "config.json").exists():
        folder.mkdir(exist_ok=True)
        with finished_run(run) as found:
            found.dense.tokenizer.save_pretrained(folder)
            save_backbone(found.dense.model, folder)
    return folder


def genai_build(run: Path) -> Path:
    """Onnxruntime-genai's own int4 build of the dense model, made once."""
    folder = run / "dense-genai"
    if not (folder / "genai_config.json").exists():
        source = dense_backbone(run)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder]
        command += ["-p", "int4", "-e", "cpu", "-c", run / "genai-cache"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return folder


def gguf_cases(run: Path, precision: str, memory: str) -> dict[str, Case]:
    """Dense and slim as GGUF files of one type, and the LoRA of a memory, made once."""
    from transformers import AutoTokenizer

    from koff_export.gguf import export_gguf
    from koff_prune import load_backbone
    from koff_prune.formats import write_gguf_memory

    folder, kind = run / "speed-gguf", GGUF[precision]
    folder.mkdir(exist_ok=True)
    lora, arch = folder / f"{memory}.gguf", ""
    for name, source in (("dense", dense_backbone(run)), ("slim", run / "bundle")):
        if not (file := folder / f"{name}-{kind}.gguf").exists() or not lora.exists():
            model, tokenizer = load_backbone(source), AutoTokenizer.from_pretrained(source)
            arch = export_gguf(model, tokenizer, file, kind)
    if not lora.exists():
        write_gguf_memory(model, arch, run / "bundle" / "memories" / memory, lora)
    dense, slim = (str(folder / f"{name}-{kind}.gguf") for name in ("dense", "slim"))
    return {
        "dense": Case("gguf", dense),
        "slim": Case("gguf", slim),
        "slim+LoRA": Case("gguf", slim, str(lora)),
    }


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


def compare(run: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every race, precision by precision: what is known after each."""
    from koff_export.bundle import open_manifest

    manifest = open_manifest(run / "bundle")
    assert manifest.graph is not None
    memory, told = next(iter(manifest.domains.items()))
    result: dict[str, Any] = {
        "parameters": manifest.parameters,
        "arithmetic": manifest.parameters["dense"] / manifest.parameters["slim"],
        "memory": {"name": memory, "lora_rank": told.lora_rank, "kv_tokens": told.kv_tokens},
        "first_token_s": {},
        "races": {},
        "footprint": {},
    }
    for precision in args.precision or manifest.graph.precisions:
        for race_name, cases in races_of(run, precision, memory, args.engine or ENGINES).items():
            if race_name in manifest.graph.profiles and args.profile and race_name not in args.profile:
                continue
            if race_name not in ("profiles", "genai"):  # those are made of the others' cases
                result["footprint"][f"{precision} {race_name}"] = {
                    label: {
                        "file_mb": size_mb(case),
                        **in_a_process("footprint", {label: case}, args.threads),
                    }
                    for label, case in cases.items()
                }
            how = (args.tokens, args.rounds, args.threads, args.prompt or PROMPTS, args.batch or BATCHES)
            rounds = in_a_process("race", cases, *how)
            found = result["races"][f"{precision} {race_name}"] = tell(rounds, args.tokens)
            for pair, ratios in found["ratios"].items():
                print(precision, race_name, pair, ratios, flush=True)
            yield result
        if not args.engine or "onnx" in args.engine:
            result["first_token_s"][precision] = first_token(run / "bundle", precision, args.rounds)
            print(precision, "first token after", result["first_token_s"][precision], flush=True)
            yield result


def races_of(run: Path, precision: str, memory: str, engines: Collection[str]) -> dict[str, dict[str, Case]]:
    """Who races whom at one precision, race by race; the first is who the others are told beside."""
    from koff_export.bundle import open_manifest

    slim, merged = str(run / "bundle"), run / f"bundle-{memory}"
    graph = open_manifest(run / "bundle").graph
    assert graph is not None
    races: dict[str, dict[str, Case]] = {}
    if "onnx" in engines:
        dense = str(dense_graphs(run))
        for profile in graph.profiles:
            races[profile] = {
                "dense": Case("onnx", dense, None, profile, precision),
                "slim": Case("onnx", slim, None, profile, precision),
                "slim+memory": Case("onnx", slim, memory, profile, precision),
            }
            if (merged / "koff.json").exists():
                races[profile]["merged"] = Case("onnx", str(merged), None, profile, precision)
        if len(races) > 1:
            best = [*races][-1]
            ours = {f"{best} {label}": case for label, case in races[best].items()}
            races["profiles"] = {profile: races[profile]["slim"] for profile in graph.profiles}
            if "genai" in engines and precision == "int4":
                races["genai"] = {"genai dense": Case("genai", str(genai_build(run))), **ours}
    if "torch" in engines and precision == "fp32":
        races["torch"] = {
            "dense": Case("torch", str(dense_backbone(run))),
            "slim": Case("torch", slim),
            "slim+memory": Case("torch", slim, memory),
        }
    if "gguf" in engines and precision in GGUF:
        races["gguf"] = gguf_cases(run, precision, memory)
    return races


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", action="append", help="only this one; repeatable")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; default: its own choice")
    parser.add_argument(
        "--profile", action="append", help="race it beside the dense one; repeatable, default all"
    )
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only this one; repeatable")
    parser.add_argument("--prompt", type=int, action="append", help="tokens before; repeatable")
    parser.add_argument("--batch", type=int, action="append", help="texts at a time; repeatable")
    parser.add_argument("--out", type=Path, default=HERE / "bundle_speed.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(as_a_child(args.child)))
        return
    if args.run is None:
        parser.error("name the RUN whose bundle is to be raced")
    from koff_prune.run import versions

    words = [args.run.name if word == str(args.run) else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/bundle_speed.py", *words])
    told = {"command": command, "prompts": args.prompt or PROMPTS, "batches": args.batch or BATCHES,
            "threads": args.threads}  # fmt: skip
    for found in compare(args.run, args):
        args.out.write_text(json.dumps({**told, "versions": versions(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
