"""Sweeps of the same points over different seeds, tested together: koff against each row.

    python benchmarks/pool_sweeps.py docs/results/NAME docs/results/A.json docs/results/B.json …

A paired t-test needs the number, the mean and the variance of the seeds' leads, and these add up. A sweep's
JSON tells the leads, or (as they were first written) their mean and the p-value that gives the variance.
What a seed diverged at, or one sweep alone has figures of, is named and left out.
Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from koff_export.files import write_json
from koff_prune.sweep_report import holm


def sums_of(test: dict[str, Any]) -> tuple[int, float, float]:
    """Number of seeds, sum of their leads, sum of the squares."""
    if "leads" in test:
        leads = test["leads"]
        return len(leads), sum(leads), sum(lead * lead for lead in leads)
    n, mean = test["seeds"], test["lead"]
    found = float(student.isf(test["p_better"], n - 1))
    deviation = mean / found * math.sqrt(n) if found else 0.0
    return n, n * mean, n * mean * mean + (n - 1) * deviation**2


def _known(test: dict[str, Any]) -> bool:
    """Whether a test tells its leads, or what they can be told from."""
    leads = test.get("leads", [test["lead"]])
    return all(lead is not None for lead in leads) and ("leads" in test or "p_better" in test)


def pooled(files: list[Path]) -> list[dict[str, Any]]:
    """The tests that all files have, over all of their seeds, corrected for their number (Holm)."""
    sweeps = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    seeds = [{seed for point in sweep["points"] for seed in point["seeds"]} for sweep in sweeps]
    if twice := sorted(
        {seed for n, mine in enumerate(seeds) for other in seeds[:n] for seed in mine & other}
    ):
        raise SystemExit(f"the same seed in two sweeps: {twice}")
    tables = [{(t["sparsity"], t["tokens"], t["against"]): t for t in sweep["tests"]} for sweep in sweeps]
    result = []
    for key in tables[0]:
        there = [table[key] for table in tables if key in table]
        if len(there) < len(tables) or not all(map(_known, there)):
            print(f"left out: {key}, which not every sweep has figures of")
            continue
        n, total, squares = map(sum, zip(*map(sums_of, there), strict=True))
        mean = total / n
        error = math.sqrt(max(0.0, squares - n * mean * mean) / (n - 1) / n)
        wide = error * float(student.isf(0.025, n - 1))
        row = {"sparsity": key[0], "tokens": key[1], "against": key[2], "seeds": n, "lead": mean,
               "low": mean - wide, "high": mean + wide}  # fmt: skip
        row["p_better"] = float(student.sf(mean / error, n - 1)) if error else 1.0
        row["p_worse"] = 1 - row["p_better"] if error else 1.0
        row["p"] = min(1.0, 2 * min(row["p_better"], row["p_worse"]))
        result.append(row)
    holm(result)
    return result


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("sweeps", type=Path, nargs="+")
    args = parser.parse_args()
    tests = pooled(args.sweeps)
    command = " ".join(["python benchmarks/pool_sweeps.py", str(args.out), *map(str, args.sweeps)])
    write_json(args.out.with_suffix(".json"), {"command": command, "tests": tests})
    lines = [
        "# koff against each row, over the seeds of several sweeps", "",
        f"`{command}`. The lead is koff's, in nats; p is of a paired t-test, corrected for {len(tests)} tests"
        " (Holm), two-sided, which the last word is by, and one-sided for koff's being ahead.", "",
        "| sparsity | against | seeds | lead, nats | 95% | p | p, one-sided | koff is |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    lines += [
        f"| {t['sparsity']:.0%} | {t['against']} | {t['seeds']} | {t['lead']:.4f} | [{t['low']:.4f},"
        f" {t['high']:.4f}] | {t['p_holm']:.2g} | {t['p_better_holm']:.2g} | {t['koff_is']} |"
        for t in tests
    ]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
