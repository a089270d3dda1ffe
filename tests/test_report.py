"""The report: what it computes, what it says, and that a browser shows it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from koff_export.errors import KoffError
from koff_prune.evaluate import perplexities
from koff_prune.figures import frontier, learning_curve
from koff_prune.report import Row, render_table, row_label, write_report
from koff_prune.verdict import RESAMPLES, estimate, judge, resample, row_labels

DOMAINS = ("python", "math", "medicine")


def noise(scale: float, count: int, seed: int = 7) -> np.ndarray:
    """The same draws in every test, whichever tests run."""
    return np.random.default_rng(seed).normal(0, scale, count)


# Per domain, the dense model's loss in each of 24 windows out of 12 documents.
WINDOWS = {name: 1.5 + 0.2 * i + noise(0.2, 24, seed=i) for i, name in enumerate(DOMAINS)}
OWNERS = [i // 2 for i in range(24)]


def row(method: str, nats: float | Sequence[float] = 0.0, **keys: Any) -> Row:
    """A row whose windows lose `nats` more than the dense model's: a number, or one per window."""
    losses = {name: (values + np.asarray(nats)).tolist() for name, values in WINDOWS.items()}
    means = {name: float(np.mean(values)) for name, values in losses.items()}
    perplexity = {name: math.exp(value) for name, value in means.items()}
    cut = method != "dense"
    base: dict[str, Any] = {
        "method": method,
        "ranking": None if method in ("dense", "koff", "random") else "global",
        "gates": "straight_through" if method == "koff" else None,
        "compensate": "least_squares" if cut else "none",
        "learned_with": "lora+kv" if method == "koff" else None,
        "trained_with": "none",
        "memory": "none",
        "swap": None,
        "sparsity": {"target": 0.12 if cut else None, "realised": 0.1201 if cut else 0.0, "of": "total"},
        "plan": f"{method}-plan-digest" if cut else None,
        "seed": 0,
        "tokens": {"score": 12288, "learn": 60000 if method == "koff" else 0, "settle": 0},
        "perplexity": {**perplexity, "gmean": math.exp(sum(means.values()) / len(means))},
        "eval": {"window": 512, "tokens_per_domain": 12288},
        "parameters": {"backbone": 118_400_000 if cut else 134_515_008, "memory": 2_800_000},
        "seconds": 12.5,
        "nll": losses,
        "documents": {name: OWNERS for name in DOMAINS},
    }
    return {**base, **keys}  # type: ignore[typeddict-item]


def with_memories(method: str, nats: float | Sequence[float], **keys: Any) -> Row:
    return row(method, nats, **{"trained_with": "lora+kv", "memory": "lora+kv", **keys})


KOFF = with_memories("koff", 0.02)
OFF = row("koff", 0.16, trained_with="lora+kv")
QUICKSTART = [row("dense"), KOFF, OFF, row("magnitude", 6.0), row("wanda", 0.3, ranking="per_layer")]
FULL = [*QUICKSTART, with_memories("dense", -0.12), with_memories("fisher", 0.06, ranking="per_layer")]
PLANS = {"dense": [1536] * 30, "koff": [1400 - 20 * (i % 9) for i in range(30)], "wanda": [1240] * 30}
LOG = [
    {"step": i, "loss": 2 + 1 / (i + 1), "sparsity": min(0.12, i / 100), "tokens_per_second": 200.0}
    for i in range(40)
]


def write(folder: Path, rows: Sequence[Row] = FULL, **keys: Any) -> tuple[dict[str, Any], str]:
    options: dict[str, Any] = {
        "model": {"source": "a/model <b>", "revision": None},
        "recipe_digest": "f" * 64,
        "versions": {"torch": "2.13.0"},
        "rows": rows,
        "notes": ["No speed-up was measured."],
        "overlap": {"start": "fisher", "share": 0.86, "removed": 9400},
        "plans": PLANS,
        "log": LOG,
        **keys,
    }
    write_report(folder, **options)
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (row("dense"), "dense"),
        (with_memories("dense", 0), "dense + memories (ceiling)"),
        (KOFF, "koff"),
        (OFF, "koff, memories off"),
        (row("koff"), "koff, bare"),
        (row("koff", learned_with="none"), "koff mask learned without memories, bare"),
        (
            with_memories("koff", 0, learned_with="none"),
            "koff mask learned without memories, memories trained afterwards",
        ),
        (row("koff", learned_with="lora", memory="lora"), "koff, LoRA only"),
        (with_memories("koff", 0, learned_with="lora"), "koff, learned with LoRA only"),
        (row("koff", learned_with="kv", trained_with="kv"), "koff, memories off, learned with KV only"),
        (with_memories("koff", 0, gates="hard_concrete"), "koff, hard concrete gates"),
        (with_memories("koff", 0, note="gates not learned"), "koff, gates not learned"),
        (with_memories("koff", 0, swap="medicine"), "koff, memory of medicine throughout"),
        (row("wanda", ranking="global"), "wanda, global ranking, bare"),
        (with_memories("fisher", 0, ranking="per_layer"), "fisher, per-layer ranking, with memories"),
        (row("fisher", trained_with="kv", memory="kv"), "fisher, global ranking, with memories, KV only"),
        (row("taylor", trained_with="lora+kv"), "taylor, global ranking, memories off"),
        (row("random"), "random, bare"),
    ],
)  # fmt: skip
def test_labels(given: Row, label: str) -> None:
    assert row_label(given) == label


