"""The recipe's `export`: what a bundle holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator
from pydantic_core import CoreSchema

from koff_prune.fields import Bool, Float, Section, none_in_words, with_none

Matrix = Literal["head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class OnnxExport(Section):
    """The ONNX graphs of a bundle."""

    precision: list[Literal["fp32", "fp16", "int8", "int4"]] = Field(
        default=["fp32"],
        min_length=1,
        description="Of the weights; fp32 is written always. fp16 and int8 are smaller files, computed in"
        " float32; int8's file is int8_dynamic's too, which is faster and small in memory, and rounds the"
        " inputs as well, as int4.",
    )
    int4_keeps: list[Matrix] = Field(
        default=["v_proj"],
        description="What has 8 bits in the int4 graph, beside the embedding: with head, v_proj and down_proj"
        " SmolLM2-135M loses less than half, for a sixth of the speed.",
    )
    int4_rounding: Literal["gptq", "nearest"] = Field(
        default="gptq",
        description="How weights come to 4 bits: gptq makes them up for one another's rounding on some of the"
        " domains' text, and loses a third as much; nearest reads no text and takes no time.",
    )
    profiles: list[Literal["portable", "fused"]] = Field(
        default=["portable"],
        min_length=1,
        description="portable: ONNX's own operators, written always. fused: ONNX Runtime's, for"
        " onnxruntime-genai; with it comes in_place, the fastest, whose cache holds the memory too.",
    )
    javascript: Bool = Field(
        default=False, description="Also graphs whose slots are required inputs, as JavaScript needs them."
    )

    @field_validator("profiles")
    @classmethod
    def _portable_always(cls, value: list[str]) -> list[str]:
        if "portable" not in value:
            raise ValueError("must hold portable: the fused graph reads its weights from that one's files")
        return value


class GgufExport(Section):
    """The GGUF files of a bundle, for llama.cpp."""

    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = Field(
        default="f16", description="Of the matrices; norms stay float32."
    )


class Export(Section):
    """What a bundle holds."""

    formats: list[Literal["safetensors", "onnx", "gguf"]] = Field(
        default=["safetensors", "onnx"],
        min_length=1,
        description="safetensors for torch, always among them; onnx for devices; gguf for llama.cpp.",
    )
    shard_gb: Float = Field(
        default=5.0,
        gt=0,
        description="Gigabytes (10^9 bytes) that one file of the backbone may hold.",
    )
    merged_vocabulary: Float | None = Field(
        default=None,
        ge=0.5,
        le=1,
        description="Of a bundle that one domain's memory is merged into (--merge), and of no other: keep the"
        " tokens that make this share of that domain's training text, as structure.vocabulary does for all;"
        " or none: keep all.",
    )
    onnx: OnnxExport = OnnxExport()
    gguf: GgufExport = GgufExport()

    @property
    def shard_bytes(self) -> int:
        """`shard_gb` in bytes."""
        return int(self.shard_gb * 10**9)

    _none = field_validator("merged_vocabulary", mode="before")(none_in_words)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return with_none(handler.resolve_ref_schema(handler(core)), "merged_vocabulary")

    @field_validator("formats")
    @classmethod
    def _backbone_always(cls, value: list[str]) -> list[str]:
        if "safetensors" not in value:
            raise ValueError("must hold safetensors: a bundle always carries the backbone")
        return value
