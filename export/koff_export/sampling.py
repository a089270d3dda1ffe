"""From logits to a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from koff_export.errors import KoffError
from koff_export.files import read_json

if TYPE_CHECKING:
    from koff_export.runtime import Runtime

_NONSENSE = "the graph's logits are not finite: the weights or the memory are damaged"
_COLD = 1e-6  # below it a draw is the highest logit, and dividing by it is no number


class How(TypedDict, total=False):
    """How an answer's tokens are chosen; every key may be left out.

    Attributes:
        temperature: 0, the default, takes the likeliest token; above, tokens are drawn.
        top_k: Draw among this many likeliest; 0, the default, for all.
        top_p: Draw among the likeliest that together reach this probability; default 1.
        seed: Makes draws repeatable.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that the prompt
            or the answer has already (Keskar et al. 2019, CTRL, section 4.1); 1 for none. Default: what the
            bundle's generation_config.json asks for.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    repetition_penalty: float | None


@dataclass(frozen=True)
class Sampling:
    """`How`, checked, and what the bundle asks for beside.

    Attributes:
        suppress: Tokens that no answer has.

    Raises:
        KoffError: Settings that mean nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    suppress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise KoffError(
                f"temperature {self.temperature:g} and top_k {self.top_k} must be at least 0, and top_p"
                f" {self.top_p:g} in (0, 1]"
            )
        if not 0 < self.repetition_penalty < np.inf:
            raise KoffError(f"repetition_penalty {self.repetition_penalty:g} must be above 0; 1 is none")
        if self.seed is not None and self.seed < 0:
            raise KoffError(f"seed {self.seed} is below 0; name another")

    def picker(self, ids: Sequence[int], vocabulary: int, *stream: int) -> Picker:
        """Chooses the tokens of one answer to the prompt `ids`; `stream` tells answers of one seed apart."""
        seed: Any = self.seed if self.seed is None or not stream else [self.seed, *stream]
        seen = np.zeros(vocabulary, bool)
        seen[list(ids)] = True
        return Picker(self, seen, np.random.default_rng(seed))


@dataclass
class Picker:
    """Chooses one answer's tokens, one after another.

    Attributes:
        how: The settings.
        seen: Which tokens the text has by now, bool [vocabulary].
        random: What draws.
    """

    how: Sampling
    seen: np.ndarray
    random: np.random.Generator

    def pick(self, logits: np.ndarray) -> int:
        """The next token, from logits [vocabulary].

        Raises:
            KoffError: The logits are no numbers.
        """
        token = self._choose(self._mended(logits))
        self.seen[token] = True
        return token

    def _mended(self, logits: np.ndarray) -> np.ndarray:
        penalty = self.how.repetition_penalty
        if penalty != 1:
            less = np.where(logits < 0, logits * penalty, logits / penalty)
            logits = np.where(self.seen, less, logits)
        if self.how.suppress:
            logits = logits.copy()
            logits[list(self.how.suppress)] = -np.inf
        return logits

    def _choose(self, logits: np.ndarray) -> int:
        how = self.how
        if how.temperature < _COLD:
            token = int(logits.argmax())
            if not np.isfinite(logits[token]):
                raise KoffError(_NONSENSE)
            return token
        order = np.argsort(-logits, kind="stable")
        if how.top_k > 0:
            order = order[: how.top_k]
        scaled = logits[order].astype(np.float64) / how.temperature
        p = np.exp(scaled - scaled[0])
        p /= p.sum()
        if not np.isfinite(p).all():
            raise KoffError(_NONSENSE)
        if how.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(p), how.top_p)) + 1
            order, p = order[:keep], p[:keep] / p[:keep].sum()
        return int(self.random.choice(order, p=p))


def check_length(max_new_tokens: int) -> None:
    """Refuses an answer of less than no tokens."""
    if max_new_tokens < 0:
        raise KoffError(f"max_new_tokens {max_new_tokens} must be at least 0")


def sampling_of(runtime: Runtime, how: How) -> Sampling:
    """`how`, checked, with what the bundle's generation_config.json asks of every answer.

    Raises:
        KoffError: Settings that mean nothing.
    """
    path = runtime.file("generation_config.json")
    asked = _asked_of(read_json(path) if path else {}, runtime.vocab_size)
    return Sampling(**{**asked, **{key: value for key, value in how.items() if value is not None}})


def _asked_of(told: Any, vocabulary: int) -> dict[str, Any]:
    """Of a generation_config.json, as read: `Sampling`'s last two fields."""
    told = told if isinstance(told, dict) else {}
    penalty, suppress = told.get("repetition_penalty"), told.get("suppress_tokens")
    penalty = 1.0 if penalty is None else penalty
    suppress = [] if suppress is None else suppress
    if type(penalty) not in (int, float) or not 0 < penalty < 1e300:
        raise KoffError(f"generation_config.json: repetition_penalty {penalty!r:.40} is no number above 0")
    if not isinstance(suppress, list) or any(type(t) is not int or not 0 <= t < vocabulary for t in suppress):
        raise KoffError(
            f"generation_config.json: suppress_tokens must be token numbers below {vocabulary}, not"
            f" {suppress!r:.60}"
        )
    return {"repetition_penalty": float(penalty), "suppress": tuple(suppress)}