def test_a_variant_with_koffs_own_plan_that_beats_it_is_said() -> None:
    """The mask is the same; what differs is how the memories were trained."""
    afterwards = with_memories("koff", 0.01, learned_with="none")
    told = judge([*FULL, afterwards]).sentences
    assert any("does not beat koff mask learned without memories" in s for s in told), told
    assert not any("koff, memories off" in s for s in told)


def test_a_window_of_many_tokens_weighs_more_than_one_of_few() -> None:
    """In a conversation windows hold different numbers of answered tokens."""
    losses = {"chat": [2.0, 4.0]}
    assert perplexities(losses, {"chat": [30, 10]})["chat"] == pytest.approx(math.exp(2.5))
    rows = [row("dense", documents={"chat": [0, 1]}, nll=losses, counts={"chat": [30, 10]})]
    draws = resample(rows)
    assert draws is not None
    assert sorted({round(float(x), 6) for x in draws[0]}) == [2.0, 2.5, 4.0]


def test_labels_that_would_be_equal_are_told_apart() -> None:
    rows = [row("wanda"), row("wanda", compensate="none"), row("wanda", seed=1), row("dense")]
    labels = row_labels(rows)
    assert len(set(labels)) == 4
    assert labels[1] == "wanda, global ranking, bare, not compensated"
    assert labels[2].endswith("seed 1") and labels[3] == "dense"


def test_gates_of_two_forms_are_told_apart_by_their_form() -> None:
    """Not by their plans, which differ from seed to seed."""
    both = [{**KOFF, "plan": "a"}, {**KOFF, "gates": "re_estimated", "plan": "b"}]
    assert row_labels(both) == ["koff, straight-through gates", "koff, re-estimated gates"]


def test_constant_differences_give_exact_figures_with_intervals_of_no_width() -> None:
    verdict = judge(FULL)
    assert verdict.closed is not None and verdict.offloaded is not None
    expected = (0.06 - 0.02) / (0.06 + 0.12)
    assert [verdict.closed[k] for k in ("value", "low", "high")] == pytest.approx([expected] * 3)
    assert verdict.closed["rival"] == "fisher, per-layer ranking, with memories"
    assert verdict.closed["nats"]["rival_minus_koff"]["value"] == pytest.approx(0.04)
    expected = (0.16 - 0.02) - 0.12
    assert [verdict.offloaded[k] for k in ("value", "low", "high")] == pytest.approx([expected] * 3)


def test_the_interval_is_that_of_the_mean_over_documents() -> None:
    """Equal documents and one difference per document: the normal approximation is known."""
    per_document = 0.05 + noise(0.1, 12)
    noisy = with_memories("fisher", 0.02 + np.repeat(per_document, 2))
    draws = resample([noisy, KOFF])
    assert draws is not None and draws.shape == (2, RESAMPLES)
    difference = draws[0] - draws[1]
    # three domains share the same differences but are drawn independently
    error = per_document.std() / math.sqrt(12 * 3)
    assert difference.mean() == pytest.approx(per_document.mean(), abs=3 * error / math.sqrt(RESAMPLES))
    assert difference.std() == pytest.approx(error, rel=0.08)


def test_windows_of_one_document_count_once() -> None:
    """Taking every window for a document of its own would make the interval narrower by the root of two."""
    wobble = np.repeat(noise(0.1, 12), 2)
    alone = {name: list(range(24)) for name in DOMAINS}
    grouped = resample([with_memories("fisher", wobble), KOFF])
    rows = [with_memories("fisher", wobble, documents=alone), with_memories("koff", 0.02, documents=alone)]
    single = resample(rows)
    assert grouped is not None and single is not None
    ratio = (grouped[0] - grouped[1]).std() / (single[0] - single[1]).std()
    assert ratio == pytest.approx(math.sqrt(2), rel=0.1)


