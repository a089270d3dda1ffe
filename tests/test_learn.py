"""The joint training: what moves, what does not, under which mask, and what a checkpoint carries."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import memories_on, random_scores, tiny_model, tiny_shape, token_ids
from transformers import PreTrainedModel

from koff_export.errors import KoffError
from koff_prune import interrupt, learner
from koff_prune.checkpoints import whole_checkpoints
from koff_prune.compensate import Compensation
from koff_prune.gates import Gates
from koff_prune.learn import DomainWindows, LearnTrainer, Phase, train
from koff_prune.learner import Learner
from koff_prune.memory import Memories
from koff_prune.needs import steps_of
from koff_prune.recipe import Learn, Structure
from koff_prune.scores import collect
from koff_prune.units import KINDS, read_units

WINDOW, BATCH, STEPS = 16, 2, 4
WINDOWS = {
    "law": token_ids(6, WINDOW),
    "law2": token_ids(5, WINDOW, seed=1),
    "v1.5": token_ids(7, WINDOW, seed=2),
}
TOKENS = STEPS * BATCH * WINDOW * len(WINDOWS)


def section(**options: Any) -> Learn:
    return Learn(**{"window": WINDOW, "batch": BATCH, "tokens": TOKENS, "checkpoint_steps": 2, **options})


def checksum(model: PreTrainedModel) -> str:
    """Over every weight that is not a memory's, PEFT's names undone."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode() + p.float().numpy().tobytes())
    return digest.hexdigest()


def start(form: str = "straight_through", shape: str = "llama", **parts: bool) -> tuple[Memories, Gates]:
    model = tiny_shape(shape)
    units = read_units(model)
    structure = Structure(units=list(KINDS), sparsity=0.3, of="blocks", round_to=4)
    gates = Gates(units, structure, form, random_scores(units), 0, 64 if form == "re_estimated" else None)
    return memories_on(model, tuple(WINDOWS), **parts), gates


def learn(folder: Path, form: str = "straight_through", **options: Any) -> tuple[Memories, Gates]:
    memories, gates = start(form)
    train(memories, WINDOWS, section(**options), Phase(TOKENS, 0.0, 0.5), folder, gates=gates, sparsity=0.3)
    return memories, gates


def everything(memories: Memories) -> dict[str, torch.Tensor]:
    return {
        f"{d}/{part}/{k}": t
        for d in memories.domains
        for part, group in memories.tensors(d).items()
        for k, t in group.items()
    }


@pytest.mark.parametrize("loss", [{"ce": 1.0, "kl": 0.0}, {"ce": 0.5, "kl": 1.0}], ids=["ce", "ce+kl"])
@pytest.mark.parametrize("form", ["re_estimated", "straight_through", "hard_concrete"])
def test_the_base_stays_and_everything_else_moves(form: str, loss: dict[str, float], tmp_path: Path) -> None:
    memories, gates = start(form)
    before, alpha = everything(memories), gates.alpha.detach().clone()
    base = checksum(memories.base)
    told: list[tuple[int, float, float | None]] = []
    trained = train(
        memories, WINDOWS, section(loss=loss), Phase(TOKENS, 0.0, 1.0), tmp_path, gates=gates, sparsity=0.3,
        report=lambda *told_now: told.append(told_now),
    )  # fmt: skip
    assert trained == TOKENS
    assert [step for step, _, _ in told] == [1, 2, 3, 4]
    assert all(loss == loss and sparsity is not None for _, loss, sparsity in told)
    assert checksum(memories.base) == base == checksum(tiny_shape("llama"))
    after = everything(memories)
    assert set(after) == set(before)
    for name, tensor in after.items():
        if "/kv/" in name:
            assert torch.equal(tensor[:, 0], before[name][:, 0]), f"{name}: the sink moved"
            tensor, before[name] = tensor[:, 1:], before[name][:, 1:]
        assert not torch.equal(tensor, before[name]), f"{name} did not move"
    assert ((gates.alpha - alpha) != 0).float().mean() > 0.9
    assert memories.active is None
    assert not any(m._forward_pre_hooks for m in memories.base.model.layers.modules())


def test_a_fixed_plan_trains_memories_alone(tmp_path: Path) -> None:
    memories, _ = start()
    before = everything(memories)
    train(memories, WINDOWS, section(), Phase(TOKENS, 0.5, 1.0), tmp_path)
    assert all(not torch.equal(t, before[k]) for k, t in everything(memories).items())


