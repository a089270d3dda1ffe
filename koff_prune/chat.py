"""Conversations as training text: through the model's chat template, with loss on the assistant's turns.

A token that is read and not learned is kept as -1 - id wherever windows of tokens are kept, so that text and
chat travel the same road; `tokens_and_labels` takes the two apart at the model's door.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from koff_export.errors import KoffError

IGNORED = -100  # what torch's cross-entropy leaves out


class Chat(str):
    """A conversation: JSON of its messages, [{"role", "content"}]."""


def chat_of(messages: Any) -> Chat | None:
    """A record's messages as a Chat; None where the assistant answers nothing.

    Raises:
        ValueError: They are no list of {"role": text, "content": text or parts of text}.
    """
    if not isinstance(messages, list):
        raise ValueError(
            f'messages must be a list of {{"role": "…", "content": "…"}}, not {_short(messages)}'
        )
    for m in messages:
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(_content(m), str)):
            raise ValueError(f'a message must be {{"role": "…", "content": "…"}}, not {_short(m)}')
    # whole, for templates know more than the two: an assistant that calls a tool says nothing else
    turns = [{k: v for k, v in m.items() if v is not None} | {"content": _content(m)} for m in messages]
    answers = [turn for turn in turns[1:] if turn["role"] == "assistant"]  # a greeting answers nothing
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in answers):
        return None
    # halves of characters, which JSON can spell, are no text that a tokenizer takes
    whole = json.dumps(turns, ensure_ascii=False, default=str).encode("utf-8", "replace")
    return Chat(whole.decode())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _content(message: dict[str, Any]) -> Any:
    """What a message says; where it calls tools it may say nothing.

    Raises:
        ValueError: It has a part that is no text.
    """
    said = message.get("content")
    if isinstance(said, list):  # the parts that some programs write
        other = [part for part in said if not isinstance(part, dict) or not isinstance(part.get("text"), str)]
        if other:
            kind = other[0].get("type") if isinstance(other[0], dict) else other[0]
            raise ValueError(f"messages: `content` may hold text alone, not a part {kind!r}; leave it out")
        return "".join(part["text"] for part in said)
    return "" if said is None and message.get("tool_calls") else said


def chat_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a conversation; all but the assistant's turns and what ends them as -1 - id.

    A template may write an answer otherwise once another follows (Qwen3's leaves thoughts away): then the
    last answer alone is learned, behind the turns before it as the template writes them there.

    Raises:
        KoffError: The tokenizer has no chat template, or one that begins no answer as it asks for one.
    """
    if not tokenizer.chat_template:
        raise KoffError("model.source: its tokenizer has no chat template; give text instead of messages")
    messages = json.loads(chat)
    # templates take no empty conversation to go on from
    answers = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
    found = _by_turns(messages, answers, tokenizer)
    if found is None and len(answers) > 1:
        found = _by_turns(messages[: answers[-1] + 1], answers[-1:], tokenizer)
    if found is None:
        raise KoffError(
            "model.source: its chat template begins an answer otherwise than it asks for one, so what the"
            " assistant said cannot be told apart; give text instead of messages"
        )
    return found


def _by_turns(
    messages: list[dict[str, str]], answers: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Tokens of a conversation of which these turns are learned; None if what follows one rewrites it."""
    done = ""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []  # of `done`, what the assistant says
    for n in range(len(messages)):
        learned = n in answers
        if not learned and n + 1 < len(messages):
            continue
        before = _render(tokenizer, messages[:n], learned) if learned else done
        after = _render(tokenizer, messages[: n + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            return None
        ids += [-1 - i for i in _encode(tokenizer, before[len(done) :])]
        ids += [i if learned else -1 - i for i in _encode(tokenizer, after[len(before) :])]
        if learned:
            spans.append((len(before), len(after)))
        done = after
    return _as_a_whole(done, spans, tokenizer) or ids


def _as_a_whole(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Tokens of the whole text, for some tokenizers begin a text otherwise than they go on with it.

    None where a token reaches over an end of what the assistant says: what is asked at run time ends there.
    """
    if not tokenizer.is_fast:
        return None
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = []
    for token, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        if any(start < edge < end for span in spans for edge in span):
            return None
        learned = any(first <= start < last for first, last in spans)
        ids.append(token if learned else -1 - token)
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], asked: bool) -> str:
    if not messages and not asked:
        return ""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
    except Exception as error:  # a template may fail in any way
        raise KoffError(f"model.source: its chat template failed ({str(error)[:200]})") from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def tokens_and_labels(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model reads, and what it is to say (IGNORED: nothing); both int64, of the shape of `ids`."""
    hidden = ids < 0
    return torch.where(hidden, -1 - ids, ids), torch.where(hidden, IGNORED, ids)


def tokens(ids: torch.Tensor) -> torch.Tensor:
    """What the model reads, int64."""
    return tokens_and_labels(ids)[0]
