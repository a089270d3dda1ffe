"""What the sub-runs of a sweep say together: means over seeds, the two figures, tests, and the frontier.

Values are nats of mean log-perplexity over domains. Intervals are 95%. Those of `closed` and `offloaded` are
Student's, over seeds: the variance of a mean over seeds is that between the seeds, over their number, and
what drawing other held-out documents would change in the mean (a bootstrap, of the same documents in every
seed). A bootstrap of so few seeds would be little more than their range. With one seed they are the
bootstrap's own, over documents alone. koff is held against every other row of its budget by t-tests paired
by seed: a word, better or worse, is of the two-sided one; p_better and p_worse are the one-sided. Each is
corrected by Holm's step-down method (Holm 1979) over all rows of all points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from koff_export.files import write_json, write_text
from koff_prune.figures import frontier, number
from koff_prune.pages import finite, render
from koff_prune.recipe import BASELINES
from koff_prune.report import count_of
from koff_prune.verdict import (
    Estimate,
    Row,
    cast,
    estimate,
    few_documents,
    is_dense,
    mean_nats,
    resample,
    row_labels,
    same_budget,
)

if TYPE_CHECKING:
    from koff_prune.points import Point

SIGNIFICANT = 0.05


def summarise(
    found: Sequence[tuple[Point, list[Row]]], warnings: Sequence[tuple[Point, str]] = ()
) -> dict[str, Any]:
    """Everything that sweep.json holds.

    Args:
        found: The rows of every sub-run, with `nll` and `documents`.
        warnings: What the reports of the sub-runs warn of, and which.

    Returns:
        `points` (one per sparsity and budget: `rows`, `closed`, `offloaded`), `tests`, and `sentences`.
    """
    places: dict[tuple[float, int | None], list[list[Row]]] = {}
    for point, rows in found:
        places.setdefault((point.sparsity, point.tokens), []).append(rows)
    result, tests = [], []
    for (sparsity, tokens), runs in places.items():
        tables = [_by_label(rows) for rows in runs]
        labels = dict.fromkeys(label for table in tables for label in table)
        table = [_over_seeds(label, tables) for label in labels]
        point_tests = _tests(runs, tables, {"sparsity": sparsity, "tokens": tokens})
        tests += point_tests
        result.append({
            "sparsity": sparsity, "tokens": tokens, "seeds": [rows[0]["seed"] for rows in runs],
            "trained": max(_trained(row) for rows in runs for row in rows),
            "ours": _ours(runs, tables), "rows": table,
            "closed": _closed(runs, tables), "offloaded": _offloaded(runs),
        })  # fmt: skip
    holm(tests)
    summary = {"format": 1, "points": result, "tests": tests}
    rough = [s for _, rows in found if (koff := cast(rows).koff) for s in few_documents(koff)]
    return {
        **summary,
        "sentences": [*_sentences(summary), *dict.fromkeys([*_warned(warnings, len(places)), *rough])],
    }


def _warned(warnings: Sequence[tuple[Point, str]], places: int) -> list[str]:
    """Each warning once, with the points that it is of where it is not of all."""
    of: dict[str, dict[str, None]] = {}
    for point, warning in warnings:
        of.setdefault(warning, {})[_title(vars(point))] = None
    return [w if len(titles) == places else f"{'; '.join(titles)}: {w}" for w, titles in of.items()]


def write_sweep(folder: Path, summary: dict[str, Any]) -> None:
    """Writes sweep.md, sweep.html and sweep.json; each is whole or absent."""
    write_text(folder / "sweep.md", markdown(summary))
    points = summary["points"]
    tables = [(_title(p), _head(p), _cells(p), p["ours"]) for p in points]
    told = f"{_longest(summary):,} tokens" if len({p["trained"] for p in points}) > 1 else None
    figure = frontier(_curves(summary), {p["ours"] for p in points}, _removed(points[0]))
    page = render(
        "sweep.html.jinja", sentences=summary["sentences"], tables=tables, figure=figure, budget=told
    )
    write_text(folder / "sweep.html", page)
    write_json(folder / "sweep.json", finite(summary))


def markdown(summary: dict[str, Any]) -> str:
    """The tables and sentences of a sweep."""
    lines = [f"- {sentence}" for sentence in summary["sentences"]]
    for point in summary["points"]:
        head = _head(point)
        lines += ["", f"## {_title(point)}", "", f"| {' | '.join(head)} |",
                  "| --- |" + " ---: |" * (len(head) - 1)]  # fmt: skip
        lines += [f"| {' | '.join(cells)} |" for cells in _cells(point)]
    return "\n".join(lines) + "\n"


def _by_label(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by what they are called in every seed: which ranking was a rival's better one may differ by seed.

    A row that was asked for as the better ranking and by name stands under both names.
    """
    named: list[Any] = []
    meant: list[Row] = []
    for row in rows:
        for asked in row.get("asked") or ["better" if row["memory"] != "none" else "by name"]:
            named.append({**row, "ranking": None} if asked == "better" else row)
            meant.append(row)
    return dict(zip(row_labels(named), meant, strict=True))


