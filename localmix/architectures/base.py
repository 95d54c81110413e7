"""What a row of the architecture table says: numbers of config.json, names and shapes of tensors.

A row is data. `Architecture.settings` checks a config.json against it, `Architecture.tensors` lists the
tensors a checkpoint of these settings has, under both names, so that a checkpoint is compared with what it
should hold, and a model without weights can be planned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from localmix.errors import InputError
from localmix.sources.base import MetaValue
from localmix.sources.documents import shown

Number = int | float | bool
Settings = Mapping[str, Number]

# llama.cpp's own limits (LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS in src/llama-hparams.h of the pin).
MOST_LAYERS = 512
MOST_EXPERTS = 1024

# Ours: every token costs memory before a weight is read. The largest real vocabularies have 262,144.
MOST_TOKENS = 2**22

# Buffers that old versions of transformers saved beside the weights; the engine computes them itself.
LEFTOVERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.masked_bias|attention\.bias)$")

# Endings by which the tensors of quantized checkpoints are known, and who writes them.
QUANTIZED_ENDINGS: Mapping[str, str] = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes 8 bit",
    ".weight.absmax": "bitsandbytes 4 bit",
    ".weight.quant_map": "bitsandbytes 4 bit",
    "_blocks": "MXFP4",
}


class Rule(Enum):
    """What stands where a config.json gives no number."""

    REFUSE = "refuse"


Default = Number | None | Rule | Callable[[Settings], Number]


@dataclass(frozen=True)
class Setting:
    """One number of config.json.

    Attributes:
        name: its name there.
        kind: `int`, `float` or `bool`; a float may be written as an integer.
        least, most: the range, both included.
        absent, null: what is taken when the name is missing, or null: a number, None (nothing is written),
            a function of the settings before it, or `Rule.REFUSE`.
        keys: GGUF metadata keys that carry it; `{arch}` is the architecture.
        write: makes the metadata value.
    """

    name: str
    kind: type[int] | type[float] | type[bool]
    least: float = 1
    most: float = 2**31 - 1
    absent: Default = Rule.REFUSE
    null: Default = Rule.REFUSE
    keys: tuple[str, ...] = ()
    write: Callable[[Any], MetaValue] | None = None

    def read(self, config: Mapping[str, Any], before: Settings, path: Path) -> Number | None:
        """The checked value.

        Raises:
            InputError: missing, null, of the wrong kind or out of range.
        """
        value = config.get(self.name)
        if value is None:
            default = self.null if self.name in config else self.absent
            if isinstance(default, Rule):
                problem = "is null" if self.name in config else "is missing"
                raise InputError(f"{path}: {self.name} {problem}.", "Download config.json again.")
            value = default(before) if callable(default) else default
            if value is None:
                return None
        accepted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            raise InputError(f"{path}: {self.name} is {shown(value)}, not {_KIND_NAMES[self.kind]}.")
        if self.kind is not bool and not self.least <= value <= self.most:
            raise InputError(f"{path}: {self.name} is {shown(value)}, not between {self.least} and {self.most}.")
        return self.kind(value)


_KIND_NAMES: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false"}


class Presence(Enum):
    """When a checkpoint must hold a tensor."""

    ALWAYS = "always"
    OPTIONAL = "optional"
    UNLESS_TIED = "unless tie_word_embeddings"


@dataclass(frozen=True)
class TensorRule:
    """One tensor, or one for each layer, under both its names.

    Attributes:
        source: name in the checkpoint; `{layer}` and `{expert}` are numbers.
        target: name in the GGUF file; experts are stacked into one tensor.
        shape: names of the dimensions of the GGUF tensor (see `Architecture.dimensions`), columns last.
        heads: setting that counts the heads whose rows are permuted, or empty. Checkpoints of transformers
            keep the two rotary halves of a head one after the other, llama.cpp interleaves them.
        presence: whether the tensor must be there.
        float32: kept as F32 in every GGUF file, whatever the checkpoint holds.
    """

    source: str
    target: str
    shape: tuple[str, ...]
    heads: str = ""
    presence: Presence = Presence.ALWAYS
    float32: bool = False


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint of given settings holds.

    Attributes:
        name: GGUF name.
        shape: GGUF shape in numpy order.
        source: checkpoint name; `{expert}` stands for the number of the expert in a stacked tensor.
        heads: heads whose rows are permuted; 0 keeps the rows as they are.
        required: a checkpoint without it is incomplete.
        float32: always F32 in the GGUF file.
        layer: number of the layer, None outside of the layers.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    heads: int
    required: bool
    float32: bool
    layer: int | None

    @property
    def stacked(self) -> bool:
        """Whether the first dimension counts experts, each a tensor of its own in the checkpoint."""
        return "{expert}" in self.source

    @property
    def sources(self) -> list[str]:
        """The checkpoint's names: one, or one for each expert."""
        count = self.shape[0] if self.stacked else 1
        return [self.source.replace("{expert}", str(expert)) for expert in range(count)]


