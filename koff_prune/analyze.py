"""What a finished run removed and what its memories hold: specialisation of neurons, and memories swapped.

Reads the run directory that `apply`, `cut` or `compare` left; writes analysis.json, analysis.md and
analysis.html beside the report.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from koff_export.errors import KoffError
from koff_export.files import write_json, write_text
from koff_prune import chat
from koff_prune.arms import main_arm
from koff_prune.device import on_device
from koff_prune.evaluate import mean_nats, perplexity
from koff_prune.figures import shares_by_layer
from koff_prune.losses import predicted_tokens, text_losses
from koff_prune.pages import finite, render
from koff_prune.plan import Kept, make_plan
from koff_prune.progress import bar
from koff_prune.run import Run, finished_run
from koff_prune.specialise import (
    OFTEN,
    SPECIFIC,
    activity,
    odds_of_removal,
    removed_mask,
    specific,
    strata,
)
from koff_prune.stages import baseline_scores, cut_arm, plan_arm
from koff_prune.verdict import RESAMPLES, SEED, few_documents

RIVALS = ("fisher", "curvature", "wanda", "random")
# what else might be called specific: quantile of activation that a neuron must be above, share of all neurons
OTHERS = ((OFTEN, 0.05), (0.5, 0.01), (0.5, 0.05))
OFF = "none"


def analyze(folder: Path, *, tokens: int = 8192, fraction: float = SPECIFIC) -> dict[str, Any]:
    """Both analyses of a finished run.

    Args:
        folder: The run directory.
        tokens: Held-out tokens a domain, at most.
        fraction: Of all neurons that count as specific.

    Returns:
        What analysis.json holds.

    Raises:
        KoffError: No finished run is there, or it has fewer than two domains.
    """
    if not 0 < fraction < 1:
        raise KoffError(f"--specific: {fraction} is no share; choose one between 0 and 1, such as {SPECIFIC}")
    with finished_run(folder) as run:
        if len(run.domains) < 2:
            raise KoffError(f"{folder}: has one domain; nothing can be specific to it or swapped with it")
        result = {
            "format": 1,
            "model": run.model_identity,
            "plan": plan_arm(run, main_arm(run), folder).digest,
            "specialisation": _specialisation(run, tokens, fraction),
            "swaps": _swaps(run, tokens),
        }
    result["sentences"] = _sentences(result)
    write_text(folder / "analysis.md", markdown(result))
    write_text(folder / "analysis.html", _page(result))
    write_json(folder / "analysis.json", finite(result))
    return result


def _windows(run: Run, tokens: int) -> dict[str, Any]:
    return {n: b.heldout[: max(1, tokens // b.heldout.shape[1])] for n, b in run.domains.items()}


def _specialisation(run: Run, tokens: int, fraction: float) -> dict[str, Any]:
    """Odds of removal of specific neurons, under koff's plan and under others of the same budget."""
    windows = _windows(run, tokens)
    with bar("neurons' activity", sum(w.numel() for w in windows.values())) as progress:
        seen = activity(on_device(run.fresh()), {n: chat.tokens(w) for n, w in windows.items()}, progress)
    owner, stratum = specific(seen.probability, fraction), strata(seen.strength)
    width = owner.shape[1]
    gone = {name: removed_mask(kept, width) for name, kept in _plans(run).items()}

    def odds(owner: torch.Tensor) -> dict[str, dict[str, Any]]:
        return {name: asdict(odds_of_removal(mask, owner >= 0, stratum)) for name, mask in gone.items()}

    per_layer = {name: mask.float().mean(1).tolist() for name, mask in gone.items()}
    return {
        "tokens_per_domain": min(w.numel() for w in windows.values()),
        "fraction": fraction,
        "specific": {name: int((owner == n).sum()) for n, name in enumerate(windows)},
        "often": OFTEN,
        "odds": odds(owner),
        "other_definitions": [
            {"often": often, "fraction": share, "odds": odds(specific(seen.probability, share, often))}
            for often, share in OTHERS if (often, share) != (OFTEN, fraction)
        ],
        "removed_of_each": {
            name: {d: float(mask[owner == n].float().mean()) if (owner == n).any() else None
                   for n, d in enumerate(windows)}
            for name, mask in gone.items()
        },
        "removed_per_layer": per_layer,
        "specific_per_layer": (owner >= 0).float().mean(1).tolist(),
    }  # fmt: skip


