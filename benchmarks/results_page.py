"""Turns a run's report.json, or a sweep's sweep.json, into a committed result: the JSON and a page.

python benchmarks/results_page.py RUN docs/results/NAME "koff-prune compare RECIPE"
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from koff_prune.pages import infinite
from koff_prune.sweep_report import markdown
from koff_prune.verdict import row_labels


def page(report: dict[str, Any], command: str) -> str:
    """The table, the sentences and the versions of one report, as Markdown."""
    rows = report["rows"]
    domains = [name for name in rows[0]["perplexity"] if name != "gmean"]
    dense, held = rows[0]["perplexity"]["gmean"], rows[0]["eval"]
    lines = [
        f"# {report['model']['source']}",
        "",
        f"`{command}`, seed {rows[0]['seed']}, {held['tokens_per_domain']:,} held-out tokens a domain in"
        f" windows of {held['window']}. Generated from the JSON beside it.",
        "",
        "| row | gmean | / dense | "
        + " | ".join(domains)
        + " | removed | tokens (score, learn, settle) | seconds |",
        "| --- |" + " ---: |" * (len(domains) + 5),
    ]
    for row, label in zip(rows, row_labels(rows), strict=True):
        values, tokens = row["perplexity"], row["tokens"]
        cells = [
            f"{values['gmean']:.3f}",
            f"{values['gmean'] / dense:.3f}",
            *(f"{values[d]:.2f}" for d in domains),
        ]
        spent = f"{tokens['score']:,}, {tokens['learn']:,}, {tokens['settle']:,}"
        cells += [f"{row['sparsity']['realised']:.4f}", spent, f"{row['seconds']:,.0f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", *(f"- {note}" for note in report["notes"]), ""]
    lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".", ""]
    return "\n".join(lines)


def _read(told: dict[str, Any]) -> dict[str, Any]:
    """A copy in which the losses that a run wrote as null are infinite."""
    report = deepcopy(told)
    for row in [*report.get("rows", []), *(r for p in report.get("points", []) for r in p["rows"])]:
        row.update({key: infinite(row[key]) for key in ("perplexity", "beside_dense") if key in row})
    return report


def main() -> None:
    """Reads RUN/sweep.json or RUN/report.json, writes NAME.json and NAME.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder, or a sweep's")
    parser.add_argument("target", type=Path, help="docs/results/NAME")
    parser.add_argument("command", help="that made it")
    asked = parser.parse_args()
    run, target, command = asked.run, asked.target, asked.command
    if (run / "sweep.json").exists():
        report = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
        text = f"# Sweep\n\n`{command}`. Generated from the JSON beside it.\n\n" + markdown(_read(report))
    else:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        text = page(_read(report), command)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
