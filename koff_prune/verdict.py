"""What a table of rows says: `closed`, `offloaded`, and a sentence wherever koff does not win.

Numbers are nats of mean log-perplexity over domains. Intervals are 95%, from a paired bootstrap over held-out
documents, drawn within each domain: windows of one document are not independent, and the domains are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np

from koff_prune.recipe import BASELINES

_LEARNED = {"lora": "learned with LoRA only", "kv": "learned with KV only", "lora+kv": "learned with both"}
RESAMPLES = 2000
_MOST_EMPTY = 0.05  # share of a pool's draws that may hold none of these rows' documents
SEED = 20
_FEW_DOCUMENTS = 5  # below so many in a domain an interval is rough, and the report says so


class Row(TypedDict):
    """One row of report.json. `nll` and `documents` are not written: only intervals need them."""

    method: str
    ranking: str | None
    gates: str | None
    compensate: str
    learned_with: str | None
    trained_with: str
    memory: str
    swap: str | None
    sparsity: dict[str, Any]
    plan: str | None
    seed: int
    tokens: dict[str, int]
    perplexity: dict[str, float]
    eval: dict[str, int]
    parameters: dict[str, int]
    seconds: float
    note: NotRequired[str]  # what tells this row from one that the keys above do not tell apart
    asked: NotRequired[list[str]]  # the rankings by which the recipe asks for this row: better, global, …
    nll: NotRequired[dict[str, list[float]]]  # per domain, the mean nats per token of every window
    counts: NotRequired[dict[str, list[int]]]  # per domain, the predicted tokens of every window
    documents: NotRequired[dict[str, list[int]]]  # per domain, the document of every window


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; None where the rows carry no losses per window."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Cast:
    """The rows that play a part in the two figures."""

    dense: Row | None
    around: Row | None  # what the ceiling's memories are around: the dense model, and its recovery if any
    koff: Row | None
    koff_off: Row | None
    ceiling: Row | None
    rival: Row | None


@dataclass(frozen=True)
class Verdict:
    """What is written beside the rows.

    Attributes:
        closed: value, low, high, and the two differences in nats it is the ratio of; None where not measured.
        offloaded: value, low, high in nats, and what memories are worth to koff and to the dense model.
        headline: One sentence.
        sentences: Losses, ties, what is missing and which compare row would supply it.
    """

    closed: dict[str, Any] | None
    offloaded: dict[str, Any] | None
    headline: str
    sentences: list[str]


def is_dense(row: Row) -> bool:
    """Whether this is the dense model as it came."""
    return row["method"] == "dense" and row["memory"] == "none" and row["trained_with"] in (None, "none")


def row_label(row: Row) -> str:
    """A row in words: "koff, memories off", "fisher, per-layer ranking, with memories"."""
    memory = row["memory"]
    part = {"lora": "LoRA only", "kv": "KV only"}.get(memory)
    if row["method"] == "dense":
        if memory == "none":
            return "dense" if is_dense(row) else "dense + recovery"
        words = ["dense + memories (ceiling)", part]
    elif row["method"] == "koff" and row["learned_with"] == "none":
        words = [
            "koff mask learned without memories",
            "bare" if memory == "none" else "memories trained afterwards",
            part,
        ]
    elif row["method"] == "koff":
        off = memory == "none" and row["learned_with"] is not None
        words = ["koff", part]
        if off:
            words = ["koff", "bare" if row["trained_with"] == "none" else "memories off"]
        if (off and row["learned_with"] in ("lora", "kv")) or (not off and row["learned_with"] != memory):
            words.append(_LEARNED.get(row["learned_with"] or ""))
    else:
        ranking = {"global": "global ranking", "per_layer": "per-layer ranking"}.get(row["ranking"] or "")
        bare = "bare" if row["trained_with"] == "none" else "memories off"
        words = [row["method"], ranking, bare if memory == "none" else "with memories", part]
    if row["gates"] == "hard_concrete":
        words.append("hard concrete gates")
    if row["swap"]:
        words.append(f"memory of {row['swap']} throughout")
    words.append(row.get("note"))
    return ", ".join(word for word in words if word)


def row_labels(rows: Sequence[Row]) -> list[str]:
    """Labels of all rows; where two would read the same, what tells them apart is added."""
    labels = [row_label(row) for row in rows]
    forms = {"re_estimated": "re-estimated gates", "straight_through": "straight-through gates"}
    details: list[Callable[[Row], str]] = [
        lambda row: forms.get(row["gates"] or "", str(row["gates"])),
        lambda row: "compensated" if row["compensate"] == "least_squares" else "not compensated",
        lambda row: f"trained with {row['trained_with']}",
        lambda row: f"target {row['sparsity'].get('target')}",
        lambda row: f"seed {row['seed']}",
        lambda row: f"plan {(row['plan'] or 'none')[:8]}",
    ]
    for detail in details:
        for label in {x for x in labels if labels.count(x) > 1}:
            places = [i for i, x in enumerate(labels) if x == label]
            if len({detail(rows[i]) for i in places}) > 1:
                for i in places:
                    labels[i] = f"{label}, {detail(rows[i])}"
    return labels


def cast(rows: Sequence[Row]) -> Cast:
    """Finds koff's row and those it is judged by: same seed, target, memory and compensation."""
    plain = [r for r in rows if r["swap"] is None]
    dense = _first(plain, is_dense)
    joint = [
        r
        for r in plain
        if r["method"] == "koff" and r["memory"] == r["learned_with"] and r["memory"] != "none"
    ]
    if not joint:  # of a recipe without memories
        ours = (r for r in plain if r["method"] == "koff")
        own = [r for r in ours if r["memory"] == r["learned_with"] == r["trained_with"] == "none"]
        return Cast(dense, dense, own[0] if own else None, None, None, None)
    koff = max(joint, key=lambda r: r["memory"].count("+"))  # the first of equals: ablations come after
    kind = koff["memory"]
    off = _first(plain, lambda r: _is_off(r, koff))
    same_seed = [r for r in plain if r["seed"] == koff["seed"] and r["memory"] == r["trained_with"] == kind]
    ceiling = _first(same_seed, lambda r: r["method"] == "dense")
    rivals = [r for r in same_seed if r["method"] in BASELINES and same_budget(r, koff)]
    rival = min(rivals, key=lambda r: r["perplexity"]["gmean"]) if rivals else None
    bare = [
        r for r in plain if r["method"] == "dense" and r["memory"] == "none" and r["seed"] == koff["seed"]
    ]
    around = _first(bare, lambda r: r["trained_with"] == kind)
    return Cast(dense, around or dense, koff, off, ceiling, rival)