def _plans(run: Run) -> dict[str, Kept]:
    """The run's plan, and plans of the same budget from other scores."""
    arm = main_arm(run)
    plans = {"koff": plan_arm(run, arm, run.folder).layers}
    structure = run.recipe.structure
    ranking = "per_layer" if structure.widths == "uniform" else "global"
    for method in RIVALS:
        scores = baseline_scores(run, method)
        made = make_plan(
            scores, run.units, structure, model=run.model_identity, method=method, ranking=ranking
        )
        plans[method] = made.layers
    return plans


def _swaps(run: Run, tokens: int) -> dict[str, Any]:
    """Held-out nats of every domain's text under every memory, and what a wrong one costs."""
    memories = cut_arm(run, main_arm(run), run.folder, keep_backbone=True)
    windows = _windows(run, tokens)
    names = [OFF, *windows]
    total = sum(w.numel() for w in windows.values()) * len(names)
    losses: dict[str, dict[str, list[float]]] = {}
    with bar("swapping memories", total) as progress:
        for text, rows in windows.items():
            losses[text] = {
                name: text_losses(run, memories, rows, text, None if name == OFF else name, progress)
                for name in names
            }
    documents = {n: b.heldout_documents[: len(windows[n])] for n, b in run.domains.items()}
    counts = {name: predicted_tokens(run, rows) for name, rows in windows.items()}
    wrong = {
        text: {
            name: _difference(losses[text][name], losses[text][text], documents[text], counts[text])
            for name in names
            if name != text
        }
        for text in windows
    }
    matrix = {t: {n: mean_nats(v, counts[t]) for n, v in by_name.items()} for t, by_name in losses.items()}
    return {"nats": matrix, "wrong_minus_right": wrong, "documents": documents}


def _difference(
    wrong: list[float], right: list[float], documents: list[int], counts: list[int]
) -> dict[str, Any]:
    """Mean of wrong - right, nats per token; its interval from a bootstrap over two documents or more."""
    _, owner = np.unique(documents, return_inverse=True)
    sums = np.bincount(owner, weights=np.subtract(wrong, right) * counts)
    count = np.bincount(owner, weights=counts)
    if len(count) < 2:
        return {"value": float(sums.sum() / count.sum()), "low": None, "high": None}
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(len(count), np.full(len(count), 1 / len(count)), size=RESAMPLES)
    draws = (drawn @ sums) / (drawn @ count)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(sums.sum() / count.sum()), "low": float(low), "high": float(high)}


