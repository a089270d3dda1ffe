"""The report's figures as inline SVG: text stays text, nothing is fetched, nothing is scripted."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BLUE, PALE, GREY, ORANGE = "#1c2733", "#d5dbe3", "#1f5fbf", "#9dbfe8", "#a9b2bd", "#c4601d"
_COLOURS = {"koff": BLUE, "variant": PALE, "baseline": GREY}
_WIDEST = 3  # times the dense model's perplexity: as far as the axis of perplexities goes
_CYCLE = (BLUE, ORANGE, "#2f8f5b", "#8a4fae", "#b3922b", "#c23b5a", "#3f9bb5", "#6b7684")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "legend.frameon": False,
}


def number(value: float | None) -> str:
    """A perplexity for people: two decimals while they matter, thousands with commas."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def perplexity_bars(
    labels: Sequence[str], values: Sequence[float], kinds: Sequence[str], lines: Mapping[str, float]
) -> str:
    """One bar per row on a log axis; the dense model and the ceiling as lines through all of them.

    Args:
        labels: Of the rows, top to bottom.
        values: Their perplexities.
        kinds: koff, variant (of koff) or baseline: the colour of the bar.
        lines: Name and perplexity of what needs no bar: dense, ceiling.
    """
    with _style("perplexity"):
        wrapped = [fill(label, 36) for label in labels]
        figure = _figure(9, 1.1 + sum(0.2 + 0.18 * (1 + text.count("\n")) for text in wrapped))
        axes = figure.subplots()
        everything = [*values, *lines.values()]
        low = min(everything) / 1.08
        # One collapsed model would squeeze all others into a corner: its bar runs off the axis.
        high = min(max(everything), _WIDEST * max([*lines.values(), min(values)]))
        edge = high * (high / low) ** 0.14
        for place, (value, kind) in enumerate(zip(values, kinds, strict=True)):
            beyond = value > edge
            axes.barh(place, (edge if beyond else value) - low, left=low, color=_COLOURS[kind], height=0.62)
            spot = edge if beyond else value * (high / low) ** 0.01
            text = f"{number(value)} \u25b6 " if beyond else number(value)
            axes.text(spot, place, text, va="center", ha="right" if beyond else "left", fontsize=10)
        for (name, value), dash in zip(lines.items(), ("-", "--"), strict=False):
            axes.axvline(value, color=INK, linewidth=1.2, linestyle=dash, label=f"{name} {number(value)}")
        axes.set_xscale("log")
        axes.set_xlim(low, edge)
        axes.set_yticks(range(len(labels)), wrapped)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        _plain_log_ticks(axes, low, edge)
        axes.set_xlabel("perplexity, geometric mean (log axis)")
        if lines:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(lines), borderaxespad=0.2)
        return _svg(figure, "Perplexity of every row")