def _is_off(row: Row, koff: Row) -> bool:
    """Whether this is koff's row with its memories off."""
    same = ("method", "learned_with", "trained_with", "plan", "gates", "compensate", "seed")
    return row["memory"] == "none" and all(row.get(k) == koff.get(k) for k in same)


def judge(rows: Sequence[Row]) -> Verdict:
    """Computes both figures where the rows for them are there, and says in words what they leave out."""
    if not rows:
        return Verdict(None, None, "No row was measured.", [])
    parts = cast(rows)
    labels = {id(row): label for row, label in zip(rows, row_labels(rows), strict=True)}
    koff, dense = parts.koff, parts.dense
    if koff is None:
        headline = "No row of koff with the memories it was learned with was measured."
        return Verdict(
            None, None, headline, ["closed and offloaded need one: add {method: koff} and a memory."]
        )
    if koff["memory"] == "none":
        closed = offloaded = None
        said = ["closed and offloaded are figures of memories, and none was trained."]
    else:
        closed, said = _closed(parts, labels)
        offloaded, more = _offloaded(parts)
        said += more
    sentences = [*_against(rows, koff, labels), *said, *few_documents(koff)]
    headline = _headline(koff, dense)
    return Verdict(closed, offloaded, headline, sentences)


def _closed(parts: Cast, labels: dict[int, str]) -> tuple[dict[str, Any] | None, list[str]]:
    koff, rival, ceiling = parts.koff, parts.rival, parts.ceiling
    if koff is None or rival is None or ceiling is None:
        ask = [] if ceiling else ["{method: dense, trained_with: same}"]
        ask += [] if rival else ["{method: fisher, ranking: better, trained_with: same}"]
        return None, [f"closed is not measured: add {' and '.join(ask)} to the recipe's compare."]
    draws = resample([rival, koff, ceiling])
    gains = None if draws is None else draws[0] - draws[1]
    gaps = None if draws is None else draws[0] - draws[2]
    gain = estimate(mean_nats(rival) - mean_nats(koff), gains)
    gap = estimate(mean_nats(rival) - mean_nats(ceiling), gaps)
    name = labels[id(rival)]
    if not (math.isfinite(gain.value) and math.isfinite(gap.value)):
        return None, [f"closed is not defined: {name}, koff or the ceiling has no finite loss."]
    if gap.value <= 0:
        why = f"{name} ({_pp(rival)}) is no worse than the ceiling ({_pp(ceiling)})"
        return None, [f"closed is not defined: {why}."]
    ratio, said = Estimate(gain.value / gap.value), []
    if gains is not None and gaps is not None:
        if gaps.min() > 0:
            ratio = estimate(ratio.value, gains / gaps)
        else:  # a ratio has no honest interval where its denominator may well be zero
            said = [f"closed has no interval: the gap it divides by ({gap} nats) may be zero."]
    nats = {"rival_minus_koff": asdict(gain), "rival_minus_ceiling": asdict(gap)}
    return {**asdict(ratio), "rival": name, "nats": nats}, said