def _over_seeds(label: str, tables: Sequence[dict[str, Row]]) -> dict[str, Any]:
    there = [table[label] for table in tables if label in table]
    nats = np.array([mean_nats(row) for row in there])
    beside = np.array([mean_nats(t[label]) - mean_nats(_dense(t)) for t in tables if label in t])
    spread = float(nats.std(ddof=1)) if len(nats) > 1 and np.isfinite(nats).all() else None
    first = there[0]
    memory = first["parameters"]["memory"] if first["memory"] != "none" else 0
    return {
        "label": label, "method": first["method"], "memory": first["memory"], "seeds": len(there),
        "nats": nats.tolist(),
        "perplexity": math.exp(nats.mean()), "beside_dense": math.exp(beside.mean()), "std_nats": spread,
        "realised": first["sparsity"]["realised"], "of": first["sparsity"]["of"],
        "backbone": first["parameters"]["backbone"],
        "memory_parameters": memory, "memories": len(first["perplexity"]) - 1,
    }  # fmt: skip


def _ours(runs: Sequence[list[Row]], tables: Sequence[dict[str, Row]]) -> str | None:
    """What koff's own row is called: it depends on the parts of its memories."""
    koff = cast(runs[0]).koff
    return next((label for label, row in tables[0].items() if row is koff), None)


def _trained(row: Row) -> int:
    """Tokens that a row's gates and memories were trained on."""
    return sum(count for phase, count in row["tokens"].items() if phase != "score")


def _dense(table: dict[str, Row]) -> Row:
    return next(r for r in table.values() if is_dense(r))


def _others(runs: Sequence[list[Row]], tables: Sequence[dict[str, Row]], *, baselines: bool) -> list[str]:
    """Labels of rows of koff's budget, there for every seed: with its memories; its own, a part of them."""
    result = []
    for label in tables[0]:
        if not all(label in table for table in tables):
            continue
        fair = True
        for rows, table in zip(runs, tables, strict=True):
            koff, row = cast(rows).koff, table[label]
            if koff is None or row is koff or row["swap"] or not same_budget(row, koff):
                fair = False
                break
            equipped = row["memory"] == row["trained_with"] == koff["memory"]
            ours = (
                not baselines and row["method"] == "koff" and row["memory"] == row["trained_with"] != "none"
            )
            fair = fair and (ours or (equipped and row["method"] in BASELINES))
        if fair:
            result.append(label)
    return result


def _draws(rows: Sequence[Sequence[Row]]) -> np.ndarray | None:
    """The same rows of every seed under the same draws of documents, [seeds, rows, draws].

    A draw that leaves a seed without a document of a domain is none: with more seeds there are more of these.
    """
    pool: dict[str, set[int]] = {}
    for name, ids in (item for those in rows for item in those[0].get("documents", {}).items()):
        pool.setdefault(name, set()).update(ids)
    found = [resample(those, {name: sorted(ids) for name, ids in pool.items()}) for those in rows]
    known = [draws for draws in found if draws is not None]
    if len(known) < len(found):
        return None
    draws = np.stack(known)
    whole = np.isfinite(draws).all((0, 1))
    return draws[:, :, whole] if whole.mean() > 0.5 else None


def _interval(value: float, by_seed: np.ndarray, draws: np.ndarray | None) -> Estimate:
    """`value` with its interval.

    Args:
        value: The figure.
        by_seed: What the seeds say of it, [seeds]; only its spread counts.
        draws: The figure under every draw of documents, [draws]; None where they cannot be drawn: then
            there is no interval.
    """
    if len(by_seed) < 2 or draws is None:
        return estimate(value, draws)
    from scipy.stats import t

    variance = by_seed.var(ddof=1) / len(by_seed) + draws.var()
    half = float(t.ppf(0.975, len(by_seed) - 1) * math.sqrt(variance))
    return Estimate(value, value - half, value + half)


