"""What a row of the architecture table says: numbers of config.json, names and shapes of tensors.

A row is data. `Architecture.settings` checks a config.json against it, `Architecture.tensors` lists the
tensors a checkpoint of these settings has, under both names, so that a checkpoint is compared with what it
should hold, and a model without weights can be planned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmix.errors import InputError
from localmix.sources.base import MetaValue
from localmix.sources.documents import shown

Number = int | float | bool
Settings = Mapping[str, Number]

# Blocks of stored rows, `[blocks, rows, columns]` → rows of the GGUF tensor, `[blocks, rows', columns']`; the
# lengths are those of `Architecture.dimensions`.
Rearrange = Callable[[npt.NDArray[Any], Mapping[str, int]], npt.NDArray[Any]]

# Whether a model of these settings has a tensor, in this layer.
Applies = Callable[[Settings, int | None], bool]

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
    "_scales": "MXFP4",
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
        aliases: further names that it has had.
    """

    name: str
    kind: type[int] | type[float] | type[bool]
    least: float = 1
    most: float = 2**31 - 1
    absent: Default = Rule.REFUSE
    null: Default = Rule.REFUSE
    keys: tuple[str, ...] = ()
    write: Callable[[Any], MetaValue] | None = None
    aliases: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any], before: Settings, path: Path) -> Number | None:
        """The checked value.

        Raises:
            InputError: missing, null, of the wrong kind or out of range.
        """
        value = next((config[name] for name in (self.name, *self.aliases) if config.get(name) is not None), None)
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


def always(settings: Settings, layer: int | None) -> bool:
    """Of every model and layer: what most rules are about."""
    return True