def _offloaded(parts: Cast) -> tuple[dict[str, Any] | None, list[str]]:
    koff, off, ceiling = parts.koff, parts.koff_off, parts.ceiling
    dense = parts.around
    if dense is None or koff is None or off is None or ceiling is None:
        ask = [] if dense else ["dense"]
        ask += [] if off else ["koff with its memories off"]
        ask += [] if ceiling else ["{method: dense, trained_with: same}"]
        return None, [f"offloaded is not measured: add {' and '.join(ask)} to the recipe's compare."]
    four = [off, koff, dense, ceiling]
    if not all(math.isfinite(mean_nats(row)) for row in four):
        return None, ["offloaded is not defined: one of its four losses is not finite."]
    draws = resample(four)
    worth_koff = estimate(mean_nats(off) - mean_nats(koff), None if draws is None else draws[0] - draws[1])
    worth_dense = estimate(
        mean_nats(dense) - mean_nats(ceiling), None if draws is None else draws[2] - draws[3]
    )
    value = estimate(
        worth_koff.value - worth_dense.value,
        None if draws is None else draws[0] - draws[1] - draws[2] + draws[3],
    )
    said = []
    if worth_koff.value <= 0:
        said.append("koff does not need its memories: taking them off does not make it worse.")
    shown = value.low is not None and value.low > 0
    if shown or value.value <= 0 or value.low is not None:
        said.append(
            f"Offloading is{'' if shown else ' not'} shown: memories are worth {worth_koff.value:.3f} nats to"
            f" koff and {worth_dense.value:.3f} to the dense model; the difference is {value}."
        )
    worth = {"worth_to_koff": asdict(worth_koff), "worth_to_dense": asdict(worth_dense)}
    return {**asdict(value), "nats": worth}, said


def _against(rows: Sequence[Row], koff: Row, labels: dict[int, str]) -> list[str]:
    """One sentence per row of the same budget that koff does not beat, and one when it beats them all."""
    others = [
        r
        for r in rows
        if r is not koff
        and r["swap"] is None
        and same_budget(r, koff, compensated=False)
        and (r["method"] in BASELINES or (r["method"] == "koff" and not _is_off(r, koff)))
    ]
    lost, level = [], []
    for other in others:
        draws = resample([koff, other])
        worse = estimate(mean_nats(koff) - mean_nats(other), None if draws is None else draws[0] - draws[1])
        name = f"{labels[id(other)]} ({_pp(other)})"
        if not math.isfinite(mean_nats(koff)):
            lost.append(f"koff ({_pp(koff)}) does not beat {name}: its loss is not finite.")
        elif worse.value >= 0:
            lost.append(f"koff ({_pp(koff)}) does not beat {name}: it is {worse} nats worse.")
        elif worse.high is None and math.isfinite(worse.value):
            level.append(f"koff's lead over {name} is not tested, {worse} nats: there is no interval.")
        elif worse.high is not None and worse.high >= 0:
            level.append(f"koff's lead over {name} is within noise: {worse} nats.")
    sentences = lost + level
    if others and not sentences:
        bare = "" if any(r["memory"] != "none" for r in others) else ", none of which has memories"
        beaten = f"each of the {len(others)} other rows" if len(others) > 1 else "the other row"
        sentences.append(f"koff beats {beaten} measured at this budget{bare}.")
    return sentences


