"""Runs a bundle with ONNX Runtime: tokens out, memories swapped per call, the backbone loaded once."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import onnxruntime as ort

from koff_export import batch, scoring
from koff_export.adapter import Adapter, Options, open_adapter
from koff_export.bundle import MERGED_KV, Manifest, check_file, open_manifest
from koff_export.cached import CHUNK, Cache, CachedText, CacheInPlace, CacheOfGraph
from koff_export.errors import NO_GRAPH, KoffError
from koff_export.files import safe_join
from koff_export.graph import check_onnx
from koff_export.hub import FOR_DEVICES, local
from koff_export.readers import Readers
from koff_export.sampling import How, check_length, sampling_of
from koff_export.session import check_session, open_session, run_errors
from koff_export.text import ChatTemplate, stop_tokens, stream_text, tokens_of, until_stop

_ADAPTERS = "onnx/memories"
Place = str | os.PathLike[str]


class Runtime:
    """A bundle opened for use. Make one with `Runtime.open`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        session: ort.InferenceSession,
        verify: bool,
        profile: str,
        precision: str,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.profile, self.precision = profile, precision
        self._session = session
        self._verify = verify
        self._adapters: dict[str, Adapter] = {}
        # length of the learned KV, by memory; "" is the bare graph's own
        within = manifest.domains.get(manifest.merged or "")
        self._kv_tokens: dict[str, int] = {"": within.kv_tokens if within else 0}
        self.vocab_size = manifest.graph.vocab_size if manifest.graph else 0  # the backbone's tokens
        self._readers = Readers(self.file)
        self._outputs = [output.name for output in session.get_outputs()]
        self.empty_cache, self._slots, self._kv_slots = check_session(session, manifest, profile)

    @classmethod
    def open(
        cls,
        bundle: Place,
        precision: str | None = None,
        verify: bool = True,
        threads: int | None = None,
        profile: str | None = None,
        mapped: bool = False,
    ) -> Runtime:
        """Opens a bundle's graph once; memories and tokenizer follow on first use.

        Args:
            bundle: The bundle's folder, or its place on the hub: "hf://org/name".
            precision: One of the manifest's, e.g. "int8_dynamic"; None: fp32, or the first of others.
            verify: Compare the sha256 of every file before it is used.
            threads: Threads of ONNX Runtime; None leaves the choice to it.
            profile: "portable", "fused" or "in_place"; None takes the last that the bundle has: the fastest.
            mapped: Leave float weights on the disk, read as they are needed, instead of arranging a copy of
                all for speed: a model larger than the memory runs, slowly.

        Raises:
            KoffError: no bundle, no such precision or profile, or a file missing, changed or hostile.
        """
        folder = local(bundle, FOR_DEVICES)
        manifest = open_manifest(folder)
        if manifest.graph is None:
            raise KoffError(f"{folder} {NO_GRAPH}")
        profile, precision = manifest.graph.choose(profile, precision)
        if mapped and precision != "fp32":
            raise KoffError(f"mapped: {precision} weights are always arranged anew; leave it out")
        path = check_file(folder, manifest, manifest.graph.profiles[profile][precision], hashes=verify)
        for data in check_onnx(path, folder):
            check_file(folder, manifest, data.relative_to(folder).as_posix(), hashes=verify)
        session = open_session(path, threads, mapped, dynamic=precision != "int8")
        try:
            return cls(folder, manifest, session, verify, profile, precision)
        except UnicodeDecodeError as error:
            raise KoffError(f"{path} has names that are no text: fetch the bundle again") from error

    # Memories

    @property
    def memories(self) -> list[str]:
        """Names of the memories at hand, those dropped into `onnx/memories/` since the export included."""
        listed = [name for name, domain in self.manifest.domains.items() if domain.adapter]
        added = (
            p.name.removesuffix(".onnx_adapter") for p in (self.folder / _ADAPTERS).glob("[!.]*.onnx_adapter")
        )
        return listed + sorted(set(added) - set(listed))

    def memory(self, name: str, file: Place | None = None, tokenizer: Place | None = None) -> None:
        """Loads a memory now, so that its first use does not wait for the disk.

        Its file stays mapped until `evict` (or read, for a cache in place): replace it by renaming a new one
        over it, as `koff-prune memory` does, never by writing into it.

        Args:
            name: The memory's name.
            file: An `.onnx_adapter` from elsewhere, which goes by this name until `evict`.
            tokenizer: The tokenizer.json of that, where it has tokens of its own.

        Raises:
            KoffError: no such memory, or its file is damaged or belongs to another backbone.
        """
        if not name:
            raise KoffError("a memory has a name: leave it out for the bare backbone")
        if file is not None:
            self._adapters[name] = self._open(Path(file), name, Path(tokenizer) if tokenizer else None)
        elif name not in self._adapters:
            self._adapters[name] = self._own(name)
        self._kv_tokens[name] = self._adapters[name].kv_tokens

    def _open(self, path: Path, name: str, tokenizer: Path | None) -> Adapter:
        slots = self._slots if self.manifest.merged else {**self._slots, **self._kv_slots}
        adapter = open_adapter(path, name, slots, self.profile == "in_place")
        self._readers.forget(name)
        if adapter.own_tokens:
            self._readers.load(name, tokenizer, self.vocab_size + adapter.own_tokens)
        return adapter

    def _own(self, name: str) -> Adapter:
        """A memory of the bundle, as the manifest names it now."""
        self.reread()
        if name not in (known := self.memories):
            merged, has = self.manifest.merged, ", ".join(known) or "none"
            has = f"that of {merged} in its weights, and takes no other: name none" if merged else has
            raise KoffError(f"the bundle has no memory {name!r}; it has: {has}")
        domain = self.manifest.domains.get(name)
        relative = domain.adapter if domain and domain.adapter else f"{_ADAPTERS}/{name}.onnx_adapter"
        path = safe_join(self.folder, relative)
        if relative in self.manifest.files or domain is not None:
            check_file(self.folder, self.manifest, relative, hashes=self._verify)
        reader = self.file(domain.tokenizer) if domain is not None and domain.tokenizer else None
        adapter = self._open(path, name, reader)
        found = (adapter.kv_tokens, adapter.own_tokens)
        if domain is not None and found != (domain.kv_tokens, domain.tokens):
            raise KoffError(f"the memory {name!r} is not as koff.json says: fetch it again")
        return adapter

    def reread(self) -> None:
        """Takes over the memories that the manifest names now: they come and go around one backbone."""
        found = open_manifest(self.folder)
        mine = {p: e for p, e in self.manifest.files.items() if p.startswith("onnx/")}
        fixed = [p for p in mine if not p.startswith(f"{_ADAPTERS}/")]
        if found.plan != self.manifest.plan or any(found.files.get(p) != mine[p] for p in fixed):
            raise KoffError(f"{self.folder} holds another backbone by now: open it again")
        self.manifest = replace(self.manifest, domains=found.domains, files=found.files)

    def loaded(self, memory: str | None) -> Adapter | None:
        """A memory as it was last read from the disk, None where it was not."""
        return self._adapters.get(memory or "")

    def evict(self, name: str) -> None:
        """Forgets a loaded memory; it is read again when it is next used."""
        self._adapters.pop(name, None)
        self._readers.forget(name)

    def run_options(self, memory: str | None) -> ort.RunOptions:
        """Options for calls with `memory` attached, or for the bare backbone."""
        options = Options()
        if memory is not None:
            self.memory(memory)
            options.adapter = self._adapters[memory].mapped
            options.add_active_adapter(options.adapter)
        return options

    def adapter(self, memory: str | None) -> Adapter | None:
        """A memory's parts, read from the disk where they are not at hand; of none, the merged learned KV.

        Raises:
            KoffError: as `memory`.
        """
        if memory is not None:
            self.memory(memory)
        elif "" not in self._adapters:
            path = self.file(MERGED_KV) if self.manifest.merged else None
            if path is None:
                if self.kv_tokens(None):
                    raise KoffError(f"the bundle lists no {MERGED_KV}: fetch it again")
                return None
            merged = open_adapter(path, str(self.manifest.merged), self._kv_slots, parts=True)
            if merged.kv_tokens != self.kv_tokens(None):
                raise KoffError(f"{MERGED_KV} is not as koff.json says: fetch it again")
            self._adapters[""] = merged
        return self._adapters[memory or ""]

    def cache(self, memory: str | None, rows: int = 1) -> Cache:
        """An empty cache for texts read with `memory`."""
        kind = CacheInPlace if self.profile == "in_place" else CacheOfGraph
        return kind(self, memory, rows)

    def run(self, feeds: dict[str, ort.OrtValue], options: ort.RunOptions) -> list[ort.OrtValue]:
        """One call of the graph. Outputs: logits, then present.{i}.key and .value of every layer."""
        with run_errors():
            return list(self._session.run_with_ort_values(self._outputs, feeds, options))

    def io_binding(self) -> ort.IOBinding:
        """To be filled for `run_bound`."""
        return self._session.io_binding()

    def run_bound(self, binding: ort.IOBinding) -> None:
        """One call of the graph on what is bound."""
        with run_errors():
            self._session.run_with_iobinding(binding)

    # Text

    def file(self, name: str) -> Path | None:
        """A file of the bundle, checked; None where the manifest lists none of this name."""
        if name not in self.manifest.files:
            return None
        return check_file(self.folder, self.manifest, name, hashes=self._verify)

    def words(self, memory: str | None) -> int:
        """How many tokens there are with a memory: the width of its logits."""
        if memory is None:
            return self.vocab_size
        self.memory(memory)
        return self.vocab_size + self._adapters[memory].own_tokens

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, a `tokenizers.Tokenizer`."""
        return self.tokenizer_of(None)

    def tokenizer_of(self, memory: str | None) -> Any:
        """The tokenizer of what is read with a memory: the backbone's, or one that has its own tokens too.

        Raises:
            KoffError: the bundle lists none.
        """
        if memory is not None:
            self.memory(memory)
        return self._readers.of(memory)

    def encode(self, text: str, memory: str | None = None, *, bos: bool = True) -> list[int]:
        """Tokens of `text` for `memory`, led by the manifest's `bos` if it has one; no other special tokens.

        Raises:
            KoffError: `text` holds halves of characters, as bytes that are no UTF-8 become.
        """
        return tokens_of(self.tokenizer_of(memory), text, self.manifest.bos if bos else None)

    def chat_template(self) -> ChatTemplate:
        """The bundle's chat template.

        Raises:
            KoffError: there is none, or it is not valid.
        """
        return ChatTemplate.open(self.file("chat_template.jinja"), self.file("tokenizer_config.json"))

    def check_tokens(self, tokens: Sequence[int], memory: str | None, extra: int = 0) -> None:
        """Refuses tokens that cannot be read with `memory`, and `extra` more behind them."""
        if not tokens:
            raise KoffError("the text has no tokens: give at least one word")
        if min(tokens) < 0 or max(tokens) >= (words := self.words(memory)):
            raise KoffError(f"a token number is outside of 0…{words - 1}: it is from another tokenizer")
        if self.room(tokens, memory, extra) < extra:
            kv = self.kv_tokens(memory)
            beside = (f" and a memory of {kv}" if kv else "") + (" and an answer" if extra else "")
            raise KoffError(
                f"{len(tokens)} tokens of text{beside} do not fit into the model's {self.manifest.context}"
                " positions: shorten the text"
            )

    def generate_tokens(
        self,
        ids: Sequence[int],
        memory: str | None = None,
        max_new_tokens: int = 128,
        *,
        ends: Collection[int] = (),
        text: CachedText | None = None,
        **how: Unpack[How],
    ) -> Iterator[int]:
        """Yields new tokens after `ids`, until one of the manifest's `eos` or of `ends` (not yielded).

        They also end after `max_new_tokens`, or where the model's context is full.

        Args:
            ids: The prompt's tokens, `bos` included if the model wants it.
            memory: A memory's name, or None for the bare backbone.
            max_new_tokens: Upper bound of the answer.
            ends: More tokens to end at.
            text: Read before with the same memory, such as a conversation so far: what it has in common with
                `ids` is not read again, and it goes on with them and the answer.
            how: temperature, top_k, top_p, seed, repetition_penalty: see `koff_export.sampling.How`.

        Raises:
            KoffError: an unknown memory, no tokens, or tokens that do not fit.
        """
        check_length(max_new_tokens)
        sampling = sampling_of(self, how)
        self.check_tokens(ids, memory, min(1, max_new_tokens))
        cached = text or CachedText(self, memory)
        if cached.runtime is not self or cached.memory != memory:
            raise KoffError(f"text: was read with {cached.memory or 'no memory'}; give one that memory read")
        room, picker = self.room(ids, memory, max_new_tokens), sampling.picker(ids, self.words(memory))

        def answer() -> Iterator[int]:
            cached.answers += 1
            mine, pending = cached.answers, cached.turn_to(ids)
            for _ in range(room):
                if cached.answers != mine:
                    raise KoffError("text: another answer has gone on with it; give each its own")
                for at in range(0, len(pending), CHUNK):
                    logits = cached.read(pending[at : at + CHUNK])
                token = picker.pick(logits[-1])
                if token in self.manifest.eos or token in ends:
                    return
                yield token
                pending = [token]

        return answer()

    def kv_tokens(self, memory: str | None) -> int:
        """Length of the learned KV of a loaded `memory`, or of the bare graph."""
        return self._kv_tokens.get(memory or "", 0)

    def room(self, ids: Sequence[int], memory: str | None, wanted: int) -> int:
        """How many of the `wanted` tokens fit behind `ids`."""
        if self.manifest.context is None:
            return wanted
        return min(wanted, self.manifest.context - self.kv_tokens(memory) - len(ids))

    def generate_batch(
        self,
        prompts: Sequence[str],
        memories: Sequence[str | None],
        max_new_tokens: int = 128,
        **options: Any,
    ) -> list[str]:
        """The answers to many prompts, each with a memory of its own; see `koff_export.batch`."""
        return batch.generate_batch(self, prompts, memories, max_new_tokens, **options)

    def generate(
        self,
        prompt: str,
        memory: str | None = None,
        max_new_tokens: int = 128,
        *,
        stop: Sequence[str] = (),
        text: CachedText | None = None,
        **how: Unpack[How],
    ) -> Iterator[str]:
        """Yields the answer to `prompt` as text, piece by piece, whole characters only.

        Args are those of `generate_tokens`; the answer also ends before the first of the `stop` texts.

        Raises:
            KoffError: as `generate_tokens`.
        """
        ids, tokenizer = self.encode(prompt, memory), self.tokenizer_of(memory)
        ends = stop_tokens(tokenizer, stop)
        tokens = self.generate_tokens(ids, memory, max_new_tokens, ends=ends, text=text, **how)
        return until_stop(stream_text(tokenizer, ids, tokens), stop)

    # Scores

    def score(self, windows: Sequence[Sequence[int]], memory: str | None = None) -> tuple[float, int]:
        """Negative log-likelihood of token windows, each alone: its tokens 2…n given the ones before.

        Returns:
            The sum in nats, and the number of predicted tokens but for those written as -1 - id: what
            others say in a conversation is read and not scored. Perplexity is exp(sum / number).

        Raises:
            KoffError: an unknown memory, or a window that is empty or does not fit.
        """
        return scoring.score(self, windows, memory)

    def logits(self, tokens: Sequence[int], memory: str | None = None) -> np.ndarray:
        """Logits after every one of `tokens`, float32 [len(tokens), words(memory)]."""
        self.check_tokens(tokens, memory)
        return CachedText(self, memory).read(tokens)

    def windows(self, text: str, memory: str | None = None) -> list[list[int]]:
        """The text in the manifest's windows: `window` tokens, `bos` counted; the last may be shorter."""
        return scoring.windows(self, text, memory)

    def score_text(self, text: str, memory: str | None = None) -> tuple[float, int]:
        """`score` of the text's `windows`."""
        return self.score(self.windows(text, memory), memory)
