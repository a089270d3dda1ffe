"""What one domain carries: a LoRA adapter (PEFT) and a learned key/value cache, one of each per domain.

The learned cache holds, per layer, keys and values [kv_heads, P, head_dim] after RoPE at positions 0…P−1;
text starts at position P. It begins as a real prefill of the domain's text, whose first token stays frozen as
attention sink (Cartridges, Eyuboglu et al. 2025, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from koff_export.attention import set_attention
from koff_export.errors import KoffError
from koff_export.files import check_safetensors, read_json
from koff_prune.device import device_of
from koff_prune.own_tokens import OwnTokens
from koff_prune.recipe import Lora, Memory, MemoryKind
from koff_prune.units import decoder_layers

# Where a domain's name may stand: the LoRA that all domains share. No domain may be called so.
RECOVERY = "_recovery"


class KvMemory(nn.Module):
    """The learned cache of one domain.

    Attributes:
        keys, values: Per layer, float32 [kv_heads, P - 1, head_dim], trained.
        sink_keys, sink_values: Per layer, float32 [kv_heads, 1, head_dim], frozen.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.keys = nn.ParameterList([nn.Parameter(k[:, 1:].float().clone()) for k, _ in layers])
        self.values = nn.ParameterList([nn.Parameter(v[:, 1:].float().clone()) for _, v in layers])
        self.sinks = [(k[:, :1].float().clone(), v[:, :1].float().clone()) for k, v in layers]
        self.tokens = layers[0][0].shape[1]

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of layer i, each [kv_heads, P, head_dim]."""
        key, value = self.keys[i], self.values[i]
        sink_key, sink_value = (t.to(key.device) for t in self.sinks[i])
        return torch.cat([sink_key, key], 1), torch.cat([sink_value, value], 1)

    @torch.no_grad()
    def copy_(self, other: KvMemory) -> None:
        """Takes over another cache of the same shapes, in place: an optimizer keeps its parameters."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
        self.sinks = other.sinks

    def tensors(self) -> dict[str, torch.Tensor]:
        """`layers.{i}.key` and `.value`, float32 [kv_heads, P, head_dim], detached."""
        result = {}
        for i in range(len(self.keys)):
            for name, tensor in zip(("key", "value"), self.layer(i), strict=True):
                result[f"layers.{i}.{name}"] = tensor.detach().cpu().contiguous().clone()
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> KvMemory:
        """The reverse of `tensors`.

        Raises:
            KoffError: A layer is missing or its shape is not [kv_heads, P, head_dim] with one P for all.
        """
        count = len(tensors) // 2
        try:
            layers = [(tensors[f"layers.{i}.key"], tensors[f"layers.{i}.value"]) for i in range(count)]
        except KeyError as error:
            raise KoffError(f"kv memory: tensor {error} is missing") from error
        length = {t.shape[1] if t.ndim == 3 else None for pair in layers for t in pair}
        if len(length) != 1 or None in length:
            raise KoffError("kv memory: tensors must be [kv_heads, P, head_dim] with one P in all layers")
        return cls(layers)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [kv_heads, P, head_dim] per layer that the model computes for the tokens `ids` [P]."""
    cache: Any = DynamicCache()
    model(input_ids=ids[None].to(device_of(model)), past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


class Memories:
    """Every domain's memory around one model; one is active at a time, or none.

    Args:
        model: The dense model or a backbone; gets wrapped by PEFT in place where LoRA is asked for.
        memory: Which parts, and their sizes.
        prefills: Per domain, the tokens [P] that its cache starts from.
        seed: Of LoRA's random half, the same for every domain's same-named module.
        recover: A LoRA that stays attached whichever memory is, and without one: it is the backbone's.
        own: Of a model that has every domain's own tokens: the active memory's and the backbone's alone
            are possible. None: all are.

    Attributes:
        model: The PEFT model, or the plain one without LoRA.
        kv: Per domain, its learned cache; empty without one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: Memory,
        prefills: Mapping[str, torch.Tensor],
        seed: int,
        recover: Lora | None = None,
        own: OwnTokens | None = None,
    ) -> None:
        self.memory, self.domains, self.recover = memory, list(prefills), recover
        self.base = model
        self.kv: dict[str, KvMemory] = {}
        self.active: str | None = None
        self.own = own
        self.tokens = 0  # P of the active memory
        set_attention(model)
        shift = model.model.register_forward_pre_hook(self._shift_positions, with_kwargs=True)
        self.undo: list[Callable[[], object]] = [shift.remove]  # what `unwrap` does
        if own is not None:
            self.undo.append(model.register_forward_hook(self._hide_tokens).remove)
        if memory.kv is not None:
            for name, ids in prefills.items():
                self.kv[name] = KvMemory(prefill(model, ids))
        self.model: Any = model
        self.lora_layers: list[LoraLayer] = []
        loras = [(_adapter(name), lora) for name in self.names if (lora := self.section(name).lora)]
        if loras:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                name, lora = loras[0]
                self.model = get_peft_model(model, lora_config(lora), adapter_name=name)
                for name, lora in loras[1:]:
                    self.model.add_adapter(name, lora_config(lora))
            self._collect()
        self.activate(None)

    @property
    def names(self) -> list[str]:
        """Whatever has tensors here: every domain, and RECOVERY where there is one."""
        return [*self.domains, RECOVERY] if self.recover is not None else self.domains

    def section(self, name: str) -> Memory:
        """The recipe section of one of `names`."""
        return Memory(lora=self.recover, kv=None) if name == RECOVERY else self.memory

    def _collect(self) -> None:
        self.lora_layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Runs float32 memories around a 16-bit model in the model's own dtype."""
        weight = next(self.base.parameters())
        half = weight.dtype != torch.float32
        for layer in self.lora_layers:  # PEFT's own cast to float32 would copy every activation
            layer.cast_input_dtype_enabled = not half
        try:
            with torch.autocast(weight.device.type, weight.dtype if half else torch.bfloat16, enabled=half):
                yield
        finally:
            for layer in self.lora_layers:
                layer.cast_input_dtype_enabled = True

    @property
    def attentions(self) -> list[Any]:
        """The attention module of every layer."""
        return [layer.self_attn for layer in decoder_layers(self.base)]

    def _shift_positions(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Moves the text behind the memory: position P is its first."""
        if not self.tokens:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            given = next(
                t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None
            )
            cache = kwargs.get("past_key_values")
            seen = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(seen, seen + given.shape[1], device=given.device)[None]
        return args, {**kwargs, "position_ids": positions + self.tokens}

    def _hide_tokens(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self.own is not None
        self.own.hide(output.logits, self.active)

    def activate(self, domain: str | None) -> None:
        """Attaches one domain's memory, or takes all off (None); what is recovered stays."""
        wanted = [_adapter(domain)] if domain is not None else []
        wanted += [_adapter(RECOVERY)] if self.recover is not None else []
        for layer in self.lora_layers:  # each has the adapters whose target it is
            mine = [name for name in wanted if name in layer.lora_A]
            if mine:
                layer.set_adapter(mine)
            layer.enable_adapters(bool(mine))
        for p in self.lora_parameters():  # PEFT freezes whatever it switches off
            p.requires_grad_(True)
        kv = self.kv.get(domain) if domain is not None else None
        for i, attention in enumerate(self.attentions):
            attention.koff_kv = None if kv is None else tuple(t[None] for t in kv.layer(i))
        self.active, self.tokens = domain, 0 if kv is None else kv.tokens

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model alone, without memory and recovery, for the length of a block."""
        before, recover = self.active, self.recover
        self.recover = None
        self.activate(None)
        try:
            yield
        finally:
            self.recover = recover
            self.activate(before)

    def lora_parameters(self) -> list[nn.Parameter]:
        """Every domain's LoRA, and the one that they share."""
        return [
            p
            for layer in self.lora_layers
            for table in (layer.lora_A, layer.lora_B)
            for module in table.values()
            for p in module.parameters()
        ]

    def kv_parameters(self) -> list[nn.Parameter]:
        """Every domain's learned cache, without the sinks."""
        return [p for kv in self.kv.values() for p in kv.parameters()]

    @property
    def device(self) -> torch.device:
        """Where the model is, and its memories."""
        return device_of(self.base)

    def count(self, domain: str) -> int:
        """Parameters that one domain's memory carries."""
        tensors = self.tensors(domain)
        return sum(t.numel() for part in tensors.values() for t in part.values())

    def tensors(self, domain: str) -> dict[str, dict[str, torch.Tensor]]:
        """`lora` and `kv` tensors of one domain, or of RECOVERY, by their file names, detached."""
        result: dict[str, dict[str, torch.Tensor]] = {}
        if self.section(domain).lora is not None:
            state = get_peft_model_state_dict(
                self.model, adapter_name=_adapter(domain), save_embedding_layers=False
            )
            result["lora"] = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
        if domain in self.kv:
            result["kv"] = self.kv[domain].tensors()
        return result

    def load(self, domain: str, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Overwrites one domain's memory, or RECOVERY, with `tensors`, of the same shapes.

        Raises:
            KoffError: A tensor is missing or of another shape.
        """
        if self.section(domain).lora is not None:
            have = get_peft_model_state_dict(
                self.model, adapter_name=_adapter(domain), save_embedding_layers=False
            )
            given = tensors.get("lora", {})
            _same_shapes(f"memory {domain}: LoRA", have, given)
            set_peft_model_state_dict(self.model, dict(given), adapter_name=_adapter(domain))
        if domain in self.kv:
            _same_shapes(f"memory {domain}: KV", self.kv[domain].tensors(), tensors.get("kv", {}))
            self.kv[domain].copy_(KvMemory.from_tensors(tensors["kv"]))

    def unwrap(self) -> PreTrainedModel:
        """Takes every memory off for good and returns the model as it was before."""
        self.activate(None)
        for step in self.undo:
            step()
        if isinstance(self.model, PeftModel):
            self.base = self.model.unload()
        return self.base


def _adapter(domain: str) -> str:
    """What PEFT calls a domain's adapter: a name without dots, which no module or tensor of PEFT has."""
    return "koff:" + domain.replace(".", ":")


def lora_config(lora: Lora) -> LoraConfig:
    """PEFT's config for the recipe's LoRA."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        target_modules=lora.target,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _same_shapes(what: str, have: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    if set(have) != set(given):
        odd = sorted(set(have) ^ set(given))[0]
        raise KoffError(f"{what}: tensor {odd} is missing or not expected; it was trained for another model")
    for name, tensor in have.items():
        if tensor.shape != given[name].shape:
            raise KoffError(
                f"{what}: tensor {name} is {list(given[name].shape)}, expected {list(tensor.shape)};"
                " it was trained for another plan"
            )


# keys of PEFT's config by which the same two matrices mean something else
_NOT_PLAIN = (
    "use_rslora", "use_dora", "use_qalora", "alpha_pattern", "rank_pattern", "layers_to_transform",
    "modules_to_save", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters",
)  # fmt: skip
MEMORY_FILES = {"lora": "adapter_model.safetensors", "kv": "kv.safetensors"}
FILES = {**MEMORY_FILES, "tokens": "tokens.safetensors"}  # and of its own tokens the rows, in a bundle


def save_memory(
    folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], memory: Memory, base: str
) -> None:
    """Writes one domain's memory: a plain PEFT LoRA folder, and its other parts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in FILES.items():
        if part in tensors:
            save_file(
                {k: v.contiguous() for k, v in tensors[part].items()},
                folder / file,
                metadata={"format": "pt"},
            )
    if "lora" in tensors:
        assert memory.lora is not None
        config = lora_config(memory.lora)
        config.base_model_name_or_path = base
        config.inference_mode = True
        # the names that PEFT resolved all-linear to, so that the folder means the same on any later version
        config.target_modules = sorted({k.split(".lora_")[0].rsplit(".", 1)[-1] for k in tensors["lora"]})
        config.save_pretrained(str(folder))


def load_memory(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors that `save_memory` wrote.

    Raises:
        KoffError: No memory there, or a damaged file.
    """
    result = {}
    for part, file in FILES.items():
        if (folder / file).exists():
            check_safetensors(folder / file)
            result[part] = load_file(folder / file)
    if not result:
        raise KoffError(f"{folder}: holds no memory (neither {' nor '.join(MEMORY_FILES.values())})")
    return result


def memory_of_folder(folder: Path) -> Memory:
    """The recipe section that describes a saved memory.

    Raises:
        KoffError: Damaged files, half a LoRA, or one of a kind that would be read as another.
    """
    from koff_prune.recipe import Kv

    lora = kv = None
    file = folder / "adapter_config.json"
    if file.exists() != (folder / MEMORY_FILES["lora"]).exists():
        raise KoffError(f"{folder}: {file.name} or {MEMORY_FILES['lora']} is missing; fetch the memory again")
    if file.exists():
        config = read_json(file)
        if isinstance(config, dict) and (odd := [key for key in _NOT_PLAIN if config.get(key)]):
            raise KoffError(f"{file}: has {odd[0]}, and a memory is a plain LoRA; train one without it")
        try:
            targets = sorted(config["target_modules"])
            lora = Lora(rank=config["r"], alpha=config["lora_alpha"], target=targets)
        except (KeyError, TypeError, ValueError) as error:
            raise KoffError(f"{file}: is no LoRA that koff-prune wrote; fetch the memory again") from error
    if (folder / MEMORY_FILES["kv"]).exists():
        check_safetensors(folder / MEMORY_FILES["kv"])
        length = KvMemory.from_tensors(load_file(folder / MEMORY_FILES["kv"])).tokens
        try:
            kv = Kv(tokens=length)
        except ValueError as error:
            raise KoffError(f"{folder}: its cache has {length} positions, which none has") from error
    return Memory(lora=lora, kv=kv)


def kind_of(tensors: Mapping[str, Any]) -> MemoryKind:
    """none, lora, kv or lora+kv."""
    return "+".join(p for p in MEMORY_FILES if p in tensors) or "none"  # type: ignore[return-value]
