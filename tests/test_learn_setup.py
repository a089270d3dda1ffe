"""How learning is set up and taken down: rates, ramp, the teacher, and the model's own weights."""

from __future__ import annotations

import math
import os
import signal
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import memories_on, tiny_model, tiny_shape, token_ids
from safetensors.torch import load_file
from test_learn import STEPS, TOKENS, WINDOWS, checksum, everything, section, start

from koff_export.errors import KoffError
from koff_prune.checkpoints import whole_checkpoints
from koff_prune.compensate import Compensation
from koff_prune.evaluate import window_losses
from koff_prune.gates import Gates
from koff_prune.learn import LATE, STATE, LearnTrainer, Phase, train
from koff_prune.learner import Learner
from koff_prune.memory import Memories
from koff_prune.recipe import Learn, Memory
from koff_prune.scores import collect
from koff_prune.seals import seal
from koff_prune.units import KINDS, read_units


def compensation() -> Compensation:
    model = tiny_shape("llama")
    units = read_units(model)
    return Compensation(collect(model, units, KINDS, token_ids(4, 16)).second, 0.01, units)


def test_the_teacher_is_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, while the pupil is under a mask, predictions and a memory."""
    dense, taught = tiny_shape("llama"), []
    teach = Learner._dense

    def spy(self: Learner, hidden: Any, input_ids: torch.Tensor) -> torch.Tensor:
        found = teach(self, hidden, input_ids)
        with torch.no_grad():
            own = dense.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        taught.append(torch.equal(found, own.reshape(found.shape)))
        return found

    monkeypatch.setattr(Learner, "_dense", spy)
    memories, gates = start("re_estimated")
    train(
        memories, WINDOWS, section(loss={"ce": 0.5, "kl": 1.0}), Phase(TOKENS, 0, 1), tmp_path,
        gates=gates, compensation=compensation(), sparsity=0.3,
    )  # fmt: skip
    assert taught == [True] * (STEPS * len(WINDOWS))


@pytest.mark.parametrize("form", ["re_estimated", "straight_through"])
def test_a_failure_leaves_the_model_as_it_was(form: str, tmp_path: Path) -> None:
    memories, gates = start(form)
    base = checksum(memories.base)

    def fails(step: int, *rest: Any) -> None:
        assert any(m._forward_pre_hooks for m in memories.base.model.layers.modules())
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        train(
            memories, WINDOWS, section(), Phase(TOKENS, 0, 1), tmp_path, gates=gates,
            compensation=compensation(), sparsity=0.3, report=fails,
        )  # fmt: skip
    assert checksum(memories.base) == base
    assert not any(m._forward_pre_hooks for m in memories.base.model.layers.modules())


def test_gradient_checkpointing_changes_no_gate(tmp_path: Path) -> None:
    """What is computed twice is not counted twice."""
    found = []
    for name, saves in (("plain", False), ("saved", True)):
        memories, gates = start("re_estimated")
        train(
            memories, WINDOWS, section(gradient_checkpointing=saves), Phase(TOKENS, 0, 1), tmp_path / name,
            gates=gates, compensation=compensation(), sparsity=0.3,
        )  # fmt: skip
        assert float(gates.squares.sum()) > 0
        found.append((gates.squares, gates.alpha.detach(), everything(memories)))
    (squares, alpha, plain), (again, alpha_again, saved) = found
    torch.testing.assert_close(squares, again, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(alpha, alpha_again, rtol=1e-4, atol=1e-8)
    assert all(torch.allclose(plain[k], saved[k], atol=1e-5) for k in plain)


def optimizer_of(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """Where the optimizers of trainings to come are found."""
    made: list[torch.optim.Optimizer] = []
    create = LearnTrainer.create_optimizer

    def spy(self: LearnTrainer, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made.append(create(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(LearnTrainer, "create_optimizer", spy)
    return made


def test_rates_are_of_their_kind_and_follow_both_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA, KV and gates have theirs; multipliers ascend; one cosine runs through joint and settle phase."""
    made = optimizer_of(monkeypatch)
    rates = {"lora": 1e-3, "kv": 2e-3}
    learn = section(rates=rates, warmup=0.01, gates={"learning_rate": 3e-3})
    shares: list[list[float]] = []
    for name, phase in (("joint", Phase(TOKENS, 0.0, 0.5)), ("settle", Phase(TOKENS, 0.5, 1.0))):
        memories, gates = start("hard_concrete")
        shares.append([])
        settles = name == "settle"

        def note(step: int, *rest: Any) -> None:
            shares[-1].append(made[-1].param_groups[0]["lr"] / rates["lora"])

        train(
            memories, WINDOWS, learn, phase, tmp_path / name, gates=None if settles else gates,
            sparsity=0.3, report=note,
        )  # fmt: skip
        groups = made[-1].param_groups
        kinds = [memories.lora_parameters(), memories.kv_parameters()]
        for group, params in zip(groups, kinds, strict=False):
            assert {id(p) for p in group["params"]} == {id(p) for p in params}
        initial = [group["initial_lr"] for group in groups]
        if settles:
            assert initial == [1e-3, 2e-3]
            continue
        assert initial == [1e-3, 2e-3, 3e-3, 3e-3]
        assert groups[2]["params"] == [gates.alpha] and groups[3]["params"] == [gates.lagrange]
        assert [group["maximize"] for group in groups] == [False, False, False, True]
    half = [n / STEPS / 2 for n in range(1, STEPS + 1)]  # told after a step: the rate of the next
    for found, begin in zip(shares, (0.0, 0.5), strict=True):
        wanted = [LATE + (1 - LATE) * 0.5 * (1 + math.cos(math.pi * (begin + share))) for share in half]
        assert found == pytest.approx(wanted, rel=1e-6)


