"""The report of a run: report.json for programs, report.html for people, a table for the terminal.

What the rows mean is worked out in `verdict.py`, the figures are drawn in `figures.py`; neither needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_export.files import disk_errors, write_json, write_text
from koff_prune.figures import kept_widths, learning_curve, number, perplexity_bars
from koff_prune.pages import finite, render
from koff_prune.verdict import Row, Verdict, cast, is_dense, judge, row_label, row_labels

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Row", "render_table", "row_label", "write_report"]

_INTERNAL = ("nll", "counts", "documents", "asked")  # of a row: large, and only needed for intervals


def write_report(
    folder: Path,
    *,
    model: Any,
    recipe_digest: str,
    versions: Mapping[str, str],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    remarks: Sequence[str] = (),
    overlap: Mapping[str, Any] | None = None,
    plans: Mapping[str, Sequence[int]] | None = None,
    log: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes report.html, then report.json; each is whole or absent.

    Args:
        folder: The run directory; made if missing.
        model: The dense model: a name, or a mapping with `source`.
        recipe_digest: Of the resolved recipe.
        versions: Of the libraries.
        rows: In the order of the table.
        notes: Further sentences, told to the reader as they are, also of a sweep.
        remarks: The same, of this run alone.
        overlap: koff's plan beside its start's: `start` (a name), `share` (of what koff removed, how much the
            start removes too) and, where known, `removed` (units).
        plans: Kept FFN neurons per layer, by plan; the name `dense` is drawn as the reference.
        log: Of learning, see `figures.learning_curve`.

    Raises:
        KoffError: The disk is full or may not be written.
    """
    verdict = judge(rows)
    sentences = [*verdict.sentences, *_sizes(rows), *_overlap(overlap), *remarks, *notes]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    page = _page(model, recipe_digest, versions, rows, verdict, sentences, plans or {}, log)
    write_text(folder / "report.html", page)
    written = [{key: value for key, value in row.items() if key not in _INTERNAL} for row in rows]
    report = {
        "format": 1,
        "model": model,
        "recipe": recipe_digest,
        "versions": dict(versions),
        "rows": written,
        "closed": verdict.closed,
        "offloaded": verdict.offloaded,
        "overlap": None if overlap is None else dict(overlap),
        "notes": [verdict.headline, *sentences],
        "warnings": [*_sizes(rows), *notes],
    }
    write_json(folder / "report.json", finite(report))


def render_table(rows: Sequence[Row]) -> Table:
    """The table for the terminal: perplexities by domain, beside the dense model's, and sizes."""
    from rich import box
    from rich.table import Table

    caption = "perplexity on held-out text; size in parameters, with the attached memory"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", overflow="fold", min_width=16)
    for name in ["gmean", "vs dense", *_domains(rows), "removed", "size"]:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in _cells(rows):
        table.add_row(
            cells["label"],
            cells["gmean"],
            cells["change"],
            *cells["domains"],
            cells["removed"],
            cells["size"],
            style="bold" if cells["ours"] else None,
        )
    return table


def _page(
    model: Any,
    recipe_digest: str,
    versions: Mapping[str, str],
    rows: Sequence[Row],
    verdict: Verdict,
    sentences: Sequence[str],
    plans: Mapping[str, Sequence[int]],
    log: Sequence[Mapping[str, Any]],
) -> str:
    """report.html: one file, nothing fetched, no script."""
    return render(
        "report.html.jinja",
        model=model.get("source", "") if isinstance(model, Mapping) else model,
        recipe=recipe_digest,
        versions=dict(versions),
        domains=_domains(rows),
        table=_cells(rows),
        sizes=_size_table(rows),
        closed=verdict.closed,
        offloaded=verdict.offloaded,
        headline=verdict.headline,
        sentences=sentences,
        figures=_figures(rows, plans, log),
        count=count_of,
    )


