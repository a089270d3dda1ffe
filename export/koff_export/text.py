"""Text to tokens and back: the tokenizer, the chat template, pieces of text while tokens stream."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koff_export.errors import KoffError
from koff_export.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BROKEN = "\ufffd"  # what a tokenizer shows for the bytes of an incomplete character
_PADS = ("center", "expandtabs", "indent", "ljust", "rjust", "zfill")
_BIGGEST = 1000  # operand of a template's power; a product has at most its square
_CONTEXT = 8  # prompt tokens decoded along with the first new ones, so that a leading space survives
_FAR = 64  # at most so many, where the nearest begin inside a character


def open_tokenizer(path: Path, words: int | None = None) -> Tokenizer:
    """Opens a tokenizer.json.

    Args:
        path: The file.
        words: Its tokens must be numbered from 0 up to this; None: they may be anything.

    Raises:
        KoffError: it is missing, not a tokenizer, or one of other tokens.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # a prompt is neither cut nor filled up, whatever it was last used for
        tokenizer.no_padding()
    except Exception as error:  # the tokenizers package raises bare Exception
        raise KoffError(f"cannot read the tokenizer {path} ({error}): fetch the bundle again") from error
    if words is not None and set(tokenizer.get_vocab().values()) != set(range(words)):
        raise KoffError(f"{path} is the tokenizer of another memory: fetch the bundle again")
    return tokenizer


def tokens_of(tokenizer: Tokenizer, text: str, bos: int | None) -> list[int]:
    """Tokens of `text`, led by `bos` if that is one, and no other special tokens.

    Raises:
        KoffError: `text` holds halves of characters, as bytes that are no UTF-8 become.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise KoffError("the text is not valid UTF-8: convert it") from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    # A chat template may have written the token already.
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of `tokens` piece by piece, holding back incomplete characters."""
    near = _CONTEXT
    # a context that begins inside a character would keep all that follows broken, where bytes are tokens
    while near < min(len(prompt), _FAR) and tokenizer.decode(prompt[-near:]).startswith(_BROKEN):
        near += 1
    ids = list(prompt[-near:])
    done, shown = 0, len(ids)  # ids[done:shown] is text already yielded; a few are decoded again as context

    def tail() -> tuple[str, str]:
        return tokenizer.decode(ids[done:shown]), tokenizer.decode(ids[done:])

    for token in tokens:
        ids.append(token)
        old, new = tail()
        if len(new) > len(old) and not new.endswith(_BROKEN):
            yield new[len(old) :]
            done, shown = shown, len(ids)
    old, new = tail()
    if len(new) > len(old):
        yield new[len(old) :]


def stop_tokens(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """Those of the `stop` texts that are a control token, as numbers: such a token shows in no text.

    Raises:
        KoffError: One holds a control token and other text beside it.
    """
    control = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = set()
    for text in [stop] if isinstance(stop, str) else stop:
        if text in control:
            found.add(control[text])
        elif held := [token for token in control if token in text]:
            raise KoffError(f"stop: {text!r} holds the control token {held[0]!r}; name the token by itself")
    return found


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Passes pieces on up to the first of the `stop` texts, holding back what may become one."""
    stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
    if not stop:
        yield from pieces
        return
    held, keep = "", max(map(len, stop)) - 1
    end: int | None = None  # where the first stop in `held` begins
    for piece in pieces:
        held += piece
        end = min((at for s in stop if (at := held.find(s)) >= 0), default=None)
        if end is not None:
            # a longer one that began before may be under way
            if not any(s.startswith(held[at:]) for at in range(end) for s in stop):
                break
        elif len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held[:end]:
        yield held[:end]


def _token_text(config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _environment() -> Any:
    """Jinja without a way to Python, and with bounds on what one operator can make."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """transformers' mark around what the assistant says; in a prompt it means nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})  # and so not computed while compiling either

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%":
                if isinstance(left, str):
                    _check_width("%", left, right)
                return super().call_binop(context, operator, left, right)
            sizes = [abs(x) if isinstance(x, int | float) else len(x) for x in (left, right)]
            if operator == "**" and max(sizes) > _BIGGEST or sizes[0] * sizes[1] > _BIGGEST**2:
                raise SecurityError(f"{operator} of numbers or texts this large")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, /, *args: Any, **options: Any) -> Any:
            method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
            text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
            if isinstance(text, str) and name in (*_PADS, "format", "format_map"):
                _check_width(name, text, *args, *options.values())
            return super().call(context, obj, *args, **options)

    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    for name in ("center", "format", "indent"):
        made.filters[name] = _bounded(name, made.filters[name])
    return made


def _check_width(how: str, text: object, *given: object) -> None:
    """Refuses to pad or format to a great width: one that a format has in it, or that it is given."""
    from jinja2.sandbox import SecurityError

    form = "" if how in _PADS else str(text)
    asks = how in _PADS or "*" in form or re.search(r"{[^{}]*{", form) is not None
    flat = [v for value in given for v in (value if isinstance(value, tuple) else (value,))]
    if (
        re.search(r"\d{7}", form)
        or asks
        and any(isinstance(v, int | float) and v > _BIGGEST**2 for v in flat)
    ):
        raise SecurityError(f"{how} to a width this large")


def _bounded(name: str, fill: Any) -> Any:
    """A filter that makes texts as wide as it is told, refusing great widths."""

    @functools.wraps(fill)  # Jinja's marks of what it wants passed are attributes
    def checked(*args: Any, **options: Any) -> Any:
        _check_width(name, args[0], *args[1:], *options.values())
        return fill(*args, **options)

    return checked


class ChatTemplate:
    """A bundle's Jinja chat template, run in a sandbox that cannot reach Python."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        """Compiles `source`.

        Raises:
            KoffError: it is not a Jinja template.
        """
        from jinja2 import TemplateError

        def fail(message: str) -> None:
            raise TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = _environment()
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = fail
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._variables = {"tools": None, "documents": None, **variables}  # as transformers gives them
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # besides Jinja's own: too deep for Python's compiler, numbers too long
            reason = str(error) or type(error).__name__
            raise KoffError(
                f"the bundle's chat template is not valid ({reason}): leave out --chat"
            ) from error

    @classmethod
    def open(cls, template: Path | None, config: Path | None) -> ChatTemplate:
        """Reads the template from chat_template.jinja or, failing that, from tokenizer_config.json.

        Raises:
            KoffError: there is none, or it cannot be used.
        """
        values = read_json(config) if config else {}
        values = values if isinstance(values, dict) else {}
        try:
            source = template.read_text("utf-8") if template else values.get("chat_template")
        except (OSError, ValueError) as error:
            raise KoffError(
                f"cannot read the chat template {template} ({error}): fetch the bundle again"
            ) from error
        if isinstance(source, list):  # several named templates
            source = next(
                (t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"),
                None,
            )
        if not isinstance(source, str):
            raise KoffError("this bundle's model has no chat template: leave out --chat")
        return cls(
            source,
            {key: _token_text(values, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")},
        )

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt for `messages` ({"role", "content"} each), ending where the assistant's answer begins.

        Raises:
            KoffError: the template refuses these messages, or tries what the sandbox forbids.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._variables
            )
        except Exception as error:  # a template may fail in any way; none of them is a reason for a traceback
            raise KoffError(f"the bundle's chat template failed: {error}") from error
