"""Sweeps: sub-runs that share what they can, and sums over seeds against figures worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import tiny_config
from run_helpers import koff_prune, mistake, recipe_of
from text_helpers import save_tiny_model

from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_prune.points import Point, points
from koff_prune.sweep import share
from koff_prune.sweep_report import markdown, summarise, write_sweep
from koff_prune.tensor_file import load_tensors, save_tensors


def row(method: str, nats: float, seed: int, *, memory: str = "lora+kv", plan: str | None = None) -> Any:
    """One row with two domains, six documents each, whose losses scatter around `nats`."""
    generator = np.random.default_rng(7)
    noise = generator.normal(0, 0.3, (2, 6))
    noise -= noise.mean(1, keepdims=True)
    nll = {name: [nats + float(x) for x in noise[n]] for n, name in enumerate(("a", "b"))}
    gmean = math.exp(nats)
    return {
        "method": method, "ranking": None if method in ("koff", "dense") else "global", "gates": None,
        "compensate": "none" if method == "dense" else "least_squares",
        "learned_with": "lora+kv" if method == "koff" else None, "trained_with": memory, "memory": memory,
        "swap": None,
        "sparsity": {"target": 0.1, "realised": 0.0 if method == "dense" else 0.1, "of": "total"},
        "plan": plan, "seed": seed, "tokens": {}, "perplexity": {"a": gmean, "b": gmean, "gmean": gmean},
        "eval": {}, "parameters": {"backbone": 1000 if method == "dense" else 900, "memory": 10},
        "seconds": 1.0,
        "nll": nll, "documents": {"a": list(range(6)), "b": list(range(6))},
    }  # fmt: skip


def seeds_of(leads: list[float], offloaded: float = 0.05) -> list[tuple[Point, list[Any]]]:
    """One sub-run per lead of koff over fisher (nats); wanda is far behind; the ceiling 0.2 below fisher."""
    found = []
    for seed, lead in enumerate(leads):
        koff = {**row("koff", 2.3 - lead, seed), "plan": "k"}
        off = {
            **row("koff", 2.4 + offloaded - lead, seed, memory="none"),
            "plan": "k",
            "trained_with": "lora+kv",
        }
        rows = [
            row("dense", 2.2, seed, memory="none"), koff, off, row("dense", 2.1, seed),
            row("fisher", 2.3, seed), row("wanda", 2.9, seed),
        ]  # fmt: skip
        found.append((Point(seed, 0.1, None), rows))
    return found


def test_a_sweeps_offloaded_begins_from_what_the_ceilings_memories_are_around() -> None:
    found = [
        (point, [*rows, {**row("dense", 2.15, point.seed, memory="none"), "trained_with": "lora+kv"}])
        for point, rows in seeds_of([0.04, 0.05])
    ]
    (point,) = summarise(found)["points"]
    assert point["offloaded"]["value"] == pytest.approx(0.05 + 0.05)


def test_closed_and_offloaded_are_means_over_seeds() -> None:
    """(rival - koff) / (rival - ceiling) = mean(0.04, 0.05, 0.06) / 0.2; offloaded as DESIGN defines it."""
    summary = summarise(seeds_of([0.04, 0.05, 0.06]))
    (point,) = summary["points"]
    assert point["closed"]["value"] == pytest.approx(0.25)
    assert point["closed"]["rival"].startswith("fisher")
    # Student's t of 2 degrees of freedom; noise that all rows share is none of the ratio's
    half = 4.3027 * 0.05 / math.sqrt(3)
    assert point["closed"]["low"] == pytest.approx(0.25 - half, abs=1e-4)
    assert point["closed"]["high"] == pytest.approx(0.25 + half, abs=1e-4)
    # off - koff = 0.1 + 0.05 in every seed, dense - ceiling = 0.1
    assert point["offloaded"]["value"] == pytest.approx(0.05)
    koff = next(r for r in point["rows"] if r["label"] == "koff")
    assert koff["perplexity"] == pytest.approx(math.exp(2.25))
    assert koff["beside_dense"] == pytest.approx(math.exp(0.05))
    assert koff["std_nats"] == pytest.approx(0.01)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_few_seeds_cover_what_they_say(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 sweeps whose truth is 0.05 nats and a quarter closed, about 95% have it in their intervals."""
    monkeypatch.setattr("koff_prune.verdict.RESAMPLES", 50)
    generator = np.random.default_rng(0)
    within = {"closed": 0, "offloaded": 0}
    for _ in range(200):
        found = seeds_of([0.05 + x for x in generator.normal(0, 0.01, seeds)])
        for _, rows in found:
            off = rows[2]
            moved = float(generator.normal(0, 0.01))
            gmean = off["perplexity"]["gmean"] * math.exp(moved)
            off["perplexity"] = {"a": gmean, "b": gmean, "gmean": gmean}
        (point,) = summarise(found)["points"]
        for name, truth in (("closed", 0.25), ("offloaded", 0.05)):
            within[name] += point[name]["low"] < truth < point[name]["high"]
    assert all(183 <= count <= 197 for count in within.values()), within