def test_a_fixed_plan_has_no_dense_model_to_imitate(tmp_path: Path) -> None:
    """What is left of a model after its cut is no teacher."""
    results = []
    for name, loss in (("ce", {"ce": 1.0, "kl": 0.0}), ("kl", {"ce": 0.0, "kl": 1.0})):
        memories, _ = start()
        train(memories, WINDOWS, section(loss=loss), Phase(TOKENS, 0.0, 1.0), tmp_path / name)
        results.append(everything(memories))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("form", ["re_estimated", "straight_through", "hard_concrete"])
def test_one_draw_per_step_for_all_domains_and_one_step_for_all(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories, gates = start(form)
    seen: list[tuple[str, torch.Tensor]] = []
    grads: list[set[str]] = []
    forward = Learner.forward

    def spy(self: Any, input_ids: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        result = forward(self, input_ids, domain)
        assert len(set(domain.tolist())) == 1 and len(input_ids) == BATCH
        assert self.hooks.z
        seen.append(
            (memories.domains[int(domain[0])], torch.cat(list(self.hooks.z.values())).detach().clone())
        )
        return result

    create = LearnTrainer.create_optimizer

    def with_spy(self: LearnTrainer, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create(self, *args, **kwargs)
        step = optimizer.step

        def stepped(*a: Any, **k: Any) -> Any:
            moved = {d for d, kv in memories.kv.items() if all(p.grad is not None for p in kv.parameters())}
            moved = {d for d in moved if float(memories.kv[d].keys[0].grad.abs().sum()) > 0}
            assert all(p.grad is not None for p in memories.lora_parameters())
            grads.append(moved)
            return step(*a, **k)

        optimizer.step = stepped  # type: ignore[method-assign]
        return optimizer

    monkeypatch.setattr(Learner, "forward", spy)
    monkeypatch.setattr(LearnTrainer, "create_optimizer", with_spy)
    train(memories, WINDOWS, section(), Phase(TOKENS, 0.0, 1.0), tmp_path, gates=gates, sparsity=0.3)
    assert [d for d, _ in seen] == list(WINDOWS) * STEPS
    for step in range(STEPS):
        masks = [z for _, z in seen[3 * step : 3 * step + 3]]
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])
    if form != "re_estimated":  # whose mask stays for some steps
        assert not torch.equal(seen[0][1], seen[3][1])
    assert grads == [set(WINDOWS)] * STEPS


def test_the_loss_is_the_mean_over_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's reported loss, and its gradients before they are clipped, against plain torch."""
    memories, _ = start()
    told: list[float] = []
    plain = []
    order = DomainWindows(WINDOWS, 1, BATCH, 0)
    learned = [*memories.lora_parameters(), *memories.kv_parameters()]
    for n, domain in enumerate(WINDOWS):
        memories.activate(domain)
        rows = torch.stack([order[n * BATCH + r]["input_ids"] for r in range(BATCH)])
        loss = memories.base(input_ids=rows, labels=rows, use_cache=False).loss
        (loss / len(WINDOWS)).backward()
        plain.append(float(loss.detach()))
    memories.activate(None)
    wanted = [p.grad for p in learned]
    for p in learned:
        p.grad = None
    found: list[torch.Tensor | None] = []
    training_step = LearnTrainer.training_step

    def spy(self: LearnTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = training_step(self, *args, **kwargs)
        found[:] = [None if p.grad is None else p.grad.clone() for p in learned]  # of the last batch, all
        return result

    monkeypatch.setattr(LearnTrainer, "training_step", spy)
    train(memories, WINDOWS, section(), Phase(TOKENS // STEPS, 0.0, 1.0), tmp_path,
          report=lambda step, loss, sparsity: told.append(loss))  # fmt: skip
    assert told == [pytest.approx(sum(plain) / 3, rel=1e-4)]
    assert len(found) == len(wanted) > 0
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, _ = learn(tmp_path / "plain", "hard_concrete")
    saved, _ = learn(tmp_path / "saved", "hard_concrete", gradient_checkpointing=True)
    a, b = everything(plain), everything(saved)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_gates_of_learning_rate_0_stay(tmp_path: Path) -> None:
    _, gates = learn(tmp_path, gates={"learning_rate": 0.0})
    _, fresh = start()
    assert torch.equal(gates.alpha, fresh.alpha)


def test_learning_under_compensation_leaves_the_weights(tmp_path: Path) -> None:
    model = tiny_model()
    units = read_units(model)
    compensation = Compensation(collect(model, units, KINDS, token_ids(4, 16)).second, 0.01, units)
    results = []
    for solve in (compensation, None):
        memories, gates = start()
        base = checksum(memories.base)
        train(memories, WINDOWS, section(), Phase(TOKENS, 0.0, 1.0), tmp_path / str(solve is None),
        gates=gates,
              compensation=solve, sparsity=0.3)  # fmt: skip
        assert checksum(memories.base) == base
        assert not any(m._forward_pre_hooks for m in memories.base.model.layers.modules())
        results.append(gates.alpha.detach())
    assert not torch.equal(*results)


@pytest.mark.parametrize("form", ["re_estimated", "straight_through", "hard_concrete"])
def test_resumed_equals_uninterrupted_and_half_a_checkpoint_is_ignored(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koff_prune.gates.EVERY", 3)  # the mask that step 3 goes on with was chosen at step 0
    whole, whole_gates = learn(tmp_path / "whole", form)
    save = LearnTrainer._save

    def stops(self: LearnTrainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise RuntimeError("stopped while a checkpoint is written")

    monkeypatch.setattr(LearnTrainer, "_save", stops)
    with pytest.raises(RuntimeError, match="stopped"):
        learn(tmp_path / "cut", form)
    assert [p.name for p in whole_checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    half = tmp_path / "cut" / "checkpoint-3"  # what a kill would leave behind
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    (tmp_path / "cut" / ".writing" / "checkpoint-4").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(LearnTrainer, "_save", save)
    steps: list[int] = []
    memories, gates = start(form)
    train(memories, WINDOWS, section(), Phase(TOKENS, 0.0, 0.5), tmp_path / "cut", gates=gates, sparsity=0.3,
          report=lambda step, *rest: steps.append(step))  # fmt: skip
    assert steps == [3, 4]
    a, b = everything(whole), everything(memories)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(gates.alpha, whole_gates.alpha)
    assert torch.equal(gates.lagrange, whole_gates.lagrange)


def test_a_finished_training_is_only_read_back(tmp_path: Path) -> None:
    first, gates = learn(tmp_path)
    again, gates_again = learn(tmp_path)
    a, b = everything(first), everything(again)
    assert all(torch.equal(a[k], b[k]) for k in a) and torch.equal(gates.alpha, gates_again.alpha)


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path) -> None:
    memories, gates = start()
    with torch.no_grad():
        memories.kv["law"].values[0].fill_(float("inf"))
    with pytest.raises(
        KoffError, match="learn: the loss is nan at step 1, on a batch of law; lower learn.rates"
    ):
        train(memories, WINDOWS, section(), Phase(TOKENS, 0, 1), tmp_path, gates=gates, sparsity=0.3)


def test_a_batch_that_is_not_finite_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bad batch costs itself alone; a memory that stays broken is not skipped for ever."""
    healthy, calls = learner.head_loss, []

    def sometimes(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return healthy(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(learner, "head_loss", sometimes)
    memories, gates = start()
    skipping = section().model_copy(update={"non_finite": "skip"})
    train(memories, WINDOWS, skipping, Phase(TOKENS, 0, 1), tmp_path / "a", gates=gates, sparsity=0.3)
    assert all(torch.isfinite(t).all() for t in everything(memories).values())
    assert capsys.readouterr().err.count("skipped: the loss is nan at step 1") == 1
    monkeypatch.undo()
    memories, gates = start()
    with torch.no_grad():
        memories.kv["law"].values[0].fill_(float("inf"))
    with pytest.raises(KoffError, match="after 16 others that were skipped"):
        long = Phase(TOKENS * 8, 0, 1)
        train(memories, WINDOWS, skipping, long, tmp_path / "b", gates=gates, sparsity=0.3)


@pytest.mark.parametrize(
    "number, told, saved", [(signal.SIGINT, 2, 3), (signal.SIGTERM, 2, 3), (signal.SIGTERM, 4, 4)]
)
def test_an_interruption_finishes_the_step_and_saves_it(
    number: int, told: int, saved: int, tmp_path: Path
) -> None:
    """Between two checkpoints the signal comes, the step's checkpoint is written, and nothing is lost.

    It comes twice, as it does where a launcher passes on what its whole group has received. After the last of
    the four steps it stops what would come next.
    """
    whole, whole_gates = learn(tmp_path / "whole", "re_estimated")
    memories, gates = start("re_estimated")

    def strikes(step: int, *rest: Any) -> None:
        if step == told:  # told while that step ends; the signal is seen at the end of the next one
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    options: dict[str, Any] = {"gates": gates, "sparsity": 0.3}
    with pytest.raises(KeyboardInterrupt):
        train(memories, WINDOWS, section(checkpoint_steps=50), Phase(TOKENS, 0.0, 0.5), tmp_path / "cut",
              report=strikes, **options)  # fmt: skip
    assert signal.getsignal(number) is before
    assert [p.name for p in whole_checkpoints(tmp_path / "cut")] == [f"checkpoint-{saved}"]
    memories, gates = start("re_estimated")
    options["gates"] = gates
    train(
        memories, WINDOWS, section(checkpoint_steps=50), Phase(TOKENS, 0.0, 0.5), tmp_path / "cut", **options
    )
    a, b = everything(whole), everything(memories)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(gates.alpha, whole_gates.alpha)


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "ECHO", 0.0)
    with interrupt.Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_another_process_told_of_first_is_no_second_one() -> None:
    with interrupt.Interruption() as interruption:
        interruption.ask()
        signal.raise_signal(signal.SIGTERM)
        assert interruption.asked


def test_windows_are_shuffled_passes_over_every_domain() -> None:
    order = DomainWindows(WINDOWS, 6, BATCH, 0)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in WINDOWS}
    for n in range(len(order)):
        item = order[n]
        rows[list(WINDOWS)[int(item["domain"])]].append(item["input_ids"])
    for name, seen in rows.items():
        assert len(seen) == 6 * BATCH
        first = {tuple(t.tolist()) for t in seen[: len(WINDOWS[name])]}
        assert first == {tuple(t.tolist()) for t in WINDOWS[name]}
    again = DomainWindows(WINDOWS, 6, BATCH, 0)
    assert all(torch.equal(again[n]["input_ids"], order[n]["input_ids"]) for n in (17, 3, 30))


def test_a_heavier_domain_has_more_of_every_step() -> None:
    """Two processes see between them what one sees, and no window comes again before all have come."""
    weights = {"law": 3, "law2": 1, "v1.5": 1}
    whole = DomainWindows(WINDOWS, 4, BATCH, 0, weights=weights)
    shares = [DomainWindows(WINDOWS, 4, BATCH, 0, (rank, 2), weights) for rank in (0, 1)]
    assert len(whole) == 4 * 5 * BATCH
    domains = [int(whole[n * BATCH]["domain"]) for n in range(10)]
    assert domains == [0, 0, 0, 1, 2] * 2

    def rows(orders: list[DomainWindows]) -> list[tuple[int, ...]]:
        return sorted(tuple(order[n]["input_ids"].tolist()) for order in orders for n in range(len(order)))

    assert rows([whole]) == rows(shares)
    seen = [tuple(whole[n]["input_ids"].tolist()) for n in range(len(whole)) if not whole[n]["domain"]]
    count = len(WINDOWS["law"])
    assert len(seen) == 12 * BATCH and len(set(seen[:count])) == count


def test_steps() -> None:
    learn = Learn(window=16, batch=2)
    assert steps_of(0, learn, 3) == 0 and steps_of(96, learn, 3) == 1 and steps_of(200, learn, 3) == 2
    assert train(start()[0], WINDOWS, section(), Phase(0, 0, 1), Path("never-made")) == 0
    assert not Path("never-made").exists()


def test_a_second_phase_goes_on_where_the_first_one_ended() -> None:
    """Settling must not train on what joint learning has seen: each window comes once, as for a rival."""
    windows = {name: torch.arange(90).view(30, 3) for name in ("law", "code")}
    whole = DomainWindows(windows, 30, 1, 5)
    parts = [DomainWindows(windows, 20, 1, 5), DomainWindows(windows, 10, 1, 5, first=20)]
    told = [item["input_ids"].tolist() for part in parts for item in map(part.__getitem__, range(len(part)))]
    assert told == [whole[i]["input_ids"].tolist() for i in range(len(whole))]
    assert len({tuple(window) for window in told}) == 30


def test_settling_trains_on_windows_that_were_not_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from run_helpers import recipe_of

    import koff_prune

    seen: dict[str, list[tuple[int, ...]]] = {}
    before = Learner.forward

    def watch(self: Learner, input_ids: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        phase = "settling" if self.gates is None else "learning"
        seen.setdefault(phase, []).extend(map(tuple, input_ids.tolist()))
        return before(self, input_ids, domain)

    monkeypatch.setattr(Learner, "forward", watch)
    koff_prune.cut(recipe_of(tmp_path), tmp_path / "run")
    assert seen["learning"] and seen["settling"]
    assert not set(seen["learning"]) & set(seen["settling"])