def _headline(koff: Row, dense: Row | None) -> str:
    of = "all parameters" if koff["sparsity"].get("of") == "total" else "the blocks' parameters"
    text = f"{koff['sparsity']['realised']:.1%} of {of} removed: koff's perplexity is {_pp(koff)}"
    if dense is None:
        return text + "."
    ratio = koff["perplexity"]["gmean"] / dense["perplexity"]["gmean"] - 1
    if not math.isfinite(ratio):
        return f"{text}, the dense model's {_pp(dense)}."
    return f"{text}, {abs(ratio):.1%} {'above' if ratio >= 0 else 'below'} the dense model's {_pp(dense)}."


def few_documents(koff: Row, key: str = "evaluate.tokens") -> list[str]:
    """A sentence where held-out documents are too few for an interval to mean much; `key` gives more."""
    few = {name: len(set(d)) for name, d in koff.get("documents", {}).items() if len(set(d)) < _FEW_DOCUMENTS}
    if not few:
        return []
    counts = ", ".join(f"{name} {count}" for name, count in few.items())
    none = ", and there are none with one" if 1 in few.values() else ""
    return [f"Intervals are rough: few held-out documents ({counts}){none}; raise {key}."]


def _first(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> Row | None:
    return next((row for row in rows if wanted(row)), None)


def same_budget(row: Row, koff: Row, *, compensated: bool = True) -> bool:
    """Whether a row has koff's seed and sparsity, and unless `compensated` is False its compensation."""
    same = all(row["sparsity"].get(k) == koff["sparsity"].get(k) for k in ("target", "of"))
    return (
        same and row["seed"] == koff["seed"] and (not compensated or row["compensate"] == koff["compensate"])
    )


def mean_nats(row: Row) -> float:
    """Mean log-perplexity over domains."""
    return math.log(row["perplexity"]["gmean"])


def _pp(row: Row) -> str:
    return f"{row['perplexity']['gmean']:,.2f}"


def estimate(value: float, draws: np.ndarray | None) -> Estimate:
    """A value with the 2.5th and 97.5th percentile of its draws."""
    if draws is None:
        return Estimate(float(value))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def resample(rows: Sequence[Row], pool: Mapping[str, Sequence[int]] | None = None) -> np.ndarray | None:
    """Mean log-perplexity of every row in every resample, [rows, RESAMPLES].

    Within a domain, as many documents as there are drawn with replacement, the same ones for all rows; a
    domain's loss is the mean over the tokens of what was drawn. None where rows carry no losses per window,
    not of the same documents, or infinite ones, and where a domain has one document alone, which is all that
    could be drawn.

    Args:
        rows: Of one seed.
        pool: Per domain, the documents that are drawn from, those of `rows` among them; default: theirs. Rows
            of several seeds that name one pool are resampled by the same draws.
    """
    documents = rows[0].get("documents")
    if not documents or any("nll" not in r or r.get("documents") != documents for r in rows):
        return None
    generator = np.random.default_rng(SEED)
    total = np.zeros((len(rows), RESAMPLES))
    for name in sorted(documents):
        known, owner = np.unique(documents[name], return_inverse=True)
        everyone = known if pool is None else np.unique(pool[name])
        # without counts all windows are of one length
        counts = np.array(rows[0].get("counts", {}).get(name, np.ones(len(owner))))
        tokens = np.bincount(owner, weights=counts)
        sums = np.array([np.bincount(owner, weights=counts * r["nll"][name]) for r in rows])
        if len(known) < 2 or not np.isfinite(sums).all():
            return None
        share = np.full(len(everyone), 1 / len(everyone))
        drawn = generator.multinomial(len(everyone), share, size=RESAMPLES)
        drawn = drawn[:, np.searchsorted(everyone, known)]
        size = drawn @ tokens
        if (size == 0).mean() > (0 if pool is None else _MOST_EMPTY):
            return None
        total += (sums @ drawn.T) / np.where(size == 0, np.nan, size)
    return total / len(documents)