def test_differences_between_domains_add_no_width() -> None:
    flat = {name: [float(i)] * 24 for i, name in enumerate(DOMAINS)}
    draws = resample([row("dense", nll=flat)])
    assert draws is not None and np.ptp(draws) == pytest.approx(0)


def test_the_same_rows_give_the_same_intervals() -> None:
    rows = [*FULL[:-1], with_memories("fisher", 0.06 + noise(0.05, 24))]
    assert judge(rows) == judge(rows)


def test_a_gap_that_may_be_zero_gives_no_interval() -> None:
    rows = [*QUICKSTART, with_memories("dense", 0.0), with_memories("fisher", 0.01 + noise(0.3, 24))]
    rows[-1]["perplexity"]["gmean"] = rows[0]["perplexity"]["gmean"] * 1.01
    verdict = judge(rows)
    assert verdict.closed is not None and verdict.closed["low"] is None
    assert any("closed has no interval" in s for s in verdict.sentences)


def test_without_losses_per_window_there_are_values_and_no_intervals() -> None:
    bare = [{k: v for k, v in r.items() if k not in ("nll", "documents")} for r in FULL]
    verdict = judge(bare)  # type: ignore[arg-type]
    assert verdict.closed is not None
    assert verdict.closed["value"] == pytest.approx(0.04 / 0.18) and verdict.closed["low"] is None


def test_missing_rows_are_named_with_the_mend() -> None:
    verdict = judge(QUICKSTART)
    assert verdict.closed is None and verdict.offloaded is None
    closed = next(s for s in verdict.sentences if s.startswith("closed"))
    assert (
        "{method: dense, trained_with: same}" in closed
        and "{method: fisher" in closed
        and "compare" in closed
    )
    offloaded = next(s for s in verdict.sentences if s.startswith("offloaded"))
    assert offloaded.count("{") == 1 and "{method: dense, trained_with: same}" in offloaded
    assert "dense" in judge(FULL[1:]).sentences[-1]  # offloaded needs the bare dense model too
    assert judge([]).closed is None and judge([row("dense")]).closed is None


@pytest.mark.parametrize(
    "stranger",
    [
        {"seed": 1},
        {"compensate": "none"},
        {"sparsity": {"target": 0.25, "realised": 0.25, "of": "total"}},
        {"trained_with": "lora", "memory": "lora"},
        {"swap": "math"},
    ],
)
def test_a_rival_under_other_conditions_is_none(stranger: dict[str, Any]) -> None:
    better = with_memories("taylor", -0.05, **stranger)
    verdict = judge([*FULL, better])
    assert verdict.closed is not None and verdict.closed["rival"].startswith("fisher")


def test_memories_off_are_those_of_koffs_own_plan() -> None:
    """A koff of another plan is another model: it says nothing of what koff offloads, and may beat koff."""
    worse, better = (row("koff", nats, trained_with="lora+kv", plan="another") for nats in (0.5, 0.01))
    dense, koff, *rest = FULL
    assert judge([dense, koff, worse, *rest]).offloaded == judge(FULL).offloaded is not None
    told = judge([*FULL, better]).sentences
    assert any("does not beat koff, memories off, plan another" in s for s in told), told


def test_losing_is_said() -> None:
    verdict = judge([*FULL, with_memories("taylor", -0.01)])
    assert any("does not beat taylor, global ranking, with memories" in s for s in verdict.sentences)
    assert verdict.closed is not None and verdict.closed["value"] < 0
    assert not any("koff beats" in s for s in verdict.sentences)
    assert "koff beats each of the 3 other rows measured at this budget." in judge(FULL).sentences
    assert "none of which has memories" in judge(QUICKSTART).sentences[0]


def test_a_lead_within_noise_is_said() -> None:
    verdict = judge([*FULL, with_memories("taylor", 0.03 + 0.3 * (-1.0) ** np.array(OWNERS))])
    assert any("lead over taylor" in s and "within noise" in s for s in verdict.sentences)


def diverged(given: Row) -> Row:
    """The same row of a model that gives no number."""
    losses = {name: [math.inf] * len(values) for name, values in WINDOWS.items()}
    return {**given, "nll": losses, "perplexity": dict.fromkeys([*DOMAINS, "gmean"], math.inf)}