def test_a_share_that_is_the_same_in_every_seed_has_no_spread() -> None:
    """A quarter of the gap in each, however wide the gap: what both share is no noise of their ratio."""
    found = seeds_of([0.05, 0.05, 0.05])
    for n, (_, rows) in enumerate(found):
        for at, part in ((1, -0.25), (3, -1.0)):  # koff and the ceiling, from the rival at 2.3
            nats = 2.3 + part * (0.2 + 0.1 * n)
            rows[at] = {**row(rows[at]["method"], nats, n), "plan": rows[at]["plan"]}
    (point,) = summarise(found)["points"]
    assert point["closed"]["value"] == pytest.approx(0.25)
    assert point["closed"]["high"] - point["closed"]["low"] < 0.01


def test_other_documents_in_another_seed_are_new_ones() -> None:
    """Eight seeds with six documents each of their own: about a root of eight narrower than with six."""
    generator = np.random.default_rng(3)
    noise = {name: generator.normal(0, 0.2, 6).tolist() for name in "ab"}
    widths = []
    for apart in (False, True):
        found = seeds_of([0.05] * 8)
        for n, (_, rows) in enumerate(found):
            nll = {
                name: [x + y for x, y in zip(rows[2]["nll"][name], noise[name], strict=True)] for name in "ab"
            }
            means = {name: math.exp(sum(values) / 6) for name, values in nll.items()}
            rows[2] |= {"nll": nll, "perplexity": {**means, "gmean": math.sqrt(means["a"] * means["b"])}}
            for each in rows:
                each["documents"] = {name: [6 * n * apart + i for i in range(6)] for name in "ab"}
        (point,) = summarise(found)["points"]
        widths.append(point["offloaded"]["high"] - point["offloaded"]["low"])
    assert widths[1] < 0.6 * widths[0]


def test_the_same_documents_are_no_new_ones_in_another_seed() -> None:
    """Where seeds differ in nothing, the interval is as wide as one seed's documents make it."""
    generator = np.random.default_rng(3)
    noise = {name: generator.normal(0, 0.2, 6).tolist() for name in "ab"}
    widths = []
    for count in (1, 8):
        found = seeds_of([0.05] * count)
        for _, rows in found:
            nll = {
                name: [x + y for x, y in zip(rows[2]["nll"][name], noise[name], strict=True)] for name in "ab"
            }
            means = {name: math.exp(sum(values) / 6) for name, values in nll.items()}
            rows[2] |= {"nll": nll, "perplexity": {**means, "gmean": math.sqrt(means["a"] * means["b"])}}
        (point,) = summarise(found)["points"]
        widths.append(point["offloaded"]["high"] - point["offloaded"]["low"])
    assert widths[1] == pytest.approx(widths[0], rel=0.35)


def test_seeds_that_share_no_document_have_intervals_too() -> None:
    """Six documents each of eighteen: some draws hold none of a seed's, and are none."""
    found = seeds_of([0.05, 0.06, 0.07])
    for n, (_, rows) in enumerate(found):
        for each in rows:
            each["documents"] = {name: [i + 6 * n for i in ids] for name, ids in each["documents"].items()}
    (point,) = summarise(found)["points"]
    for name in ("closed", "offloaded"):
        assert point[name]["low"] < point[name]["value"] < point[name]["high"], point[name]