def interleave_halves(blocks: npt.NDArray[Any], lengths: Mapping[str, int]) -> npt.NDArray[Any]:
    """Rows of whole heads, from transformers' rotary halves to llama.cpp's pairs: 0, h/2, 1, h/2 + 1, …"""
    count, rows, columns = blocks.shape
    halves = blocks.reshape(count, 2, rows // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(blocks.shape)


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
        applies: whether a model of these settings has the tensor, in this layer.
        stored: names of the dimensions in the checkpoint, where they differ.
        blocks: dimension that counts the blocks which `rearrange` works on.
        rearrange: makes rows of the GGUF tensor from blocks of stored rows.
        turn: (0, 2) for the first of every two stored rows, where two tensors lie in one by turns.
        shift: added to every value; only for tensors that are F32.
    """

    source: str
    target: str
    shape: tuple[str, ...]
    heads: str = ""
    presence: Presence = Presence.ALWAYS
    float32: bool = False
    applies: Applies = always
    stored: tuple[str, ...] = ()
    blocks: str = ""
    rearrange: Rearrange | None = None
    turn: tuple[int, int] = (0, 1)
    shift: float = 0.0


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint of given settings holds.

    Attributes:
        name: GGUF name.
        shape: GGUF shape in numpy order.
        stored: shape of the tensor in the checkpoint; of one expert's, where they are stacked.
        source: checkpoint name; `{expert}` stands for the number of the expert in a stacked tensor.
        blocks: number of blocks of rows that are rearranged; 0 keeps the rows as they are.
        rearrange: makes GGUF rows of blocks of stored rows, `[blocks, rows, columns]`.
        turn: which of how many stored rows is taken.
        required: a checkpoint without it is incomplete.
        float32: always F32 in the GGUF file.
        shift: added to every value.
        layer: number of the layer, None outside of the layers.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    source: str
    blocks: int
    rearrange: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None
    turn: tuple[int, int]
    required: bool
    float32: bool
    shift: float
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


def head_size(settings: Settings) -> int:
    """Width of one attention head; an equal part of the hidden size where config.json does not say it."""
    return int(settings.get("head_dim", settings["hidden_size"] // settings["num_attention_heads"]))


def check_heads(settings: Settings, path: Path) -> None:
    """Raise InputError when the heads do not share the hidden size evenly, and config.json does not say their size."""
    heads = settings["num_attention_heads"]
    if "head_dim" not in settings and settings["hidden_size"] % heads:
        raise InputError(f"{path}: hidden_size {settings['hidden_size']} is not a multiple of {heads} heads.")


def check_grouped_attention(settings: Settings, path: Path) -> None:
    """Relations between settings that every transformer with grouped-query attention keeps.

    Raises:
        InputError: they contradict each other.
    """
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    if heads % kv_heads:
        raise InputError(f"{path}: {heads} attention heads cannot share {kv_heads} key-value heads evenly.")
    check_heads(settings, path)
    if head_size(settings) % 2:
        raise InputError(f"{path}: heads of {head_size(settings)} cannot be rotated; their size must be even.")
    check_experts(settings, path)


def check_experts(settings: Settings, path: Path) -> None:
    """Raise InputError when a token is to use more experts than there are."""
    used, experts = settings.get("num_experts_per_tok", 0), settings.get("num_local_experts", math.inf)
    if used > experts:
        raise InputError(f"{path}: {used} experts per token of only {experts}.")


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
        vocabulary: key-values that replace the tokenizer's own.
        check: refuses settings that contradict each other.
        expects: what config.json says wherever it says anything: llama.cpp has nothing else for this model.
        section: object of config.json that holds the settings of the text model, where there is one.
        renames: pattern in a checkpoint's tensor name → what replaces it, before names are compared.
        packed: the one quantization of checkpoints that is widened for this model (quant_method of config.json);
            the setting `packed` says whether it is there.
        elsewhere: pattern of names that belong to other parts of the checkpoint (a vision tower, a pooler).
    """

    model_type: str
    classes: tuple[str, ...]
    name: str
    rows: tuple[Setting, ...]
    rules: tuple[TensorRule, ...]
    dimensions: Callable[[Settings], Mapping[str, int]]
    derive: Callable[[Mapping[str, Any], Settings, Path], Derived]
    extra_tokens: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    vocabulary: Mapping[str, MetaValue] = field(default_factory=dict)
    check: Callable[[Settings, Path], None] = check_grouped_attention
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    section: str = ""
    renames: Mapping[str, str] = field(default_factory=dict)
    elsewhere: str = ""
    packed: str = ""

    def text_config(self, config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
        """The configuration of the text model: config.json, with the row's section laid over it.

        Raises:
            InputError: the section is no object.
        """
        if self.packed:
            config = {**config, "packed": bool(config.get("quantization_config"))}
        section = config.get(self.section) if self.section else None
        if section is None:
            return config
        if not isinstance(section, dict):
            raise InputError(f"{path}: {self.section} is {shown(section)}, not an object.")
        return {**config, **section}

    def rename(self, name: str) -> str:
        """A tensor's name as the rules have it."""
        for pattern, replacement in self.renames.items():
            name = re.sub(pattern, replacement, name)
        return name

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
        for name, accepted in self.expects.items():
            if config.get(name) is not None and config[name] not in accepted:
                raise InputError(
                    f"{path}: {name} is {shown(config[name])}; llama.cpp computes {self.model_type} models with "
                    f"{' or '.join(map(shown, accepted))} only."
                )
        self.check(found, path)
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
        layered = [rule for rule in self.rules if "{layer}" in rule.source]
        first = self.rules.index(layered[0])
        every: list[tuple[TensorRule, int | None]] = [(rule, None) for rule in self.rules[:first]]
        every += [(rule, layer) for layer in range(int(settings["num_hidden_layers"])) for rule in layered]
        every += [(rule, None) for rule in self.rules[first + len(layered) :]]
        return [_expand(rule, settings, lengths, layer) for rule, layer in every if rule.applies(settings, layer)]


def _expand(rule: TensorRule, settings: Settings, lengths: Mapping[str, int], layer: int | None) -> ExpectedTensor:
    source = rule.source if layer is None else rule.source.replace("{layer}", str(layer))
    target = rule.target if layer is None else rule.target.replace("{layer}", str(layer))
    shape = tuple(lengths[dimension] for dimension in rule.shape)
    stored = tuple(lengths[dimension] for dimension in rule.stored or rule.shape)
    rearrange = interleave_halves if rule.heads else rule.rearrange
    blocks = int(settings[rule.heads]) if rule.heads else lengths[rule.blocks] if rule.blocks else 0
    tied = bool(settings.get("tie_word_embeddings", False))
    return ExpectedTensor(
        name=target,
        shape=shape,
        stored=stored if rule.stored or "{expert}" not in source else stored[1:],
        source=source,
        blocks=blocks,
        rearrange=(lambda rows: rearrange(rows, lengths)) if rearrange is not None else None,
        turn=rule.turn,
        shift=rule.shift,
        required=rule.presence is Presence.ALWAYS or (rule.presence is Presence.UNLESS_TIED and not tied),
        float32=rule.float32 or len(shape) < 2,
        layer=layer,
    )
