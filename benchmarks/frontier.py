"""Quality against size and decode speed, dense and cut, in every precision: what a device gets.

python benchmarks/frontier.py RUN docs/results/NAME [--tokens 4096]

RUN is the run that benchmarks/bundle_speed.py raced, whose bundle_speed.json it reads: sizes, speeds, and
whose memory was attached or merged. What is new here is that domain's held-out perplexity under every graph.
Writes NAME.json, NAME.md and NAME.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from koff_export.bundle import open_manifest
from koff_export.runtime import Runtime
from koff_prune.figures import BLUE, GREY, INK, ORANGE, PALE

HERE = Path(__file__).parent
SPEED = "decode_16x1"  # tokens/s of one text, after 16 tokens
CASES = {
    "dense": "dense",
    "slim": "cut, no memory",
    "slim+memory": "cut, with its memory",
    "merged": "cut, its memory merged",
}
COLOURS = dict(zip(CASES.values(), (INK, GREY, BLUE, PALE), strict=True))
MARKERS = {"fp32": "o", "fp16": "P", "int8": "s", "int8_dynamic": "D", "int4": "^"}


def windows_of(run: Path, domain: str, tokens: int) -> list[list[int]]:
    """So many held-out tokens of a domain, in the windows that the run is evaluated on."""
    windows: list[list[int]] = []
    for line in (run / "domains" / f"{domain}.heldout.jsonl").read_text(encoding="utf-8").splitlines():
        if sum(map(len, windows)) >= tokens:
            break
        windows.append(json.loads(line)["tokens"])
    return windows


def places(run: Path, speed: dict[str, Any], tokens: int, profile: str) -> list[dict[str, Any]]:
    """One row per case and precision: file size, tokens per second, perplexity."""
    memory = speed["memory"]["name"]
    windows = windows_of(run, memory, tokens)
    folders = {
        "dense": run / "dense-onnx",
        "slim": run / "bundle",
        "slim+memory": run / "bundle",
        "merged": run / f"bundle-{memory}",
    }
    merged = folders["merged"] / "koff.json"
    if merged.exists() and "vocabulary" in json.loads(merged.read_text()):
        raise SystemExit(f"{merged.parent} counts by tokens of its own: export it without merged_vocabulary")
    adapter = run / "bundle" / str(open_manifest(run / "bundle").domains[memory].adapter)
    rows = []
    for race, found in speed["races"].items():
        precision, _, name = race.partition(" ")
        if name != profile:
            continue
        for case, folder in folders.items():
            if case not in found["tokens_per_s"]:
                continue
            runtime = Runtime.open(folder, precision, threads=speed["threads"], profile=profile)
            nll, count = runtime.score(windows, memory if case == "slim+memory" else None)
            size = speed["footprint"][race][case]["file_mb"]
            size += adapter.stat().st_size / 1e6 if case == "slim+memory" else 0
            row = {"case": CASES[case], "precision": precision, "file_mb": round(size, 1),
                   "peak_mb": round(speed["footprint"][race][case]["peak_mb"]),
                   "tokens_per_s": found["tokens_per_s"][case][SPEED],
                   "perplexity": round(math.exp(nll / count), 3)}  # fmt: skip
            print(row, flush=True)
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against size, and against speed: what is lower, and further left or right, is better."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 11,
                     "axes.spines.top": False, "axes.spines.right": False}):  # fmt: skip
        figure = Figure(figsize=(9.5, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key in zip(panels, ("file_mb", "tokens_per_s"), strict=True):
            for case, colour in COLOURS.items():
                mine = [row for row in rows if row["case"] == case]
                axes.plot([r[key] for r in mine], [r["perplexity"] for r in mine], color=colour, linewidth=1)
                for row in mine:
                    marker = MARKERS[row["precision"]]
                    axes.plot(row[key], row["perplexity"], marker, color=colour, markersize=8)
            axes.grid(axis="y", color="#d5dbe3")
        panels[0].set(xlabel="file, MB (left is better)", ylabel="perplexity (lower is better)", xscale="log")
        ticks = (100, 150, 200, 300, 500)
        panels[0].set_xticks(ticks, [str(tick) for tick in ticks])
        panels[0].minorticks_off()
        panels[1].set(xlabel="tokens a second, one thread (right is better)")
        handles = [panels[0].plot([], [], color=c, linewidth=4, label=case)[0] for case, c in COLOURS.items()]
        handles += [
            panels[0].plot([], [], MARKERS[name], color=ORANGE, label=name)[0]
            for name in dict.fromkeys(row["precision"] for row in rows)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="held-out, of the memory's domain")
    parser.add_argument("--speed", type=Path, default=HERE / "bundle_speed.json")
    parser.add_argument("--profile", default="fused", help="the one that was raced")
    args = parser.parse_args()
    speed = json.loads(args.speed.read_text(encoding="utf-8"))
    rows = places(args.run, speed, args.tokens, args.profile)
    memory, command = speed["memory"]["name"], "python benchmarks/frontier.py RUN " + " ".join(sys.argv[2:])
    told = {
        "command": command,
        "domain": memory,
        "tokens": args.tokens,
        "profile": args.profile,
        "rows": rows,
    }
    args.out.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    draw(rows, args.out.with_suffix(".svg"))
    lines = [
        "# Quality against size and speed on a device",
        "",
        f"`{command}`, after `{speed['command']}`: {speed['parameters']['dense']:,} parameters cut to"
        f" {speed['parameters']['slim']:,}, perplexity on {args.tokens:,} held-out tokens of {memory}, one"
        f" text decoded after 16 tokens on {speed['threads']} thread, profile {args.profile}. The memory's"
        " file is counted where it is attached.",
        "",
        f"![Perplexity against size and speed]({args.out.with_suffix('.svg').name})",
        "",
        "| | precision | file, MB | peak memory, MB | tokens/s | perplexity |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['case']} | {r['precision']} | {r['file_mb']:,.0f} | {r['peak_mb']:,} |"
        f" {r['tokens_per_s']:.0f} | {r['perplexity']:.2f} |"
        for r in rows
    ]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