def test_a_row_that_diverged_spoils_no_other_test() -> None:
    found = seeds_of([0.04, 0.05, 0.06])
    for _, rows in found:
        rows.append({**row("taylor", 2.5, rows[0]["seed"])})
    found[1][1][5]["perplexity"] = dict.fromkeys(("a", "b", "gmean"), math.inf)  # wanda
    summary = summarise(found)
    tests = {t["against"].split(",")[0]: t["koff_is"] for t in summary["tests"]}
    assert tests == {"fisher": "better", "taylor": "better", "wanda": "not to be compared"}
    assert any("wanda" in s and "no finite loss in one of 3 seeds" in s for s in summary["sentences"])
    assert "nan" not in markdown(summary)
    for _, rows in found:  # koff itself: nothing is said of it
        rows[1]["perplexity"] = dict.fromkeys(("a", "b", "gmean"), math.inf)
    (point,) = (lost := summarise(found))["points"]
    assert point["closed"]["value"] is None and point["offloaded"]["value"] is None
    undefined = [s for s in lost["sentences"] if "not defined: one of its losses is not finite" in s]
    assert [s.split(": ")[1].split()[0] for s in undefined] == ["closed", "offloaded"]
    assert not any("better" in s for s in lost["sentences"])


def test_tests_are_paired_by_seed_and_corrected() -> None:
    """t = 0.05 / (0.01 / sqrt 3) = 8.66 on 2 degrees of freedom: p = 0.00654; Holm doubles the smaller."""
    tests = summarise(seeds_of([0.04, 0.05, 0.06]))["tests"]
    by_name = {t["against"].split(",")[0]: t for t in tests}
    assert set(by_name) == {"fisher", "wanda"}
    assert by_name["fisher"]["p_better"] == pytest.approx(0.00654, abs=2e-5)
    assert by_name["fisher"]["p"] == pytest.approx(2 * 0.00654, abs=4e-5), "the word is by both sides"
    smaller, larger = sorted(by_name.values(), key=lambda t: t["p_better"])
    assert smaller["p_better_holm"] == pytest.approx(2 * smaller["p_better"])
    assert larger["p_better_holm"] == pytest.approx(max(larger["p_better"], smaller["p_better_holm"]))
    assert {t["koff_is"] for t in tests} == {"better"}


def test_koff_is_held_against_a_part_of_its_memories_too() -> None:
    """A part alone that is better is told; no baseline's part, and no bare row, is a rival."""
    found = seeds_of([0.04, 0.05, 0.06])
    for seed, (_, rows) in enumerate(found):
        rows.append(
            {**row("koff", 2.2 - seed / 100, seed, memory="lora"), "learned_with": "lora", "plan": "l"}
        )
        rows.append(row("fisher", 2.2, seed, memory="lora"))
        rows.append({**row("koff", 2.0, seed, memory="none"), "learned_with": "none", "plan": "n"})
    summary = summarise(found)
    tests = {test["against"]: test for test in summary["tests"]}
    assert len(tests) == 3 and (lora := tests["koff, LoRA only"])["koff_is"] == "worse"
    assert lora["leads"] == pytest.approx([-0.06, -0.06, -0.06])
    assert any("koff is worse than koff, LoRA only" in sentence for sentence in summary["sentences"])
    koff = next(r for r in summary["points"][0]["rows"] if r["label"] == "koff")
    assert koff["nats"] == pytest.approx([2.26, 2.25, 2.24])


def test_a_lead_that_one_side_alone_shows_is_not_shown() -> None:
    """t = 0.05 / (0.0265 / sqrt 3) = 3.27: one-sided p 0.041, two-sided 0.082."""
    found = seeds_of([0.02, 0.06, 0.07])
    for _, rows in found:
        del rows[5]  # wanda: one test, nothing to correct
    (test,) = summarise(found)["tests"]
    assert test["p_better_holm"] < 0.05 < test["p_holm"]
    assert test["koff_is"] == "not shown to differ"


