"""The joint training of gates and memories, and the training of memories alone, on transformers' Trainer.

One optimizer step is micro-batches of every domain under one mask: gradient accumulation runs over the
domains. The base stays frozen; the dense teacher is the same weights with gates and memories off.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from koff_export.errors import KoffError
from koff_export.files import check_safetensors, disk_errors
from koff_prune import ranks
from koff_prune.checkpoints import newest_checkpoint, whole_checkpoints
from koff_prune.compensate import Compensation
from koff_prune.gates import GateHooks, Gates
from koff_prune.interrupt import Interruption
from koff_prune.learner import Learner
from koff_prune.memory import Memories
from koff_prune.needs import NOT_BOTH, steps_of
from koff_prune.quantise import quantise
from koff_prune.recipe import Learn
from koff_prune.seals import seal
from koff_prune.sharding import shard
from koff_prune.windows import DomainWindows

STATE = "state.safetensors"
LATE = 0.1  # share of the learning rate that is left at the end


@dataclass(frozen=True)
class Phase:
    """One training: from where to where on the schedule that joint phase and settling share.

    Attributes:
        tokens: Over all domains.
        begin, end: Share of the whole schedule (learning-rate decay) before and after this phase.
    """

    tokens: int
    begin: float
    end: float


class _StepCallback(TrainerCallback):
    """Starts every optimizer step's mask, and keeps the log."""

    def __init__(
        self,
        learner: Learner,
        sparsity: float,
        ramp: int,
        step_tokens: int,
        interruption: Interruption,
        report: Any,
    ) -> None:
        self.learner, self.sparsity, self.ramp, self.report = learner, sparsity, ramp, report
        self.step_tokens, self.interruption = step_tokens, interruption

    def target(self, step: int) -> float:
        return self.sparsity * min(1.0, (step + 1) / self.ramp) if self.ramp else self.sparsity

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # Trainer goes on with the checkpoint's own

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learner.begin_step(state.global_step, self.target(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.learner.gates is not None:
            self.learner.gates.share()
            said, read = self.learner.said, self.learner.read
            self.learner.gates.observe(self.step_tokens * said // max(1, read))
        if ranks.any_of(self.interruption.asked):
            self.interruption.ask()
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            gates = self.learner.gates
            sparsity = float(gates.expected_sparsity().detach()) if gates is not None else None
            if self.report is not None:
                self.report(state.global_step, loss, sparsity)


class LearnTrainer(Trainer):
    """The Trainer over a Learner: whole checkpoints only, one learning rate per kind of parameter."""

    learner: Learner
    begin: float
    stop: float

    def __init__(self, learner: Learner, learn: Learn, phase: Phase, **kwargs: Any) -> None:
        self.learner, self.learn_section, self.phase = learner, learn, phase
        self._aside: Path | None = None
        super().__init__(model=learner, **kwargs)
        self.accelerator.device_placement = False  # see `train` on `use_cpu`
        self.model_accepts_loss_kwargs = False  # so that Trainer divides by the number of domains itself

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """It is where it belongs."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The Learner's loss, and the constraint on hard-concrete gates."""
        loss = model(inputs["input_ids"], inputs["domain"])
        gates = self.learner.gates
        if gates is not None and gates.form == "hard_concrete":
            loss = loss + gates.penalty()
        return (loss, None) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch; the last of a step shares its gradients."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            learned = [p for p in self.learner.parameters() if p.requires_grad]
            for p in learned:
                if p.grad is None:  # every batch that it could learn from was skipped
                    p.grad = torch.zeros_like(p)
            ranks.share_mean(p.grad for p in learned if p.grad is not None)
            if not self._finite(learned):
                self.learner.not_finite(f"a gradient is not finite at step {self.learner.step + 1}")
                for p in learned:
                    p.grad = torch.zeros_like(p)
                if self.learner.gates is not None:
                    self.learner.gates.discard()
        return loss

    def _finite(self, learned: Sequence[torch.nn.Parameter]) -> bool:
        """Whether every gradient is: one that is not would be in every parameter after the next step."""
        gradients = [p.grad for p in learned]
        gradients += [self.learner.gates.gradient] if self.learner.gates is not None else []
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        return not ranks.any_of(not torch.isfinite(norm))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with a group for each kind of parameter; the multipliers ascend."""
        learner, rates = self.learner, self.learn_section.rates
        groups: list[dict[str, Any]] = [
            {"params": learner.memories.lora_parameters(), "lr": rates.lora},
            {"params": learner.memories.kv_parameters(), "lr": rates.kv},
        ]
        if learner.gates is not None:
            rate = self.learn_section.gates.learning_rate
            groups.append({"params": [learner.gates.alpha], "lr": rate})
            if learner.gates.lagrange.requires_grad:
                groups.append({"params": [learner.gates.lagrange], "lr": rate, "maximize": True})
        groups = [g for g in groups if g["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up, then this phase's part of the cosine that both phases share."""
        warm = max(1, round(self.learn_section.warmup * num_training_steps))
        phase = self.phase

        def factor(step: int) -> float:
            share = phase.begin + (phase.end - phase.begin) * min(1.0, step / num_training_steps)
            return min(1.0, (step + 1) / warm) * (LATE + (1 - LATE) * 0.5 * (1 + math.cos(math.pi * share)))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer or optimizer, factor)
        return self.lr_scheduler

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if ranks.rank():
            return
        folder = Path(self.args.output_dir)  # type: ignore[arg-type]
        name = f"checkpoint-{self.state.global_step}"
        with disk_errors(folder):
            self._aside = folder / ".writing"
            shutil.rmtree(self._aside, ignore_errors=True)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                aside, self._aside = self._aside, None
            seal(aside / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (aside / name).rename(folder / name)
            shutil.rmtree(aside, ignore_errors=True)
        for old in whole_checkpoints(folder)[:-2]:
            shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        target = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        target.mkdir(parents=True, exist_ok=True)
        save_file(self.learner.trained(), target / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / STATE
        check_safetensors(path)
        self.learner.restore(load_file(path))


def spends(learn: Learn) -> bool:
    """Whether a model that was trained around is no longer what it was: sharded, or in 4 bits."""
    return ranks.sharded() or learn.base != "full"


def check_processes(learn: Learn) -> None:
    """Whether several processes can do what the recipe asks.

    Raises:
        KoffError: The batch does not divide over them, or a quantised base would have to.
    """
    if learn.batch % ranks.world():
        raise KoffError(
            f"learn.batch: {learn.batch} windows do not divide over {ranks.world()} processes; set a multiple"
        )
    if ranks.sharded() and learn.base != "full":
        raise KoffError(NOT_BOTH.format(learn.base))


def train(
    memories: Memories,
    windows: Mapping[str, torch.Tensor],
    learn: Learn,
    phase: Phase,
    folder: Path,
    *,
    gates: Gates | None = None,
    compensation: Compensation | None = None,
    sparsity: float = 0.0,
    seed: int = 0,
    first: int = 0,
    report: Any = None,
    weights: Mapping[str, int] | None = None,
) -> int:
    """Trains memories, and gates where given, and resumes from the last whole checkpoint in `folder`.

    Args:
        memories: Around the dense model with gates, or around a backbone without. Where `spends` the model,
            afterwards good for their tensors alone.
        windows: Per domain, int64 [windows, learn.window].
        learn: The recipe's section.
        phase: Tokens, and where the learning rate stands.
        folder: Checkpoints live here.
        gates: Trained jointly; None: the plan is fixed.
        compensation: See `Learner`.
        sparsity: The target that the gates end at.
        seed: Order of the windows and draws.
        first: Steps of an earlier phase, whose windows are not taken again.
        weights: Micro-batches of each domain in an optimizer step; None: one of each.
        report: Called as report(step, loss, expected sparsity or None) after every optimizer step.

    Returns:
        Tokens trained on.

    Raises:
        KoffError: The loss is no longer finite, the disk is full, or the batch does not divide over the
            processes.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and saved first.
    """
    weights = weights or dict.fromkeys(windows, 1)
    batches = sum(weights.values())
    steps = steps_of(phase.tokens, learn, batches)
    if steps == 0:
        return 0
    check_processes(learn)
    with ranks.training():  # one process may have less memory left than the others
        if learn.base == "nf4":
            quantise(memories.base)
        if ranks.sharded():
            shard(memories.base)
    hooks = GateHooks(memories.model, gates.units) if gates is not None else None
    step_tokens = learn.window * learn.batch * batches
    interruption = Interruption()
    learner = Learner(memories, gates, compensation, learn, hooks)
    ramp = max(1, round(learn.gates.ramp * steps)) if gates is not None else 0
    folder.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=learn.batch // ranks.world(),
        gradient_accumulation_steps=batches,
        use_cpu=True,  # to Trainer: where the model is, is `device`'s matter, and the loss comes back
        seed=seed,
        save_strategy="steps",
        save_steps=learn.checkpoint_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        log_level="error",
    )
    if learn.gradient_checkpointing:
        memories.base.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = LearnTrainer(
        learner,
        learn,
        phase,
        args=arguments,
        train_dataset=DomainWindows(
            windows, steps, learn.batch, seed, (ranks.rank(), ranks.world()), weights, first
        ),
        data_collator=_stack,
        callbacks=[_StepCallback(learner, sparsity, ramp, step_tokens, interruption, report)],
    )
    _quiet(trainer)
    memories.activate(None)
    learner.train()
    for module in memories.base.modules():  # train mode is gradient checkpointing's; the model is frozen
        if getattr(module, "attention_dropout", 0.0):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - to mypy it may be a tensor
    with ranks.turn():
        newest = newest_checkpoint(folder)
    try:
        with interruption, ranks.training():
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            asked = ranks.any_of(interruption.asked)  # after the last step too, so that nothing more begins
        if asked:
            raise KeyboardInterrupt  # what is done is saved
    finally:
        memories.activate(None)
        learner.eval()
        if learn.gradient_checkpointing:
            memories.base.gradient_checkpointing_disable()
        if hooks is not None:
            hooks.remove()
        if learner.predictions is not None:
            learner.predictions.remove()
    return steps * step_tokens


def _stack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _quiet(trainer: Trainer) -> None:
    """Our progress bar tells the loss; Trainer's printed dictionaries would break it."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
