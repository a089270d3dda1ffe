"""The engines that `bundle_speed.py` times: one model open in one of them, which reads prompts and tokens.

Not run by hand: `python benchmarks/bundle_speed.py --help`.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.request import Request, urlopen

ROOM = 1024  # tokens of text that fit behind a prompt
MOST = 8  # texts that llama.cpp reads at a time


@dataclass(frozen=True)
class Case:
    """What is open where.

    Attributes:
        engine: onnx, torch, gguf or genai.
        path: A bundle (onnx), a transformers folder or a bundle (torch), a GGUF file, a genai folder.
        memory: A domain's name (onnx, torch), or a LoRA's GGUF file.
        profile, precision: Of an ONNX graph.
    """

    engine: str
    path: str
    memory: str | None = None
    profile: str | None = None
    precision: str | None = None


class Engine(Protocol):
    """One open model, and what opening it took."""

    told: dict[str, float]

    def prefill(self, prompt: int) -> None:
        """Reads a prompt of so many tokens, one row."""

    def widen(self, batch: int) -> None:
        """Makes the text so many equal ones."""

    def decode(self, tokens: int) -> None:
        """Reads so many more, one at a time."""


def prompt_of(length: int) -> Any:
    """So many tokens, int64 [1, length], the same every time."""
    import numpy as np

    return np.random.default_rng(0).integers(3, 250, (1, length))


class Onnx:
    """A graph of a bundle, as `koff-run` runs it."""

    def __init__(self, case: Case, threads: int) -> None:
        """Opens it, and its memory."""
        import numpy as np

        from koff_export.runtime import Runtime

        self.np, self.memory = np, case.memory
        begun = time.perf_counter()
        self.runtime = Runtime.open(
            case.path, case.precision, verify=False, threads=threads or None, profile=case.profile
        )
        self.told = {"open_s": time.perf_counter() - begun}
        if case.memory:
            begun = time.perf_counter()
            self.runtime.memory(case.memory)
            self.told["swap_ms"] = (time.perf_counter() - begun) * 1e3

    def prefill(self, prompt: int) -> None:
        """See `Engine`."""
        self.cache, self.length, self.batch = self.runtime.cache(self.memory), 0, 1
        self._call(prompt_of(prompt))

    def widen(self, batch: int) -> None:
        """See `Engine`."""
        one, self.batch = self.cache, batch
        self.cache = self.runtime.cache(self.memory, batch)
        self.cache.join([one] * batch)

    def decode(self, tokens: int) -> None:
        """See `Engine`."""
        for _ in range(tokens):
            self._call(self.np.full((self.batch, 1), 5))

    def _call(self, ids: Any) -> None:
        end = self.length + ids.shape[1]
        positions = self.np.arange(self.length, end)[None].repeat(len(ids), 0)
        self.cache.read(ids.astype(self.np.int64), self.np.ones((len(ids), end), self.np.int64), positions)
        self.length = end


class Torch:
    """The backbone in float32, through transformers, as `koff_prune.load_bundle` opens it."""

    def __init__(self, case: Case, threads: int) -> None:
        """Opens it with its memory attached."""
        import torch

        from koff_prune import load_backbone, load_bundle

        self.torch = torch
        if threads:
            torch.set_num_threads(threads)
        begun = time.perf_counter()
        if case.memory:
            self.model = load_bundle(case.path, case.memory, torch.float32)
        else:
            self.model = load_backbone(case.path, torch.float32)
        self.told = {"open_s": time.perf_counter() - begun}

    def prefill(self, prompt: int) -> None:
        """See `Engine`."""
        from transformers import DynamicCache

        self.cache, self.batch = DynamicCache(), 1
        self._call(self.torch.from_numpy(prompt_of(prompt)))

    def widen(self, batch: int) -> None:
        """See `Engine`."""
        self.cache.batch_repeat_interleave(batch)
        self.batch = batch

    def decode(self, tokens: int) -> None:
        """See `Engine`."""
        for _ in range(tokens):
            self._call(self.torch.full((self.batch, 1), 5))

    def _call(self, ids: Any) -> None:
        with self.torch.inference_mode():
            self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


class Genai:
    """A folder that onnxruntime-genai opens."""

    def __init__(self, case: Case, threads: int) -> None:
        """Opens it."""
        import numpy as np
        import onnxruntime_genai as genai

        self.np, self.genai, self.told = np, genai, {}
        config = genai.Config(case.path)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = genai.Model(config)

    def prefill(self, prompt: int) -> None:
        """See `Engine`."""
        self.prompt = prompt_of(prompt).astype(self.np.int32)
        self.widen(1)

    def widen(self, batch: int) -> None:
        """See `Engine`."""
        settings = self.genai.GeneratorParams(self.model)
        limit = self.prompt.shape[1] + ROOM
        settings.set_search_options(do_sample=False, max_length=limit, min_length=limit, batch_size=batch)
        self.generator = self.genai.Generator(self.model, settings)
        self.generator.append_tokens(self.prompt.repeat(batch, 0))

    def decode(self, tokens: int) -> None:
        """See `Engine`."""
        for _ in range(tokens):
            self.generator.generate_next_token()


class Gguf:
    """A GGUF file in llama.cpp's own server; a text is a slot of it, and a batch as many slots at a time."""

    def __init__(self, case: Case, threads: int) -> None:
        """Starts the server."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = case.path
        params.n_ctx, params.n_parallel, params.kv_unified = MOST * (512 + ROOM), MOST, False
        params.n_gpu_layers, params.verbosity, params.ui = 0, -1, False
        params.cache_ram_mib = 0  # a text that left its slot is forgotten
        if threads:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if case.memory:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(case.memory, 1.0)]
        begun = time.perf_counter()
        self.server = xllamacpp.Server(params)
        self.told = {"open_s": time.perf_counter() - begun}
        self.pool = ThreadPoolExecutor(MOST)

    def prefill(self, prompt: int) -> None:
        """See `Engine`."""
        self.texts = [prompt_of(prompt)[0].tolist()]
        self._ask(0, 1, keep=False)

    def widen(self, batch: int) -> None:
        """See `Engine`."""
        self.texts = [list(self.texts[0]) for _ in range(batch)]
        for slot in range(1, batch):
            self._ask(slot, 1, keep=False)

    def decode(self, tokens: int) -> None:
        """See `Engine`."""
        for done in [self.pool.submit(self._ask, slot, tokens) for slot in range(len(self.texts))]:
            done.result()

    def _ask(self, slot: int, tokens: int, *, keep: bool = True) -> None:
        """So many more tokens of one slot's text, which is read again unless it is to keep its cache."""
        asked = {
            "prompt": self.texts[slot], "n_predict": tokens, "id_slot": slot, "cache_prompt": keep,
            "temperature": 0.0, "ignore_eos": True, "return_tokens": True,
        }  # fmt: skip
        request = Request(f"{self.server.listening_address}/completion", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=600) as answer:
            found = json.load(answer)
        read = found["timings"]["prompt_n"]
        if keep and read > 1:
            raise RuntimeError(f"llama.cpp read {read} tokens again that its slot should have kept")
        self.texts[slot] += found["tokens"]


ENGINES: dict[str, Any] = {"onnx": Onnx, "torch": Torch, "gguf": Gguf, "genai": Genai}


def opened(case: Case, threads: int) -> Engine:
    """The case in its engine."""
    engine: Engine = ENGINES[case.engine](case, threads)
    return engine


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