def test_koffs_row_stands_out_and_shares_are_of_what_they_are_of(tmp_path: Path) -> None:
    """A LoRA alone has another label; of two budgets the figure is of the longer, and says so."""
    found = seeds_of([0.04, 0.05])
    for _, rows in found:
        for each in rows:
            each["sparsity"]["of"] = "blocks"
            for key in ("memory", "trained_with", "learned_with"):
                each[key] = "lora" if each[key] == "lora+kv" else each[key]
    short = [
        (Point(p.seed, p.sparsity, 64), [{**r, "tokens": {"settle": 64}} for r in rows]) for p, rows in found
    ]
    long = [
        (p, [{**r, "tokens": {"score": 9, "learn": 96, "settle": 32}} for r in rows]) for p, rows in found
    ]
    summary = summarise([*long, *short])
    write_sweep(tmp_path, summary)
    page = (tmp_path / "sweep.html").read_text()
    assert page.count('<tr class="ours"><td>koff, LoRA only</td>') == 2
    assert "lower is better, after 128 tokens" in page and "removed of blocks parameters, %" in page
    assert "removed of blocks" in (tmp_path / "sweep.md").read_text()


def test_a_rows_sizes_are_the_backbones_with_one_memory_and_with_one_of_each_domain(tmp_path: Path) -> None:
    """Memories of 10 parameters for two domains; a row without has its backbone in both columns."""
    write_sweep(tmp_path, summarise(seeds_of([0.04, 0.05])))
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0][-2:] == ["with one memory", "with all"]
    assert {cells[0]: cells[-2:] for cells in table[2:]} == {
        "dense": ["1.00 k", "1.00 k"], "dense + memories (ceiling)": ["1.01 k", "1.02 k"],
        "koff": ["910", "920"], "koff, memories off": ["900", "900"],
        "fisher, with memories": ["910", "920"], "wanda, with memories": ["910", "920"],
    }  # fmt: skip


def test_a_loss_is_told_and_one_seed_is_not_tested() -> None:
    """Leads of both signs decide nothing; steady losses are said; a single seed has no test."""
    summary = summarise(seeds_of([0.04, -0.05, 0.01]))
    assert any("not shown to differ from fisher" in s for s in summary["sentences"])
    summary = summarise(seeds_of([-0.04, -0.05, -0.06]))
    assert any("worse than fisher" in s for s in summary["sentences"])
    alone = summarise(seeds_of([-0.04]))
    assert all("p_better" not in t and t["koff_is"] == "not tested" for t in alone["tests"])
    assert any("one seed" in s and "not of fisher" in s for s in alone["sentences"])
    assert "| koff |" in markdown(alone)


def test_a_budget_keeps_the_recipes_split(tmp_path: Path) -> None:
    """Tokens are divided as the recipe divides its own: 384 to 128."""
    from koff_prune.reading import load_recipe

    recipe = load_recipe(recipe_of(tmp_path))
    asked = points(recipe, [0.1, 0.2], [3], [1024])
    assert [p.folder for p in asked] == ["seed-3/sparsity-0.1-tokens-1024", "seed-3/sparsity-0.2-tokens-1024"]
    mine = asked[1].recipe(recipe)
    assert (mine.learn.tokens, mine.learn.settle_tokens) == (768, 256)
    assert (mine.seed, mine.structure.sparsity) == (3, 0.2)