@pytest.mark.parametrize("lost", [(1,), (6,), (1, 6), (5,), (2,)])
def test_a_model_that_gives_no_number_beats_nobody_and_closes_nothing(lost: tuple[int, ...]) -> None:
    rows = [diverged(r) if n in lost else r for n, r in enumerate(FULL)]
    told = judge(rows)
    figures = json.dumps([told.closed, told.offloaded])
    assert "NaN" not in figures and "Infinity" not in figures
    said = " ".join([told.headline, *told.sentences])
    assert "nan" not in said and "inf%" not in said
    if 1 in lost:
        assert told.closed is None and "koff beats" not in said and "its loss is not finite" in said


def test_a_lead_without_an_interval_is_no_victory() -> None:
    rows = [{**r, "documents": {name: [0] * 24 for name in DOMAINS}} for r in FULL]
    said = judge(rows).sentences
    assert any("lead over fisher" in s and "is not tested" in s for s in said)
    assert not any("beats" in s for s in said)


def test_one_phase_follows_the_other_in_the_learning_curve() -> None:
    log = [{"step": i, "loss": 2.0, "phase": phase} for phase in ("learn", "settle") for i in range(1, 41)]
    assert ">80<" in (learning_curve(log) or "") and ">60<" in (learning_curve(log) or "")


def test_a_frontier_leaves_nothing_out_in_silence() -> None:
    near = {"dense": [(1e8, 0.0, 1.0)], "fisher, with memories": [(9e7, 0.1, 1.2)]}
    bare = frontier({**near, "koff": [(9e7, 0.1, 1.1)]})
    far = frontier({**near, "koff": [(9e7, 0.1, 4.2)], "magnitude, bare": [(9e7, 0.1, 9.0)]})
    assert "koff" in bare and "beyond" not in bare
    assert "koff" in far and "beyond" in far and "magnitude, bare" in far


def test_memories_that_offload_nothing_are_said() -> None:
    rows = [row("dense"), KOFF, row("koff", 0.14, trained_with="lora+kv"), with_memories("dense", -0.12)]
    verdict = judge(rows)
    assert verdict.offloaded is not None and verdict.offloaded["value"] == pytest.approx(0, abs=1e-9)
    assert any("Offloading is not shown" in s for s in verdict.sentences)


