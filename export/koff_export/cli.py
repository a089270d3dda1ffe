"""koff-run: a bundle on the command line. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from koff_export import __version__
from koff_export.errors import KoffError
from koff_export.lines import at_line, json_lines, read_text
from koff_export.router import AUTO, BARE, route

if TYPE_CHECKING:
    from koff_export.cached import CachedText
    from koff_export.runtime import Runtime
    from koff_export.sampling import How
    from koff_export.text import ChatTemplate


TOGETHER = 64  # prompts of a --batch whose answers are printed when all of them are there


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="koff-run",
        description="Run a koff bundle: one prompt, a chat, or one prompt per line of standard input. "
        "A line '/memory NAME' changes the memory without a reload; '/memory none' takes it off, "
        "'/memory auto' lets each prompt pick.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder, or hf://org/name on the hub")
    parser.add_argument(
        "--memory",
        metavar="NAME",
        help="the domain's memory to attach; without it, the bare backbone; auto: each prompt picks its own",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this text and end")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the model's chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens (default all)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest up to P (default 1)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="makes draws repeatable")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="R",
        help="make tokens that the text has already less likely; 1: do not (default: what the bundle's"
        " generation_config.json asks for)",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    parser.add_argument(
        "--score",
        metavar="FILE",
        help="print the perplexity of FILE: .jsonl of {tokens: […]} or {text: …}, or plain text (-: from"
        " standard input)",
    )
    parser.add_argument(
        "--batch",
        metavar="FILE",
        help='answer a .jsonl of {"prompt": …, "memory": …} together (-: standard input); prints each line'
        ' with its "answer"',
    )
    parser.add_argument("--json", action="store_true", help="with --score: print one JSON object")
    parser.add_argument(
        "--precision",
        help="fp32 (default, if it is there), fp16, int8, int8_dynamic, int4: what the bundle has",
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="which graph to run: portable, fused or in_place (default: the last that there is, the fastest)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (default: all cores)")
    parser.add_argument(
        "--mapped", action="store_true", help="leave weights on the disk: less memory, slower (fp32)"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the sha256 checks")
    parser.add_argument("--version", action="version", version=f"koff-run {__version__}")
    return parser


def refuse_two_wheels() -> None:
    """Both distributions install the package koff_export; two copies would overwrite one another.

    Raises:
        KoffError: koff-prune and koff-export are both installed here.
    """
    from importlib import metadata

    try:
        metadata.distribution("koff-prune")
        metadata.distribution("koff-export")
    except metadata.PackageNotFoundError:
        return
    raise KoffError(
        "koff-prune and koff-export are both installed here and hold the same package: "
        "run 'pip uninstall koff-export', then reinstall koff-prune"
    )


def _score_windows(runtime: Runtime, path: str, memory: str | None) -> list[list[int]]:
    """The token windows of a file to score with a memory; its messages name the line."""
    if not path.endswith(".jsonl"):
        return runtime.windows(read_text(path), memory)
    windows: list[list[int]] = []
    for number, row in json_lines(path):
        tokens = row.get("tokens") if isinstance(row, dict) else None
        if isinstance(tokens, list) and all(type(t) is int for t in tokens):
            if runtime.manifest.told.get("vocabulary"):
                raise KoffError(
                    f"{path}, line {number}: numbers of tokens, and this bundle has numbered its own anew"
                    ' (memory.tokens, export.merged_vocabulary); give {"text": "…"} instead'
                )
            with at_line(path, number):
                runtime.check_tokens([t if t >= 0 else -1 - t for t in tokens], memory)
            windows.append(tokens)
        elif isinstance(row, dict) and isinstance(row.get("text"), str):
            with at_line(path, number):
                windows += runtime.windows(row["text"], memory)
        else:
            raise KoffError(f'{path}, line {number}: neither {{"tokens": [numbers]}} nor {{"text": "…"}}')
    return windows


def _score(runtime: Runtime, args: argparse.Namespace) -> None:
    import json
    import math

    if args.memory:
        runtime.memory(args.memory)
    windows = _score_windows(runtime, args.score, args.memory)
    nll, tokens = runtime.score(windows, args.memory)
    if not tokens:
        raise KoffError(f"{args.score} has no token to predict: give at least two tokens")
    mean = nll / tokens
    if not math.isfinite(mean):
        raise KoffError(f"{args.score}: its loss is not finite: the weights or the memory are damaged")
    perplexity = math.exp(mean) if mean < 700 else math.inf
    if args.json:
        told = perplexity if perplexity < math.inf else None  # JSON knows no infinity
        row = {"memory": args.memory or "none", "precision": runtime.precision, "perplexity": told}
        print(json.dumps({**row, "nll": nll, "tokens": tokens, "windows": len(windows)}))
    else:
        memory = args.memory or "none"
        print(f"perplexity {perplexity:.4f} over {tokens} tokens in {len(windows)} windows, memory {memory}")


def _batch(runtime: Runtime, args: argparse.Namespace) -> None:
    import json

    rows: list[dict[str, Any]] = []
    for number, row in json_lines(args.batch):
        memory = row.get("memory", args.memory) if isinstance(row, dict) else 0
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("prompt"), str)
            or not (memory is None or isinstance(memory, str))
        ):
            raise KoffError(f'{args.batch}, line {number}: is not {{"prompt": "…", "memory": "…"}}')
        near = difflib.get_close_matches("memory", row, n=1, cutoff=0.75)
        if near and "memory" not in row:
            raise KoffError(f"{args.batch}, line {number}: unknown field {near[0]!r}; did you mean 'memory'?")
        if memory == AUTO:
            raise KoffError(f"{args.batch}, line {number}: auto picks by one prompt: name a memory")
        if "answer" in row:
            raise KoffError(f"{args.batch}, line {number}: has an 'answer' already; rename that field")
        rows.append({**row, "memory": None if memory == BARE else memory})
        with at_line(args.batch, number):
            memory = rows[-1]["memory"]
            runtime.check_tokens(runtime.encode(row["prompt"], memory), memory, min(1, args.max_new_tokens))
    if not rows:
        raise KoffError(f"{args.batch}: holds no prompts")
    for at in range(0, len(rows), TOGETHER):
        some = rows[at : at + TOGETHER]
        answers = runtime.generate_batch(
            [row["prompt"] for row in some], [row["memory"] for row in some], args.max_new_tokens,
            stop=args.stop, first=at, **_how(args),
        )  # fmt: skip
        for row, answer in zip(some, answers, strict=True):
            text = json.dumps({**row, "answer": answer}, ensure_ascii=False)
            # for a program to read: escaped where the output cannot hold it, never replaced
            print(text if _holds(sys.stdout, text) else json.dumps({**row, "answer": answer}))
        if sys.stdout is not None:
            sys.stdout.flush()  # what is answered is there, whatever becomes of the rest


def _how(args: argparse.Namespace) -> How:
    return {
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed,
        "repetition_penalty": args.repetition_penalty,
    }  # fmt: skip


def _holds(stream: Any, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Session:
    """Prompts in, answers out; the memory in use may change between prompts."""

    def __init__(self, runtime: Runtime, args: argparse.Namespace) -> None:
        self.runtime = runtime
        self.args = args
        self.memory: str | None = args.memory
        self.template = runtime.chat_template() if args.chat else None
        self.messages: list[dict[str, str]] = []
        self.text: CachedText | None = (
            None  # of a conversation: its beginning is not read again at every turn
        )

    def switch(self, name: str) -> None:
        if name not in (BARE, AUTO):
            self.runtime.memory(name)
        self.memory = None if name == BARE else name

    def _memory(self, prompt: str) -> str | None:
        """The memory to answer with; one that the prompt picked is told."""
        if self.memory != AUTO:
            return self.memory
        choice = route(self.runtime, self.runtime.encode(prompt))
        print(f"memory: {choice.memory or BARE}", file=sys.stderr)
        return choice.memory

    def _conversation(self, template: ChatTemplate, memory: str | None) -> str:
        """The conversation as the model reads it; the oldest turns go where an answer would have no room."""
        if memory is not None:
            self.runtime.memory(memory)
        wanted = min(self.args.max_new_tokens, (self.runtime.manifest.context or sys.maxsize) // 4)
        kept = list(self.messages)
        while True:
            prompt = template.render(kept)
            room = self.runtime.room(self.runtime.encode(prompt, memory), memory, wanted)
            if room == wanted or len(kept) < 3:
                break
            del kept[:2]
        if room > 0 and len(kept) < len(self.messages):  # else even the message alone is too long
            print("the conversation is full: its oldest turns are forgotten", file=sys.stderr)
            self.messages = kept
        return prompt

    def answer(self, prompt: str) -> None:
        args = self.args
        memory = self._memory(prompt)
        said = ""
        try:
            if self.template is not None:
                from koff_export.cached import CachedText

                self.messages.append({"role": "user", "content": prompt})
                prompt = self._conversation(self.template, memory)
                if self.text is None or self.text.memory != memory:
                    self.text = CachedText(self.runtime, memory)
            pieces = self.runtime.generate(
                prompt,
                memory,
                args.max_new_tokens,
                stop=args.stop,
                text=self.text,
                **_how(args),
            )
            for piece in pieces:
                print(piece, end="", flush=True)
                said += piece
        except KoffError:
            if self.template is not None:
                self.messages.pop()  # too long, maybe: the conversation goes on without it
            raise
        print(flush=True)
        if self.template is not None:
            self.messages.append({"role": "assistant", "content": said})

    def lines(self, lines: Iterable[str]) -> None:
        """Answers every line; a slip in a line is told and the next one is read."""
        talking = sys.stdin.isatty()
        if talking:
            print(
                f"memories: {', '.join(self.runtime.memories) or 'none'}; /memory NAME changes, Ctrl-D ends",
                file=sys.stderr,
            )
        for number, line in enumerate(lines):
            line = (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
            if not line.strip():
                continue
            try:
                command, *rest = line.split(None, 1)
                if command == "/memory":
                    self.switch(rest[0].strip() if rest else "")
                else:
                    self.answer(line)
            except KoffError as error:
                if not talking:
                    raise
                print(f"error: {error}", file=sys.stderr)


def _run(args: argparse.Namespace) -> None:
    refuse_two_wheels()
    if args.json and args.score is None:
        raise KoffError("--json prints what --score finds: add --score FILE, or leave it out")
    if sum([args.score is not None, args.batch is not None, args.prompt is not None or args.chat]) > 1:
        raise KoffError("--score, --batch and --prompt or --chat each stand alone: leave out the others")
    if "" in args.stop:
        raise KoffError("--stop: every answer ends before an empty text; name one, or leave it out")
    from koff_export.runtime import Runtime

    runtime = Runtime.open(
        args.bundle,
        args.precision,
        verify=not args.no_verify,
        threads=args.threads,
        profile=args.profile,
        mapped=args.mapped,
    )
    args.memory = None if args.memory == BARE else args.memory
    files = args.score is not None or args.batch is not None
    if files and args.memory == AUTO:
        raise KoffError("--memory auto picks by one prompt: name a memory")
    if args.memory not in (None, AUTO):
        runtime.memory(args.memory)
    if files:
        (_score if args.score is not None else _batch)(runtime, args)
        return
    session = _Session(runtime, args)
    if args.prompt is not None:
        session.answer(args.prompt)
    elif sys.stdin is None:
        raise KoffError("there is no standard input: give --prompt")
    else:
        session.lines(sys.stdin)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `koff-run`; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have all of the answer's characters
    try:
        _run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KoffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UnicodeDecodeError:
        print("error: the standard input is not UTF-8 text: convert it", file=sys.stderr)
        return 2
    except MemoryError:
        print(
            "error: out of memory; shorten the text, or take --precision int8_dynamic or int4",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say, not even at exit
        sys.stdout = None
        return 0
    except OSError as error:  # rights, a full disk behind our output, a name that is too long
        print(f"error: {error}", file=sys.stderr)
        sys.stdout = None
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