def test_a_sweep_refuses_every_target_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.9 is asked for last, and nothing is trained for 0.1 before it is refused."""
    recipe, out = recipe_of(tmp_path), tmp_path / "sweep"
    answer = koff_prune(capsys, "compare", recipe, "--out", out, "--sparsity", "0.1,0.9")
    assert answer.code == 2 and "structure.sparsity 0.9: at most 0." in answer.err, answer.err
    assert not list(out.rglob("gates.safetensors")) and not list(out.rglob("checkpoints"))


def test_a_sweep_refuses_every_budget_and_model_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = recipe_of(tmp_path), tmp_path / "sweep"
    few = koff_prune(capsys, "compare", recipe, "--out", out, "--tokens", "512,4")
    assert few.code == 2 and few.err.startswith("error: --tokens: of 4, learn.tokens: "), few.err
    (tmp_path / "model").rename(tmp_path / "model0")
    asked = ("--set", "model.source=model{seed}", "--seed", "0,1")
    absent = koff_prune(capsys, "compare", recipe, "--out", tmp_path / "seeds", *asked)
    assert absent.code == 2 and "model1; make it first" in absent.err, absent.err
    assert not list(tmp_path.rglob("statistics.safetensors"))


def test_a_sweep_that_was_moved_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    recipe = recipe_of(here)
    asked = ("--sparsity", "0.1", "--seed", "0,1")
    assert koff_prune(capsys, "compare", recipe, "--out", here / "sweep", *asked).code == 0
    here.rename(there)
    command = ("compare", there / recipe.name, "--out", there / "sweep", *asked, "--resume")
    gates = {p: p.stat().st_mtime_ns for p in there.rglob("gates.safetensors")}
    (there / "sweep" / "seed-1" / "sparsity-0.1" / "rows.json").unlink()
    moved = koff_prune(capsys, *command)
    assert moved.code == 0, moved.err
    assert gates == {p: p.stat().st_mtime_ns for p in there.rglob("gates.safetensors")}


def test_a_sweep_shares_resumes_and_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ceiling is trained once a seed; a second call trains nothing; a new sparsity only its own."""
    compare = [{"method": "dense", "trained_with": "same"}, {"method": "fisher", "trained_with": "same"}]
    recipe = recipe_of(tmp_path, compare=compare)
    out = tmp_path / "sweep"
    command = ("compare", recipe, "--out", out, "--seed", "0,1", "--sparsity")
    first = koff_prune(capsys, *command, "0.1,0.2")
    assert first.code == 0, first.err
    assert "closed" in first.out
    summary = json.loads((out / "sweep.json").read_text())
    assert [p["sparsity"] for p in summary["points"]] == [0.1, 0.2]
    assert all(p["seeds"] == [0, 1] for p in summary["points"])
    ceiling = next((out / "seed-0/sparsity-0.1/rows").glob("dense_trained-lora*"))
    again = out / "seed-0/sparsity-0.2/rows" / ceiling.name / "losses.json"
    assert again.samefile(ceiling / "losses.json"), "linked, not trained again"
    costs = [out / f"seed-0/sparsity-{t}/costs-surgeon.safetensors" for t in (0.1, 0.2)]
    assert costs[0].samefile(costs[1]), "the start's costs know no sparsity"
    assert "<svg" in (out / "sweep.html").read_text()

    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("memories/*/*")}
    refused = koff_prune(capsys, *command, "0.1,0.2")
    assert refused.code == 2 and "--resume" in refused.err
    rows = out / "seed-0/sparsity-0.2/rows.json"
    rows.write_text(json.dumps({**read_json(rows), "rows": None}))  # as good as none, and made again
    grown = koff_prune(capsys, *command, "0.2,0.05", "--resume")
    assert grown.code == 0, grown.err
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    again = json.loads((out / "sweep.json").read_text())["points"]
    assert [p["sparsity"] for p in again] == [0.05, 0.1, 0.2], "what was not asked for again is still there"
    assert again[1:] == summary["points"]
    assert costs[0].samefile(out / "seed-0/sparsity-0.05/costs-surgeon.safetensors")
    summary = again

    shutil.rmtree(out / "seed-0/sparsity-0.2")
    for name in ("costs-surgeon.safetensors", "statistics.safetensors"):
        for folder in ("0.05", "0.1"):
            whole = (out / f"seed-0/sparsity-{folder}" / name).read_bytes()
            (out / f"seed-0/sparsity-{folder}" / name).unlink()
            (out / f"seed-0/sparsity-{folder}" / name).write_bytes(whole[:-1])
    mended = koff_prune(capsys, *command, "0.2", "--resume")
    assert mended.code == 0 and "statistics.safetensors: is damaged" in " ".join(mended.err.split()), (
        mended.err
    )
    assert json.loads((out / "sweep.json").read_text())["points"] == summary