def kept_widths(plans: Mapping[str, Sequence[int]]) -> str:
    """FFN neurons kept in every layer, one line per plan."""
    from matplotlib.ticker import MaxNLocator

    with _style("widths"):
        figure = _figure(9, 3.4)
        axes = figure.subplots()
        colours = iter(_CYCLE * len(plans))
        for name, widths in plans.items():
            dense = name == "dense"
            axes.plot(
                range(len(widths)),
                widths,
                label=name,
                color=GREY if dense else next(colours),
                linestyle="--" if dense else "-",
                linewidth=1.2 if dense else 1.8,
                marker=None if dense else "o",
                markersize=3,
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.set_xlabel("layer")
        axes.set_ylabel("FFN neurons kept")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
        return _svg(figure, "FFN neurons kept per layer")


def learning_curve(log: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss and expected sparsity by step, or None where the log holds no loss.

    Args:
        log: Entries with `step`, `loss` and where known `sparsity`, `tokens_per_second`, and `phase`, which
            divides the lines.
    """
    from matplotlib.ticker import MaxNLocator

    phases: dict[str, list[Mapping[str, Any]]] = {}
    for entry in log:
        if entry.get("loss") is not None and entry.get("step") is not None:
            phases.setdefault(str(entry.get("phase") or "learn"), []).append(entry)
    if not phases:
        return None
    gated = [e for entries in phases.values() for e in entries if e.get("sparsity") is not None]
    with _style("learning"):
        figure = _figure(9, 4.2 if gated else 3)
        grid = figure.subplots(
            2 if gated else 1, 1, squeeze=False, sharex=True, height_ratios=[2, 1][: 1 + bool(gated)]
        )
        loss_axes: Axes = grid[0, 0]
        before = 0  # one phase follows the other, and each counts its own steps
        gated_steps: list[int] = []
        for place, (name, entries) in enumerate(phases.items()):
            steps = [before + e["step"] for e in entries]
            gated_steps += [before + e["step"] for e in entries if e.get("sparsity") is not None]
            before = steps[-1]
            losses = [e["loss"] for e in entries]
            colour = _CYCLE[place % len(_CYCLE)]
            # Single steps are noisy: they stay visible behind their running median.
            loss_axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
            loss_axes.plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=name)
        loss_axes.set_ylabel("loss (nats)")
        loss_axes.grid(axis="y")
        if len(phases) > 1:
            loss_axes.legend(loc="upper right", ncols=len(phases))
        if gated:
            grid[1, 0].plot(gated_steps, [e["sparsity"] for e in gated], color=INK, linewidth=1.5)
            grid[1, 0].set_ylabel("sparsity")
            grid[1, 0].set_ylim(bottom=0)
            grid[1, 0].grid(axis="y")
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[-1, 0].set_xlabel("optimizer step")
        speeds = [e["tokens_per_second"] for e in log if e.get("tokens_per_second")]
        if speeds:
            loss_axes.set_title(f"{median(speeds):,.0f} tokens per second (median)", fontsize=11)
        return _svg(figure, "Learning curve")


def frontier(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    mine: Collection[str | None] = ("koff",),
    removed: str = "removed of all",
) -> str:
    """Perplexity beside the dense model's, against parameters and against the removed share.

    Args:
        curves: Per row label, (parameters, removed share, perplexity / dense) by ascending parameters. Rows
            of koff stand out; what is beyond `_WIDEST` times the dense model stands at the upper edge, as a
            triangle, or where koff is not, is named and left out.
        mine: Labels of koff's own rows.
        removed: What the removed share is of.
    """
    with _style("frontier"):
        figure = _figure(9, 5.2)
        size, share = figure.subplots(1, 2, sharey=True)
        colours = iter(_CYCLE[1:] * (len(curves) + 1))
        off: list[str] = []
        for label, places in curves.items():
            ours = label in mine
            beyond = [p for p in places if p[2] > _WIDEST]
            shown = [p for p in places if p[2] <= _WIDEST]
            if beyond and not ours:
                off.append(label)
            if not shown and not ours:
                continue
            style: dict[str, Any] = {
                "color": BLUE if ours else INK if label.startswith("dense") else next(colours),
                "linewidth": 2.6 if ours else 1.2,
                "marker": "*" if label.startswith("dense") else "o",
                "markersize": 9 if label.startswith("dense") else 6 if ours else 3.5,
                "zorder": 3 if ours else 2,
            }
            size.plot([p[0] / 1e6 for p in shown], [p[2] for p in shown], label=label, **style)
            share.plot([100 * p[1] for p in shown], [p[2] for p in shown], **style)
            if ours and beyond:
                for axes, values in (
                    (size, [p[0] / 1e6 for p in beyond]), (share, [100 * p[1] for p in beyond]),
                ):  # fmt: skip
                    axes.plot(
                        values, [_WIDEST] * len(values), color=BLUE, marker="^", markersize=9, linestyle=""
                    )
        for axes in (size, share):
            axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
            axes.grid(axis="y")
        size.set_xlabel("million parameters, with one memory")
        share.set_xlabel(f"{removed} parameters, %")
        size.set_ylabel("perplexity / dense")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        if off:
            said = f"beyond {_WIDEST:g} x dense, in part or all: {', '.join(off)}"
            figure.suptitle(fill(said, 100), fontsize=9, color=GREY)
        return _svg(figure, "Quality against size and sparsity")


def shares_by_layer(removed: Mapping[str, Sequence[float]], specific: Sequence[float]) -> str:
    """Share of FFN neurons removed in every layer, one line per plan, over the share that is specific."""
    with _style("shares"):
        figure = _figure(9, 3.6)
        axes = figure.subplots()
        axes.bar(
            range(len(specific)),
            [100 * s for s in specific],
            color=FAINT,
            width=0.8,
            label="specific neurons",
        )
        for colour, (name, shares) in zip(_CYCLE, removed.items(), strict=False):
            wide = 2.4 if name == "koff" else 1.3
            axes.plot(range(len(shares)), [100 * s for s in shares], color=colour, linewidth=wide, label=name)
        axes.set_xlabel("layer")
        axes.set_ylabel("% of FFN neurons")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2)
        return _svg(figure, "Share of neurons removed per layer")


def _smooth(values: Sequence[float]) -> list[float]:
    reach = max(1, len(values) // 24)
    return [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _plain_log_ticks(axes: Axes, low: float, high: float) -> None:
    """Ticks in plain numbers, also where the axis spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if high / low < 10:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _style(salt: str) -> Any:
    """The house style; the salt keeps ids of several figures in one page apart and the same in every run."""
    from matplotlib import rc_context

    return rc_context({**_STYLE, "svg.hashsalt": salt})


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, title: str) -> str:
    """The bare <svg> element, without the prologue, metadata and name spaces that HTML does not need."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