def _closed(runs: Sequence[list[Row]], tables: Sequence[dict[str, Row]]) -> dict[str, Any] | None:
    parts = [cast(rows) for rows in runs]
    labels = _others(runs, tables, baselines=True)
    if not labels or any(p.koff is None or p.ceiling is None for p in parts):
        return None
    best = min(labels, key=lambda label: np.mean([mean_nats(table[label]) for table in tables]))
    three = [[row for row in (t[best], p.koff, p.ceiling) if row]
             for t, p in zip(tables, parts, strict=True)]  # fmt: skip
    nats = np.array([[mean_nats(row) for row in rows] for rows in three])
    gains, gaps = nats[:, 0] - nats[:, 1], nats[:, 0] - nats[:, 2]
    gain, gap = float(gains.mean()), float(gaps.mean())
    figures = {"value": None, "low": None, "high": None, "rival": best,
               "finite": bool(np.isfinite(nats).all()), "rival_minus_koff": gain,
               "rival_minus_ceiling": gap}  # fmt: skip
    draws = _draws(three)
    mean = None if draws is None else draws.mean(0)
    # a share of what may well be nothing is no figure
    if np.isfinite(nats).all() and (gaps > 0).all() and (mean is None or (mean[0] > mean[2]).all()):
        ratio = gain / gap
        ratios = None if mean is None else (mean[0] - mean[1]) / (mean[0] - mean[2])
        # a ratio of means moves with a seed by this much (the delta method)
        figures |= asdict(_interval(ratio, (gains - ratio * gaps) / gap, ratios))
    return figures


def _offloaded(runs: Sequence[list[Row]]) -> dict[str, Any] | None:
    parts = [cast(rows) for rows in runs]
    four = [[p.koff_off, p.koff, p.around, p.ceiling] for p in parts]
    there = [[row for row in rows if row] for rows in four]
    if any(len(rows) < 4 for rows in there):
        return None
    sign = np.array([1, -1, -1, 1])
    by_seed = np.array([[mean_nats(r) for r in rows] for rows in there]) @ sign
    if not np.isfinite(by_seed).all():
        return {"value": None, "low": None, "high": None, "finite": False}
    draws = _draws(there)
    value = _interval(float(by_seed.mean()), by_seed, None if draws is None else sign @ draws.mean(0))
    return asdict(value)


def _tests(
    runs: Sequence[list[Row]], tables: Sequence[dict[str, Row]], where: dict[str, Any]
) -> list[dict[str, Any]]:
    """Koff against each row of its budget, paired by seed; none where there is one seed alone."""
    from scipy.stats import ttest_1samp

    result = []
    for label in _others(runs, tables, baselines=False):
        leads = [
            mean_nats(table[label]) - mean_nats(koff)
            for rows, table in zip(runs, tables, strict=True)
            if (koff := cast(rows).koff) is not None
        ]
        with np.errstate(invalid="ignore"):  # two that diverged are apart by no number
            lead = float(np.mean(leads))
        test: dict[str, Any] = {**where, "against": label, "seeds": len(leads), "lead": lead, "leads": leads}
        if len(leads) > 1 and np.isfinite(leads).all():
            for side, name in (("two-sided", "p"), ("greater", "p_better"), ("less", "p_worse")):
                # the same arm by another name leads by nothing in every seed: no test, and no difference
                test[name] = float(ttest_1samp(leads, 0.0, alternative=side).pvalue) if any(leads) else 1.0
        result.append(test)
    return result


def holm(tests: list[dict[str, Any]]) -> None:
    """Adds corrected p-values, and the word for each: better, worse or not shown."""
    for name in ("p", "p_better", "p_worse"):
        ranked = sorted((t for t in tests if name in t), key=lambda t: t[name])
        least = 0.0
        for place, test in enumerate(ranked):
            least = max(least, min(1.0, (len(ranked) - place) * test[name]))
            test[f"{name}_holm"] = least
    for test in tests:
        if "p" not in test:
            test["koff_is"] = "not tested" if math.isfinite(test["lead"]) else "not to be compared"
        elif test["p_holm"] < SIGNIFICANT:
            test["koff_is"] = "better" if test["lead"] > 0 else "worse"
        else:
            test["koff_is"] = "not shown to differ"