def test_every_budget_has_training_text_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linked from a smaller budget, the larger one would go round and round in that one's windows."""
    from koff_prune.domains import load_blocks

    recipe = recipe_of(
        tmp_path, memory={"lora": "none"}, compare=[{"method": "dense", "trained_with": "same"}]
    )
    answer = koff_prune(capsys, "compare", recipe, "--out", tmp_path / "s", "--tokens", "256,2048")
    assert answer.code == 0, answer.err
    folders = [tmp_path / "s" / f"seed-0/sparsity-0.1-tokens-{t}" for t in (256, 2048)]
    short, long = (len(load_blocks(f / "domains" / "law.safetensors").train) for f in folders)
    assert long > 2 * short
    assert folders[0].joinpath("statistics.safetensors").samefile(folders[1] / "statistics.safetensors")
    refused = koff_prune(capsys, "compare", recipe, "--out", tmp_path / "t", "--tokens", "256",
                         "--set", "learn={tokens: 0, settle_tokens: 0}")  # fmt: skip
    assert refused.code == 2 and "error: --tokens" in refused.err and not (tmp_path / "t").exists()


def test_a_row_added_to_a_finished_sweep_is_measured_in_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the rows that were there are read, not trained again; a loss that is no number is infinite."""
    recipe = recipe_of(tmp_path, memory={"lora": "none"}, compare=["magnitude"])
    command = ("compare", recipe, "--out", tmp_path / "s", "--seed", "0,1")
    assert koff_prune(capsys, *command).code == 0
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("memories/*/*")}
    assert stamps
    grown = koff_prune(capsys, *command, "--resume", "--set", "compare=[magnitude, wanda]")
    assert grown.code == 0, grown.err
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    rows = read_json(tmp_path / "s" / "sweep.json")["points"][0]["rows"]
    assert {r["method"]: r["seeds"] for r in rows}["wanda"] == 2
    one = koff_prune(capsys, *command[:-1], "0", "--resume", "--set", "compare=[magnitude]")
    told = " ".join(one.err.split())
    assert one.code == 0 and "seed-1/sparsity-0.1: lacks rows that are asked for by now" in told, told
    grown = koff_prune(capsys, *command, "--resume", "--set", "compare=[magnitude, wanda]")
    assert grown.code == 0, grown.err
    # nothing is lost if the seeds differ, and nothing breaks where a model gave no number
    broken = next((tmp_path / "s" / "seed-1").glob("sparsity-0.1/rows/wanda*/losses-off.json"))
    losses = read_json(broken)
    broken.write_text(json.dumps({**losses, "law": [None, *losses["law"][1:]]}))
    (tmp_path / "s/seed-1/sparsity-0.1/rows.json").unlink()
    again = koff_prune(capsys, *command, "--resume", "--set", "compare=[magnitude, wanda]")
    assert again.code == 0, again.err
    rows = read_json(tmp_path / "s" / "sweep.json")["points"][0]["rows"]
    assert {r["method"]: r["perplexity"] for r in rows}["wanda"] is None


def test_rows_that_differ_by_ranking_keep_their_names_over_seeds() -> None:
    found = seeds_of([0.04, 0.05])
    for point, rows in found:
        next(r for r in rows if r["method"] == "fisher")["asked"] = ["global"]
        other = {**row("fisher", 2.4, point.seed), "ranking": "per_layer", "plan": f"l{point.seed}"}
        found[point.seed] = (point, [*rows, {**other, "asked": ["per_layer"]}])
    (point,) = summarise(found)["points"]
    fisher = [(r["label"], r["seeds"]) for r in point["rows"] if r["method"] == "fisher"]
    assert fisher == [
        ("fisher, global ranking, with memories", 2),
        ("fisher, per-layer ranking, with memories", 2),
    ]


def test_a_better_ranking_is_one_row_whichever_it_is_in_a_seed() -> None:
    """In one seed the better ranking is the global one, which was asked for by name as well."""
    found = seeds_of([0.04, 0.05, 0.06])
    for point, rows in found:
        fisher = next(r for r in rows if r["method"] == "fisher")
        fisher["asked"] = ["better", "global"]
        if point.seed:
            fisher["asked"] = ["global"]
            rows.append(
                {**row("fisher", 2.3, point.seed), "ranking": "per_layer", "plan": "l", "asked": ["better"]}
            )
    summary = summarise(found)
    (point,) = summary["points"]
    fisher = [(r["label"], r["seeds"]) for r in point["rows"] if r["method"] == "fisher"]
    assert sorted(fisher) == [("fisher, global ranking, with memories", 3), ("fisher, with memories", 3)]
    assert point["closed"]["value"] == pytest.approx(0.25)
    assert len(summary["tests"]) == 3


def test_a_row_that_is_koff_by_another_name_spoils_no_test() -> None:
    found = seeds_of([0.04, 0.05, 0.06])
    for point, rows in found:
        twin = {**row("koff", 2.3 - [0.04, 0.05, 0.06][point.seed], point.seed), "plan": "k", "note": "twin"}
        rows.insert(1, twin)
        rows.append(rows.pop(1))
    tests = {t["against"]: t for t in summarise(found)["tests"]}
    assert tests["koff, twin"]["koff_is"] == "not shown to differ"
    assert {t["koff_is"] for name, t in tests.items() if "fisher" in name or "wanda" in name} == {"better"}


def test_a_share_of_a_gap_that_may_be_nothing_is_not_told() -> None:
    """fisher at the ceiling but for a thousandth of a nat in one seed: no percentage says anything."""
    found = seeds_of([0.001, 0.0005])
    for _, rows in found:
        rows[3] = row("dense", 2.3 - (0.001 if rows[3]["seed"] else -0.0008), rows[3]["seed"])
    summary = summarise(found)
    (point,) = summary["points"]
    assert point["closed"]["value"] is None and point["closed"]["rival"].startswith("fisher")
    assert any("closed is not defined: fisher" in s for s in summary["sentences"])
    assert "%" not in next(s for s in summary["sentences"] if "closed" in s)


def test_one_document_in_a_domain_gives_no_interval() -> None:
    found = seeds_of([0.04, 0.05])
    for _, rows in found:
        for r in rows:
            r["documents"] = {"a": [0] * 6, "b": list(range(6))}
    summary = summarise(found)
    (point,) = summary["points"]
    assert point["closed"]["low"] is None and point["offloaded"]["low"] is None
    assert any("not shown" in s for s in summary["sentences"])
    assert any("few held-out documents (a 1)" in s for s in summary["sentences"])


def test_each_seed_may_have_a_dense_model_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(
        tmp_path, learn={"tokens": 0, "settle_tokens": 0}, memory={"lora": "none", "kv": "none"}
    )
    text = recipe.read_text().replace("source: model\n", "source: ./model-{seed}\n")
    assert "{seed}" in text
    recipe.write_text(text)
    shutil.move(tmp_path / "model", tmp_path / "model-0")
    save_tiny_model(tmp_path / "model-1", tiny_config(num_hidden_layers=2, intermediate_size=64))
    options = ("compare", recipe, "--out", tmp_path / "out")
    answer = koff_prune(capsys, *options, "--seed", "0,1")
    assert answer.code == 0, answer.err
    dense = [read_json(tmp_path / "out" / f"seed-{s}" / "sparsity-0.1" / "plan.json")["parameters"]["dense"]
             for s in (0, 1)]  # fmt: skip
    assert dense[0] != dense[1]
    answer = koff_prune(capsys, *options, "--seed", "0,1,2", "--resume")
    assert answer.code == 2 and "model-2; make it first" in answer.err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--sparsity", "0.1,1.5", "1.5"), ("--seed", "0,0", "twice"), ("--sparsity", "a", "list of numbers")],
)
def test_lists_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    """One sentence naming the option, exit code 2."""
    answer = koff_prune(capsys, "compare", recipe_of(tmp_path), "--out", tmp_path / "s", option, value)
    assert answer.code == 2
    assert option in answer.err and said in answer.err and answer.err.count("\n") == 1


def test_a_sweep_is_of_one_model_and_one_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What changed under a sweep is told, not mixed with what was measured before."""
    recipe = recipe_of(tmp_path, memory={"lora": "none"}, compare=["magnitude"])
    command = ("compare", recipe, "--out", tmp_path / "s", "--resume", "--tokens")
    assert koff_prune(capsys, *command, "256").code == 0
    law = tmp_path / "law" / "0.txt"
    before = law.read_text()
    law.write_text("another text altogether\n")
    mistake(koff_prune(capsys, *command, "256,512"), "domains.law.source", "another --out")
    shutil.rmtree(tmp_path / "s/seed-0/sparsity-0.1-tokens-512")
    law.write_text(before)
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    save_tiny_model(tmp_path / "model", tiny_config(num_hidden_layers=2, initializer_range=0.5))
    mistake(koff_prune(capsys, *command, "256,512"), "model.source", "another --out")
    shutil.rmtree(tmp_path / "s/seed-0/sparsity-0.1-tokens-512")
    mistake(koff_prune(capsys, *command, "256", "--seed", "1"), "model.source", "seed-0", "seed-1")
    shutil.rmtree(tmp_path / "s/seed-1")
    (tmp_path / "model/model.safetensors").write_bytes(weights)
    law.write_text("another text altogether\n")
    mistake(koff_prune(capsys, *command, "256", "--seed", "1"), "domains.law.source", "seed-0", "seed-1")
    shutil.rmtree(tmp_path / "s/seed-1")
    law.write_text(before)
    # made under other versions: true, but not to be shared with rows of these
    stamp = tmp_path / "s/seed-0/sparsity-0.1-tokens-256/run.json"
    told = read_json(stamp)
    stamp.write_text(json.dumps({**told, "versions": {**told["versions"], "torch": "1.0"}}))
    assert koff_prune(capsys, *command, "256,512").code == 0
    files = [tmp_path / f"s/seed-0/sparsity-0.1-tokens-{n}/statistics.safetensors" for n in (256, 512)]
    assert not files[0].samefile(files[1])