def test_rates_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over half of the four steps here: at the first the rate is half of what the cosine has."""
    made, rates = optimizer_of(monkeypatch), []
    begin = Learner.begin_step

    def spy(self: Learner, step: int, target: float) -> None:
        rates.append(made[-1].param_groups[0]["lr"] / made[-1].param_groups[0]["initial_lr"])
        begin(self, step, target)

    monkeypatch.setattr(Learner, "begin_step", spy)
    memories, gates = start()
    train(
        memories, WINDOWS, section(warmup=0.5), Phase(TOKENS, 0.0, 1.0), tmp_path, gates=gates, sparsity=0.3
    )
    cosine = [LATE + (1 - LATE) * 0.5 * (1 + math.cos(math.pi * n / STEPS)) for n in range(STEPS)]
    assert rates == pytest.approx([0.5 * cosine[0], *cosine[1:]], rel=1e-6)


def test_gates_are_told_of_the_tokens_that_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    observe = Gates.observe

    def spy(self: Gates, tokens: int) -> None:
        told.append(tokens)
        observe(self, tokens)

    monkeypatch.setattr(Gates, "observe", spy)
    half = {name: rows.clone() for name, rows in WINDOWS.items()}
    for rows in half.values():
        rows[:, :9] = -1 - rows[:, :9]  # 8 of 15 predicted tokens are read alone
    memories, gates = start("re_estimated")
    train(memories, half, section(), Phase(TOKENS, 0, 1), tmp_path, gates=gates, sparsity=0.3)
    step = TOKENS // STEPS
    assert told == [step * 7 // 15] * STEPS


def test_the_target_ramps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[float] = []
    begin = Learner.begin_step

    def spy(self: Learner, step: int, target: float) -> None:
        targets.append(target)
        begin(self, step, target)

    monkeypatch.setattr(Learner, "begin_step", spy)
    memories, gates = start()
    train(
        memories, WINDOWS, section(gates={"ramp": 0.75}), Phase(TOKENS, 0, 1), tmp_path, gates=gates,
        sparsity=0.3,
    )  # fmt: skip
    assert targets == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_a_gradient_that_is_not_finite_is_in_no_checkpoint(tmp_path: Path) -> None:
    """It would be in every parameter after the step, and no run could go on from what is saved then."""
    memories, gates = start("re_estimated")
    calls: list[int] = []

    def breaks(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (math.inf if len(calls) == STEPS else 1.0)

    hook = memories.kv["law"].values[0].register_hook(breaks)
    learn = section().model_copy(update={"checkpoint_steps": 1})

    def learning() -> None:
        train(
            memories, WINDOWS, learn, Phase(TOKENS, 0, 1), tmp_path, gates=gates,
            compensation=compensation(), sparsity=0.3,
        )  # fmt: skip

    with pytest.raises(KoffError, match="a gradient is not finite at step"):
        learning()
    saved = whole_checkpoints(tmp_path)
    assert saved and all(torch.isfinite(t).all() for t in load_file(saved[-1] / STATE).values())
    hook.remove()
    learning()
    assert all(torch.isfinite(t).all() for t in everything(memories).values())


def test_checkpoints_may_come_at_other_steps_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    module = import_module("koff_prune.learn")  # the package has a function of this name
    monkeypatch.setattr(module, "seal", lambda folder: (saved.append(folder.name), seal(folder)))
    for steps, until in ((1, 1), (1000, 0)):
        memories, gates = start()
        learn = section().model_copy(update={"checkpoint_steps": steps})

        def stop(step: int, *rest: Any, until: int = until) -> None:
            if step == until:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt) if until else nullcontext():
            train(
                memories, WINDOWS, learn, Phase(TOKENS, 0, 1), tmp_path, gates=gates, sparsity=0.3,
                report=stop,
            )  # fmt: skip
    assert saved[-1] == f"checkpoint-{STEPS}" and int(saved[-2].removeprefix("checkpoint-")) <= 2, saved


def test_what_is_learned_is_the_loss_that_is_measured() -> None:
    """Also where a model caps its logits, which a head by itself knows nothing of."""
    for cap in (None, 1.0):
        model = tiny_model("gemma3", num_hidden_layers=1, final_logit_softcapping=cap)
        memories = Memories(model, Memory(lora=None, kv=None), {"law": token_ids(5)}, 0)
        window = token_ids(1, 20, seed=3)
        learned = Learner(memories, None, None, Learn(), None)(window, torch.zeros(1, dtype=torch.long))
        (measured,) = window_losses(memories, window, None)
        assert float(learned) == pytest.approx(measured, rel=1e-5)


def test_attention_is_learned_without_its_dropout(tmp_path: Path) -> None:
    losses: dict[float, list[float]] = {0.0: [], 0.5: []}
    for dropout, found in losses.items():
        memories = memories_on(tiny_model(num_hidden_layers=1, attention_dropout=dropout))
        windows = dict(zip(memories.domains, WINDOWS.values(), strict=False))
        train(
            memories, windows, section(), Phase(TOKENS, 0, 1), tmp_path / str(dropout),
            report=lambda step, loss, _, into=found: into.append(loss),
        )  # fmt: skip
    assert losses[0.5] == losses[0.0] and losses[0.0]


def test_a_gradient_that_is_not_finite_can_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing moves by it, no gate counts it, and the next step goes on."""
    memories, gates = start("re_estimated")
    before, after_first, calls = everything(memories), [], []

    def breaks(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (math.nan if len(calls) == 1 else 1.0)

    def note(step: int, *rest: Any) -> None:
        if step == 1:
            after_first.append((everything(memories), gates.squares.clone(), gates.alpha.detach().clone()))

    memories.kv["law"].values[0].register_hook(breaks)
    alpha = gates.alpha.detach().clone()
    skipping = section().model_copy(update={"non_finite": "skip"})
    train(
        memories, WINDOWS, skipping, Phase(TOKENS, 0, 1), tmp_path, gates=gates,
        compensation=compensation(), sparsity=0.3, report=note,
    )  # fmt: skip
    assert "a gradient is not finite at step 1" in " ".join(capsys.readouterr().err.split())
    ((tensors, squares, then),) = after_first
    assert all(torch.equal(tensors[k], before[k]) for k in before)
    assert float(squares.abs().sum()) == 0 and torch.equal(then, alpha)
    assert all(torch.isfinite(t).all() for t in everything(memories).values())
    assert not torch.equal(gates.alpha, alpha)