def _figures(
    rows: Sequence[Row], plans: Mapping[str, Sequence[int]], log: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Caption and SVG of every figure that there are numbers for."""
    result: list[tuple[str, str]] = []
    lines, bars, parts = {}, [], cast(rows)
    for label, row in zip(row_labels(rows), rows, strict=True):
        value = row["perplexity"]["gmean"]
        if not math.isfinite(value):
            continue
        if is_dense(row) or row is parts.ceiling:
            lines["dense" if is_dense(row) else "ceiling"] = value
        else:
            ours = "koff" if row is parts.koff else "variant"
            bars.append((label, value, ours if row["method"] == "koff" else "baseline"))
    if bars:
        labels, values, kinds = zip(*bars, strict=True)
        result.append(("Perplexity, lower is better", perplexity_bars(labels, values, kinds, lines)))
    if plans:
        result.append(("What every layer keeps", kept_widths(plans)))
    curve = learning_curve(log)
    if curve:
        result.append(("Learning", curve))
    return result


def _cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every row as text, for the page and the terminal alike."""
    dense = next((r["perplexity"]["gmean"] for r in rows if is_dense(r)), None)
    main = cast(rows).koff
    names = _domains(rows)
    cells = []
    for label, row in zip(row_labels(rows), rows, strict=True):
        gmean = row["perplexity"]["gmean"]
        realised = row["sparsity"].get("realised")
        memory = row["parameters"].get("memory") or 0 if row["memory"] != "none" else 0
        plain = is_dense(row)
        cells.append(
            {
                "label": label,
                "ours": row is main,
                "gmean": number(gmean),
                "change": "–" if dense is None or plain else _change(gmean / dense),
                "domains": [number(row["perplexity"].get(name)) for name in names],
                "removed": f"{realised:.2%}" if realised else "–",
                "size": count_of(row["parameters"]["backbone"] + memory),
                "compensated": "yes" if row["compensate"] == "least_squares" else "–",
                "row": row,
            }
        )
    return cells


def _change(ratio: float) -> str:
    """A ratio of perplexities as a signed percentage, or as a factor once it is large."""
    if math.isnan(ratio):  # of two that are infinite
        return "–"
    if ratio >= 10:
        return f"×{ratio:,.0f}"
    return f"{ratio - 1:+.1%}".replace("-", "−")


def _domains(rows: Sequence[Row]) -> list[str]:
    """Names of the domains, in the order of their first row."""
    return list(dict.fromkeys(name for row in rows for name in row["perplexity"] if name != "gmean"))


def count_of(parameters: float | None) -> str:
    """Parameters for people: 118.4 M."""
    if parameters is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            value = parameters / size
            return f"{value:,.{1 if value >= 10 else 2}f} {unit}"
    return f"{parameters:,.0f}"


def _size_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Parameters of the dense model and of koff: backbone, with one memory, with all of them."""
    parts = cast(rows)
    dense = parts.dense["parameters"]["backbone"] if parts.dense else None
    number_of_memories = len(_domains(rows))
    result = []
    for row in filter(None, (parts.dense, parts.koff)):
        backbone, memory = row["parameters"]["backbone"], row["parameters"].get("memory") or 0
        totals = [backbone, backbone + memory, backbone + number_of_memories * memory]
        result.append(
            {
                "label": row["method"],
                "memories": number_of_memories,
                "totals": totals if row["memory"] != "none" else totals[:1],
                "change": [
                    None if not dense or row["method"] == "dense" else _change(t / dense) for t in totals
                ],
            }
        )
    return result


def _sizes(rows: Sequence[Row]) -> list[str]:
    """Says so where the memories eat the saving."""
    parts = cast(rows)
    if parts.dense is None or parts.koff is None:
        return []
    dense = parts.dense["parameters"]["backbone"]
    backbone, memory = parts.koff["parameters"]["backbone"], parts.koff["parameters"].get("memory") or 0
    memories = len(_domains(rows))
    if backbone + memories * memory < dense or memories == 0:
        return []
    whose = "its memory" if memories == 1 else f"all {memories} memories"
    total = count_of(backbone + memories * memory)
    return [
        f"Nothing is saved in size: the backbone with {whose} has {total} parameters, "
        f"the dense model {count_of(dense)}."
    ]


def _overlap(overlap: Mapping[str, Any] | None) -> list[str]:
    """How far learning moved the plan."""
    if not overlap:
        return []
    units = f"{overlap['removed']:,} units" if overlap.get("removed") else "units"
    share, start = overlap["share"], overlap["start"]
    return [f"Of the {units} that koff removed, {share:.1%} were also the choice of its start, {start}."]