def test_where_no_file_can_have_two_names_a_copy_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def breaks_off(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:9])
        raise OSError(28, "No space left on device")

    save_tensors({"alpha": torch.ones(4)}, tmp_path / "a" / "statistics.safetensors")
    monkeypatch.setattr("os.link", refuses)
    with monkeypatch.context() as full:
        full.setattr("shutil.copy2", breaks_off)
        with pytest.raises(KoffError, match="statistics.safetensors: the disk is full"):
            share(tmp_path / "a", tmp_path / "b", same_budget=True)
    assert not list((tmp_path / "b").iterdir())
    share(tmp_path / "a", tmp_path / "b", same_budget=True)
    assert load_tensors(tmp_path / "b" / "statistics.safetensors")["alpha"].tolist() == [1.0] * 4


def test_a_sweep_tells_what_its_reports_warn_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, memory={"lora": {"rank": 64, "alpha": 64}}, compare=["magnitude"])
    answer = koff_prune(capsys, "compare", recipe, "--out", tmp_path / "s", "--sparsity", "0.1,0.2")
    assert answer.code == 0, answer.err
    told = read_json(tmp_path / "s/sweep.json")["sentences"]
    report = read_json(tmp_path / "s/seed-0/sparsity-0.1/report.json")
    assert report["warnings"] and "Nothing is saved in size" in report["warnings"][0]
    both = read_json(tmp_path / "s/seed-0/sparsity-0.2/report.json")["warnings"]
    for warning in report["warnings"]:
        assert told.count(warning if warning in both else f"sparsity 0.1: {warning}") == 1
    mistake(
        koff_prune(capsys, "compare", recipe, "--out", tmp_path / "s", "--resume"), "is a sweep; name its"
    )
    changed = (
        "compare",
        recipe,
        "--out",
        tmp_path / "s",
        "--resume",
        "--sparsity",
        "0.1",
        "--set",
        "learn.batch=1",
    )
    mistake(koff_prune(capsys, *changed), "a sweep of another recipe (learn.batch is 1 here and 2 there)")
