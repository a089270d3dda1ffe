"""The recipe's `memory`: which parts every domain's memory has, and how large they are."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator
from pydantic_core import CoreSchema

from koff_prune.fields import Bool, Float, Int, Section, Texts, none_in_words, with_none

MemoryKind = Literal["none", "lora", "kv", "lora+kv"]
# the linear layers of a block: what the cut and the exports know how to slice
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parts_of(kind: str) -> set[str]:
    """lora, kv, both or neither."""
    return set(kind.split("+")) - {"none"}


class Lora(Section):
    """A low-rank adapter on linear layers."""

    rank: Int = Field(default=8, ge=1, le=512, description="Of the two matrices beside each module.")
    alpha: Float = Field(default=16, gt=0, description="What LoRA adds is scaled by alpha / rank.")
    target: Texts = Field(
        default="all-linear", description="all-linear, or names of modules such as [q_proj, down_proj]."
    )

    @field_validator("target")
    @classmethod
    def _one_word(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError("must be all-linear or a list of module names")
        if isinstance(value, list) and (unknown := [name for name in value if name not in TARGETS]):
            raise ValueError(
                f"knows no {', '.join(unknown)}: name any of {', '.join(TARGETS)}, or all-linear"
            )
        return value


class Kv(Section):
    """A learned key and value per layer."""

    tokens: Int = Field(default=32, ge=2, le=8192, description="Positions of the learned cache.")
    init: Literal["prefill"] = Field(
        default="prefill", description="From a real prefill of the domain's text."
    )


class Memory(Section):
    """What each domain carries."""

    lora: Lora | None = Field(default=Lora(), description="Low-rank adapter, or none.")
    kv: Kv | None = Field(default=Kv(), description="Learned cache, or none.")
    tokens: Bool = Field(
        default=False,
        description="Whether tokens that structure.vocabulary keeps for one domain alone leave the backbone"
        " and go with that domain's memory.",
    )

    _none = field_validator("lora", "kv", mode="before")(none_in_words)

    @property
    def kind(self) -> MemoryKind:
        """Its parts in one word."""
        if self.lora is None:
            return "none" if self.kv is None else "kv"
        return "lora" if self.kv is None else "lora+kv"

    def only(self, kind: MemoryKind) -> Memory:
        """The same memory restricted to the named parts."""
        parts = parts_of(kind)
        return Memory(lora=self.lora if "lora" in parts else None, kv=self.kv if "kv" in parts else None)

    def check_tokens(self, vocabulary: float | None, domains: int) -> None:
        """Raises ValueError where tokens are to go with memories, and none can."""
        if self.tokens and vocabulary is None:
            raise ValueError("memory.tokens divides what structure.vocabulary keeps: set that, such as 0.995")
        if self.tokens and (self.kind == "none" or domains < 2):
            raise ValueError("memory.tokens needs two domains or more, and a memory.lora or memory.kv")

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return with_none(handler.resolve_ref_schema(handler(core)), "lora", "kv")