def _sentences(summary: dict[str, Any]) -> list[str]:
    result = []
    for point in summary["points"]:
        name = _title(point)
        for figure, form, unit in (("closed", "{:.1%}", ""), ("offloaded", "{:.3f}", " nats")):
            value = point[figure]
            if value is None:
                result.append(f"{name}: {figure} is not measured.")
                continue
            if not value.get("finite", True):
                result.append(f"{name}: {figure} is not defined: one of its losses is not finite.")
                continue
            if value["value"] is None:
                lost = f"{value['rival']} loses {value['rival_minus_ceiling']:.4f} nats against the ceiling"
                result.append(f"{name}: {figure} is not defined: {lost}, which may be nothing.")
                continue
            span = (
                ""
                if value["low"] is None
                else f" [{form.format(value['low'])}, {form.format(value['high'])}]"
            )
            beside = f" against {value['rival']}" if figure == "closed" else ""
            shown = "" if value["low"] is not None and value["low"] > 0 else ", not shown"
            result.append(f"{name}: {figure} {form.format(value['value'])}{unit}{span}{beside}{shown}.")
        mine = [
            t
            for t in summary["tests"]
            if (t["sparsity"], t["tokens"]) == (point["sparsity"], point["tokens"])
        ]
        for word, link in (("worse", "than"), ("not shown to differ", "from"), ("better", "than")):
            those = [f"{t['against']} (lead {t['lead']:.4f} nats)" for t in mine if t["koff_is"] == word]
            if those:
                end = "" if word == "not shown to differ" else f" (two-sided p < {SIGNIFICANT})"
                result.append(f"{name}: koff is {word} {link} {', '.join(those)}{end}.")
        for t in mine:
            if t["koff_is"] == "not to be compared":
                result.append(
                    f"{name}: koff or {t['against']} has no finite loss in one of {t['seeds']} seeds."
                )
        mine = [t for t in mine if t["koff_is"] != "not to be compared"]
        if any(t["koff_is"] == "not tested" for t in mine):
            behind = [t["against"] for t in mine if t["lead"] <= 0]
            result.append(f"{name}: one seed, so nothing is tested; koff's loss is lower than that of "
                          f"{len(mine) - len(behind)} of {len(mine)} rows of its budget"
                          + (f", not of {', '.join(behind)}." if behind else "."))  # fmt: skip
    return result


def _title(point: dict[str, Any]) -> str:
    tokens = "" if point["tokens"] is None else f", {point['tokens']:,} tokens"
    return f"sparsity {point['sparsity']:g}{tokens}"


def _head(point: dict[str, Any]) -> list[str]:
    return [
        "row",
        "perplexity",
        "/ dense",
        "std (nats)",
        "seeds",
        _removed(point),
        "with one memory",
        "with all",
    ]


def _removed(point: dict[str, Any]) -> str:
    """What the share that is removed is a share of."""
    return "removed of blocks" if point["rows"][0].get("of") == "blocks" else "removed of all"


def _cells(point: dict[str, Any]) -> list[list[str]]:
    return [
        [row["label"], number(row["perplexity"]), f"{row['beside_dense']:.3f}",
         "–" if row["std_nats"] is None else f"{row['std_nats']:.4f}", str(row["seeds"]),
         f"{row['realised']:.2%}", *(count_of(size) for size in _sizes(row))]
        for row in point["rows"]
    ]  # fmt: skip


def _sizes(row: dict[str, Any]) -> tuple[int, int]:
    """Parameters of the backbone with one memory, and with all."""
    backbone, memory = row["backbone"], row["memory_parameters"]
    return backbone + memory, backbone + row["memories"] * memory


def _longest(summary: dict[str, Any]) -> int:
    """Tokens of the longest budget: shorter ones are in the tables, and not in the figure."""
    return max(int(p["trained"]) for p in summary["points"])


def _curves(summary: dict[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Per label: parameters with one memory, removed share, perplexity beside dense; the longest budget."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for point in summary["points"]:
        if point["trained"] == _longest(summary):
            for row in point["rows"]:
                place = (_sizes(row)[0], row["realised"], row["beside_dense"])
                curves.setdefault(row["label"], []).append(place)
    return {label: sorted(set(places)) for label, places in curves.items()}
