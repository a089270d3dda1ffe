"""The kinds of value that a recipe may hold, stricter than pydantic's own.

Every union is told apart before it is checked, so that a mistake is reported once and not once per branch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Strict,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)


def whole(value: Any) -> Any:
    """YAML reads 1e5 as a float; where a whole number is asked it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError("must be text, a number, true, false or null")
    return value


def form(value: Any) -> str:
    """The branch of a union that a value means, so that a mistake is told once and not once per branch."""
    if isinstance(value, list):
        return "<list>"
    return "<text>" if value is None or isinstance(value, str | int | float) else "<keys>"


def none_in_words(value: Any) -> Any:
    """`none` in a recipe is no section."""
    return None if value == "none" else value


def with_none(schema: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A section's JSON schema, in which these keys may be `none`."""
    for key in keys:
        schema["properties"][key]["anyOf"].append({"const": "none"})
    return schema


# Text and booleans are never taken for numbers: a wrong type is told, not guessed around.
Int = Annotated[int, BeforeValidator(whole), Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Scalar = Annotated[
    Any, PlainValidator(_scalar), WithJsonSchema({"type": ["string", "number", "boolean", "null"]})
]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Pin = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9._+!-]*$")]
Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>"), Field(min_length=1)],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<text>"),
]


class Section(BaseModel):
    """A mapping of known keys; any other key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        # A section whose keys are all commented out reads as null in YAML.
        return {} if value is None else value