def test_few_documents_are_said() -> None:
    few = {name: [i // 12 for i in range(24)] for name in DOMAINS}
    rows = [row("dense", documents=few), with_memories("koff", 0.02, documents=few)]
    assert any("python 2" in s for s in judge(rows).sentences)


def test_json_has_the_promised_keys(tmp_path: Path) -> None:
    report, _ = write(tmp_path / "run")
    assert report["format"] == 1 and report["recipe"] == "f" * 64
    assert report["versions"] == {"torch": "2.13.0"} and report["model"]["source"] == "a/model <b>"
    assert report["closed"]["low"] == pytest.approx(0.04 / 0.18) and report["offloaded"] is not None
    assert len(report["rows"]) == len(FULL)
    assert set(report["rows"][1]) == {
        "method", "ranking", "gates", "compensate", "learned_with", "trained_with", "memory", "swap",
        "sparsity", "plan", "seed", "tokens", "perplexity", "eval", "parameters", "seconds",
    }  # fmt: skip
    assert any("86.0% were also the choice of its start, fisher" in note for note in report["notes"])
    assert "No speed-up was measured." in report["notes"]


def test_an_overflowed_perplexity_is_null_and_does_not_break_the_report(tmp_path: Path) -> None:
    broken = row("magnitude", math.inf)
    report, page = write(tmp_path, [*QUICKSTART, broken])
    assert report["rows"][-1]["perplexity"]["gmean"] is None and "inf" in page


def test_a_dense_model_without_a_finite_loss_compares_with_nothing(tmp_path: Path) -> None:
    _, page = write(tmp_path, [row("dense", math.inf), row("koff", math.inf, learned_with="none")])
    assert "nan" not in page


def test_a_recipe_without_memories_has_its_koff_too(tmp_path: Path) -> None:
    koff = row("koff", 0.05, learned_with="none", trained_with="none")
    report, page = write(tmp_path, [row("dense"), koff, row("magnitude", 0.9)])
    verdict = judge([row("dense"), koff, row("magnitude", 0.9)])
    assert "removed: koff's perplexity is" in verdict.headline
    assert any("koff beats the other row" in sentence for sentence in verdict.sentences)
    assert any("none was trained" in sentence for sentence in verdict.sentences)
    assert report["closed"] is None and report["offloaded"] is None and "No row of koff" not in page


def test_sizes_say_when_memories_eat_the_saving(tmp_path: Path) -> None:
    report, page = write(tmp_path / "small")
    assert not any("Nothing is saved" in note for note in report["notes"])
    assert "126.8 M" in page  # 118.4 M and three memories of 2.8 M
    large = [{**r, "parameters": {**r["parameters"], "memory": 6_000_000}} for r in FULL]
    report, _ = write(tmp_path / "large", large)  # type: ignore[arg-type]
    assert any("all 3 memories has 136.4 M" in note for note in report["notes"])


@pytest.mark.parametrize("rows", [[], [row("dense")], [KOFF], QUICKSTART])
def test_any_number_of_rows_and_no_log_makes_a_report(tmp_path: Path, rows: list[Row]) -> None:
    report, page = write(tmp_path, rows, plans={}, log=[], overlap=None, notes=[])
    assert len(report["rows"]) == len(rows) and "</html>" in page


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    _, page = write(tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe|\bsrc=", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "a/model &lt;b&gt;" in page and "<b>\n" not in page
    assert page.count("<svg") == 3


def test_the_same_report_is_written_byte_for_byte(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, QUICKSTART)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(KoffError, match="disk is full"):
        write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_terminal_shows_every_row() -> None:
    from rich.console import Console

    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render_table(FULL))
    text = console.export_text()
    for label in row_labels(FULL):
        assert label in text
    assert "gmean" in text and "medicine" in text and "12.01%" in text and "+35.0%" in text


class _Dom(HTMLParser):
    """Cells of the table `rows`, and the texts inside figures."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.figures = 0
        self.drawn = ""
        self.table: str | None = None
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.table = dict(attrs).get("id")
        if tag == "svg":
            self.figures += 1
        if tag in ("td", "svg"):
            self.inside.append(tag)
            if tag == "td":
                self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside == ["td"] and self.table == "rows":
            self.cells[-1] += data
        if self.inside == ["svg"]:
            self.drawn += data


def _chromium(tmp_path: Path, *arguments: str) -> str:
    command = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if command is None:
        message = "chromium is not installed: run tests/install-chromium.sh, or install the package chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    result = subprocess.run([command, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def _screenshot(tmp_path: Path, page: Path, width: int, height: int) -> np.ndarray:
    from matplotlib.image import imread

    picture = tmp_path / f"page-{width}.png"
    _chromium(tmp_path, f"--screenshot={picture}", f"--window-size={width},{height}", page.as_uri())
    return np.asarray(imread(picture))[..., :3]


def test_chromium_shows_the_table_and_the_figures(tmp_path: Path) -> None:
    write(tmp_path)
    page = tmp_path / "report.html"
    dom = _Dom()
    dom.feed(_chromium(tmp_path, "--dump-dom", page.as_uri()))
    for label in row_labels(FULL):
        assert label in dom.cells
    assert f"{FULL[1]['perplexity']['gmean']:.2f}" in dom.cells and "12.01%" in dom.cells
    assert dom.figures == 3
    for drawn in ("perplexity, geometric mean", "FFN neurons kept", "optimizer step"):
        assert drawn in dom.drawn

    wide = _screenshot(tmp_path, page, 1100, 2200)
    assert wide.shape[1] == 1100
    blue = np.abs(wide - np.array([0x1F, 0x5F, 0xBF]) / 255).max(axis=-1) < 0.05  # koff's bars and lines
    assert blue.sum() > 2000 and (wide.mean(axis=-1) < 0.5).sum() > 5000
    narrow = _screenshot(tmp_path, page, 500, 1200)
    assert (narrow.mean(axis=-1) < 0.5).sum() > 3000


def test_offloaded_begins_from_what_the_ceilings_memories_are_around() -> None:
    """With a recovery the dense model without memories is not the dense model as it came."""
    lora = {"trained_with": "lora", "memory": "lora"}
    offs = [row("dense", -0.03, trained_with="lora"), row("dense", -0.05, trained_with="lora+kv")]
    rows = [*QUICKSTART, row("dense", -0.1, **lora), offs[0], with_memories("dense", -0.12), offs[1]]
    found = judge(rows).offloaded
    assert found is not None
    assert found["value"] == pytest.approx((0.16 - 0.02) - (0.12 - 0.05), abs=1e-9)
    labels = row_labels(rows)
    assert len(set(labels)) == len(labels)


def test_an_interval_is_of_95_in_a_hundred_draws() -> None:
    found = estimate(0.0, np.arange(10001.0))
    assert (found.low, found.high) == (250, 9750)