@dataclass(frozen=True)
class Derived:
    """What an architecture computes from config.json beyond plain numbers: the rotary embedding.

    Attributes:
        metadata: further key-values.
        tensors: computed one-dimensional F32 tensors, by GGUF name.
        notes: sentences for the user.
    """

    metadata: Mapping[str, MetaValue]
    tensors: Mapping[str, Any]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Architecture:
    """One row: a `model_type` of transformers and how it becomes a GGUF file.

    Attributes:
        model_type: the value in config.json.
        classes: accepted entries of config.json's `architectures`.
        name: llama.cpp's name of the architecture, the prefix of its keys.
        rows: settings in the order they are read (a default may look at those before it).
        rules: tensors in the order they are written; consecutive rules with `{layer}` repeat together.
        dimensions: lengths for the names in the rules' shapes.
        derive: what is computed beyond the plain numbers.
        extra_tokens: ids of special tokens that belong to a vocabulary of exactly that size.
    """

    model_type: str
    classes: tuple[str, ...]
    name: str
    rows: tuple[Setting, ...]
    rules: tuple[TensorRule, ...]
    dimensions: Callable[[Settings], Mapping[str, int]]
    derive: Callable[[Mapping[str, Any], Settings, Path], Derived]
    extra_tokens: Mapping[int, Mapping[str, int]]

    def settings(self, config: Mapping[str, Any], path: Path) -> dict[str, Number]:
        """Every setting that has a value, checked.

        Args:
            config: the content of config.json.
            path: that file, for messages.

        Raises:
            InputError: a number is missing, null, out of range, or contradicts another.
        """
        found: dict[str, Number] = {}
        for row in self.rows:
            value = row.read(config, found, path)
            if value is not None:
                found[row.name] = value
        _require_divisible(found, path)
        return found

    def metadata(self, settings: Settings) -> dict[str, MetaValue]:
        """The settings as GGUF key-values."""
        return {
            key.replace("{arch}", self.name): row.write(settings[row.name])
            for row in self.rows
            if row.write is not None and row.name in settings
            for key in row.keys
        }

    def tensors(self, settings: Settings) -> list[ExpectedTensor]:
        """All tensors of a model of these settings, optional ones included, in the order they are written."""
        lengths = self.dimensions(settings)
        expected: list[ExpectedTensor] = []
        layered = [rule for rule in self.rules if "{layer}" in rule.source]
        first = self.rules.index(layered[0])
        expected += [_expand(rule, settings, lengths, None) for rule in self.rules[:first]]
        for layer in range(int(settings["num_hidden_layers"])):
            expected += [_expand(rule, settings, lengths, layer) for rule in layered]
        expected += [_expand(rule, settings, lengths, None) for rule in self.rules[first + len(layered) :]]
        return expected


def _expand(rule: TensorRule, settings: Settings, lengths: Mapping[str, int], layer: int | None) -> ExpectedTensor:
    source = rule.source if layer is None else rule.source.replace("{layer}", str(layer))
    target = rule.target if layer is None else rule.target.replace("{layer}", str(layer))
    shape = tuple(lengths[dimension] for dimension in rule.shape)
    tied = bool(settings["tie_word_embeddings"])
    return ExpectedTensor(
        name=target,
        shape=shape,
        source=source,
        heads=int(settings[rule.heads]) if rule.heads else 0,
        required=rule.presence is Presence.ALWAYS or (rule.presence is Presence.UNLESS_TIED and not tied),
        float32=rule.float32 or len(shape) < 2,
        layer=layer,
    )


def _require_divisible(settings: Settings, path: Path) -> None:
    """Relations between settings that every transformer with grouped-query attention keeps."""
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    if heads % kv_heads:
        raise InputError(f"{path}: {heads} attention heads cannot share {kv_heads} key-value heads evenly.")
    if "head_dim" not in settings and settings["hidden_size"] % heads:
        raise InputError(f"{path}: hidden_size {settings['hidden_size']} is not a multiple of {heads} heads.")
    size = settings.get("head_dim", settings["hidden_size"] // heads)
    if size % 2:
        raise InputError(f"{path}: heads of {size} cannot be rotated; the size of a head must be even.")
    used, experts = settings.get("num_experts_per_tok", 0), settings.get("num_local_experts", math.inf)
    if used > experts:
        raise InputError(f"{path}: {used} experts per token of only {experts}.")