def _sentences(result: dict[str, Any]) -> list[str]:
    part, swaps = result["specialisation"], result["swaps"]
    said = []
    for name, odds in part["odds"].items():
        shares = (
            f"{odds['specific_removed']:.1%} of specific neurons removed,"
            f" {odds['general_removed']:.1%} of general ones"
        )
        if odds["ratio"] is None:
            said.append(f"{name}: {shares}; the odds ratio is undefined.")
        else:
            said.append(
                f"{name}: {shares}; odds ratio {odds['ratio']:.2f} [{odds['low']:.2f}, {odds['high']:.2f}]"
                " in strata of layer and mean activation."
            )
    koff = part["odds"]["koff"]
    if koff["low"] is None or koff["low"] <= 1:
        less = koff["high"] is not None and koff["high"] < 1
        said.append(
            "koff removes fewer of the domain-specific neurons than of the general ones."
            if less
            else "That domain-specific neurons are what koff removes is not shown."
        )
    ratios = [d["odds"]["koff"]["ratio"] for d in part["other_definitions"]]
    if known := [ratio for ratio in ratios if ratio is not None]:
        said.append(
            f"By {len(known)} other definitions of what is specific koff's odds ratio is {min(known):.2f} to"
            f" {max(known):.2f}."
        )
    useless = [
        f"{text} ({row[OFF]['value']:+.3f} nats)"
        for text, row in swaps["wrong_minus_right"].items()
        if row[OFF]["low"] is None or row[OFF]["low"] <= 0
    ]
    if useless:
        said.append(f"Not shown to be better with its own memory than without any: {', '.join(useless)}.")
    harmless = [
        f"{name} on {text} text ({d['value']:+.3f} nats)"
        for text, row in swaps["wrong_minus_right"].items()
        for name, d in row.items()
        if name != OFF and (d["low"] is None or d["low"] <= 0)
    ]
    if harmless:
        said.append(f"Memories that are not shown to be worse than the right one: {', '.join(harmless)}.")
    else:
        said.append("On every domain's text every other domain's memory is worse than its own.")
    return said + few_documents(swaps, "--tokens")


def markdown(result: dict[str, Any]) -> str:
    """analysis.md."""
    lines = ["# What was removed, and what the memories hold", ""]
    lines += [f"- {sentence}" for sentence in result["sentences"]]
    for title, head, rows in _tables(result):
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    part, swaps = result["specialisation"], result["swaps"]
    domains = list(part["specific"])
    head = ["plan", "odds ratio", "95% interval", "specific removed", "general removed",
            *(f"of {d}'s" for d in domains)]  # fmt: skip
    odds = []
    for name, o in part["odds"].items():
        span = (
            ["–", "–"] if o["ratio"] is None else [f"{o['ratio']:.2f}", f"{o['low']:.2f} to {o['high']:.2f}"]
        )
        each = [part["removed_of_each"][name][d] for d in domains]
        odds.append([name, *span, f"{o['specific_removed']:.1%}", f"{o['general_removed']:.1%}",
                     *("–" if e is None else f"{e:.1%}" for e in each)])  # fmt: skip
    counts = [[d, f"{n:,}"] for d, n in part["specific"].items()]
    plans = list(part["odds"])
    asked = [{key: part[key] for key in ("often", "fraction", "odds")}, *part["other_definitions"]]
    defined = [
        [f"{one['fraction']:.0%} of all, above {one['often']:.0%} of activations",
         *(_span(one["odds"][plan]) for plan in plans)]
        for one in asked
    ]  # fmt: skip
    names = [OFF, *domains]
    matrix = [[t, *(f"{perplexity(row[n]):.2f}" for n in names)] for t, row in swaps["nats"].items()]
    cost = [
        [t, *("–" if n == t else _told(row[n]) for n in names)]
        for t, row in swaps["wrong_minus_right"].items()
    ]
    return [
        ("Removal of domain-specific neurons", head, odds),
        ("Odds ratio, by what is called specific", ["definition", *plans], defined),
        (f"Specific neurons, {part['fraction']:.0%} of all", ["domain", "neurons"], counts),
        ("Perplexity of each text under each memory", ["text", *names], matrix),
        ("What a wrong memory costs, nats per token", ["text", *names], cost),
    ]


def _span(odds: dict[str, Any]) -> str:
    return "–" if odds["ratio"] is None else "{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**odds)


def _told(difference: dict[str, Any]) -> str:
    if difference["low"] is None:
        return f"{difference['value']:+.3f}"
    return "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)


def _page(result: dict[str, Any]) -> str:
    part = result["specialisation"]
    figure = shares_by_layer(part["removed_per_layer"], part["specific_per_layer"])
    return render("analysis.html.jinja", model=result["model"].get("source", ""),
                  sentences=result["sentences"], tables=_tables(result), figure=figure)  # fmt: skip
