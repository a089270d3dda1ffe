"""Specialisation and swapped memories: figures worked out by hand, and the command on a finished run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from model_helpers import tiny_model, token_ids
from run_helpers import koff_prune, mistake, recipe_of

from koff_prune.specialise import activity, entropy, odds_of_removal, specific, strata


def test_the_pooled_odds_ratio_is_mantel_and_haenszels() -> None:
    """Two strata (10, 20, 5, 40) and (6, 4, 9, 16): sum(ad/n) / sum(bc/n), worked out by hand."""
    gone, owned, at = [], [], []
    for k, (a, b, c, d) in enumerate([(10, 20, 5, 40), (6, 4, 9, 16)]):
        for count, g, s in ((a, True, True), (b, False, True), (c, True, False), (d, False, False)):
            gone += [g] * count
            owned += [s] * count
            at += [k] * count
    odds = odds_of_removal(torch.tensor(gone), torch.tensor(owned), torch.tensor(at))
    r, t = 10 * 40 / 75 + 6 * 16 / 35, 20 * 5 / 75 + 4 * 9 / 35
    assert odds.ratio == pytest.approx(r / t)
    # Robins, Breslow and Greenland 1986, by hand for the two strata
    rs, ts = [10 * 40 / 75, 6 * 16 / 35], [20 * 5 / 75, 4 * 9 / 35]
    ps, qs = [50 / 75, 22 / 35], [25 / 75, 13 / 35]
    variance = (
        sum(p * x for p, x in zip(ps, rs, strict=True)) / (2 * r * r)
        + sum(p * y + q * x for p, q, x, y in zip(ps, qs, rs, ts, strict=True)) / (2 * r * t)
        + sum(q * y for q, y in zip(qs, ts, strict=True)) / (2 * t * t)
    )
    assert odds.ratio is not None and odds.low is not None and odds.high is not None
    assert math.log(odds.high / odds.ratio) == pytest.approx(1.959964 * math.sqrt(variance))
    assert odds.low * odds.high == pytest.approx(odds.ratio**2)
    assert odds.specific_removed == pytest.approx(16 / 40)


def test_an_odds_ratio_without_evidence_is_undefined() -> None:
    """Nothing removed: there are no odds, and no infinity is invented."""
    nothing = torch.zeros(8, dtype=torch.bool)
    owned = torch.tensor([True] * 4 + [False] * 4)
    assert odds_of_removal(nothing, owned, torch.zeros(8, dtype=torch.long)).ratio is None


def test_entropy_and_the_specific_neurons() -> None:
    """One neuron fires in one domain alone, one in both alike, one never, one hardly ever."""
    probability = torch.tensor([[[0.8, 0.5, 0.0, 0.01]], [[0.0, 0.5, 0.0, 0.0]]])
    found = entropy(probability)[0]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] == pytest.approx(math.log(2))
    assert found[2] == pytest.approx(math.log(2)), "a dead neuron is nobody's"
    # the last neuron's entropy is 0 too, but no domain activates it as often as most activations are
    assert specific(probability, 0.25, 0.6).tolist() == [[0, -1, -1, -1]]
    assert specific(probability, 0.75, 0.6).tolist() == [[0, 0, -1, -1]]


def test_specific_neurons_are_the_papers() -> None:
    """Chosen one by one as Tang et al. do: the lowest 1% in entropy of those above the 95th percentile."""
    probability = torch.rand(3, 4, 500, generator=torch.Generator().manual_seed(0)) ** 3
    bar = sorted(probability.flatten().tolist())[round(0.95 * probability.numel())]
    entropies = []
    for neuron in range(4 * 500):
        p = probability.flatten(1)[:, neuron].tolist()
        shares = [x / sum(p) for x in p]
        if max(p) >= bar:
            entropies.append((-sum(s * math.log(s) for s in shares if s), neuron, p.index(max(p))))
    wanted = torch.full((4 * 500,), -1)
    for _, neuron, owner in sorted(entropies)[:20]:
        wanted[neuron] = owner
    assert torch.equal(specific(probability).flatten(), wanted)


def test_strata_are_deciles_inside_a_layer() -> None:
    """Twenty neurons: two in each decile, the next layer's strata are others."""
    found = strata(torch.stack([torch.arange(20.0), -torch.arange(20.0)]))
    assert found[0].tolist() == [n // 2 for n in range(20)]
    assert found[1].tolist() == [10 + n // 2 for n in reversed(range(20))]


def test_activity_counts_what_the_model_does() -> None:
    """Probabilities and strengths equal those of the feed-forward computed apart from any hook."""
    model = tiny_model()
    windows = {"a": token_ids(2, 8), "b": token_ids(3, 8, seed=1)}
    seen = activity(model, windows)
    for i, layer in enumerate(model.model.layers):
        mlp, strengths = layer.mlp, []
        for n, rows in enumerate(windows.values()):
            inputs: list[torch.Tensor] = []
            handle = mlp.register_forward_pre_hook(lambda m, a, into=inputs: into.append(a[0].detach()))
            model.model(input_ids=rows)
            handle.remove()
            gate, up = mlp.act_fn(mlp.gate_proj(inputs[0])), mlp.up_proj(inputs[0])
            torch.testing.assert_close(seen.probability[n, i], (gate > 0).float().mean((0, 1)))
            strengths.append((gate * up).abs().mean((0, 1)))
        torch.testing.assert_close(seen.strength[i], (strengths[0] + strengths[1]) / 2)


def test_the_command_on_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """analysis.json names koff and its rivals; the diagonal of the swaps is what the run's memories score."""
    out = tmp_path / "run"
    assert koff_prune(capsys, "compare", recipe_of(tmp_path), "--out", out).code == 0
    answer = koff_prune(capsys, "analyze", out, "--specific", "0.2")
    assert answer.code == 0, answer.err
    found = json.loads((out / "analysis.json").read_text())
    assert set(found["specialisation"]["odds"]) == {"koff", "fisher", "curvature", "wanda", "random"}
    others = found["specialisation"]["other_definitions"]
    assert [(d["often"], d["fraction"]) for d in others] == [(0.95, 0.05), (0.5, 0.01), (0.5, 0.05)]
    report = json.loads((out / "report.json").read_text())
    koff = next(r for r in report["rows"] if r["method"] == "koff" and r["memory"] != "none")
    for domain, row in found["swaps"]["nats"].items():
        assert math.exp(row[domain]) == pytest.approx(koff["perplexity"][domain])
        assert found["swaps"]["wrong_minus_right"][domain].keys() == row.keys() - {domain}
    assert "odds ratio" in (out / "analysis.md").read_text()
    assert "<svg" in (out / "analysis.html").read_text()


def test_what_is_no_finished_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that names the folder and the mend."""
    answer = koff_prune(capsys, "analyze", tmp_path)
    assert answer.code == 2
    assert "holds no finished run" in answer.err and answer.err.count("\n") == 1
    (tmp_path / "run.json").write_text("{}")
    mistake(koff_prune(capsys, "analyze", tmp_path), "go on with `koff-prune apply RECIPE --out", "--resume`")
    (tmp_path / "run.json").rename(tmp_path / "koff.json")
    mistake(koff_prune(capsys, "analyze", tmp_path), "it is a bundle: name the folder of the run")


def test_a_run_without_memories_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is finished; it has nothing to swap and nothing to merge."""
    out = tmp_path / "run"
    recipe = recipe_of(tmp_path, memory={"lora": "none", "kv": "none"}, learn={"settle_tokens": 0})
    merged = koff_prune(capsys, "export", recipe, "--out", out, "--merge", "law")
    assert merged.code == 2 and "the recipe has no memories" in merged.err, merged.err
    assert koff_prune(capsys, "cut", recipe, "--out", out, "--resume").code == 0
    for command in ("analyze", "tasks"):
        answer = koff_prune(capsys, command, out)
        assert answer.code == 2 and "a run without memories" in answer.err, answer.err
