"""LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

Which weights an adapter changes is told by the tensors it holds, not by `target_modules`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from localmix.errors import FileError, InputError, UsageError
from localmix.sources.documents import read_object, shown
from localmix.sources.low_rank import Factors, LoadedFactors
from localmix.sources.safetensors import WEIGHT_DTYPES, Shard, StoredTensor, open_shard

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"

# PEFT's own prefix of every name.
_PREFIX = "base_model.model."

# Endings of an adapter's names, and what the tensor is to the module whose name comes before.
_ROLES: Mapping[str, str] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
}

# Settings that make an adapter something else than a change of the weights that it was trained on.
_REFUSED: Mapping[str, str] = {
    "layer_replication": "repeats layers of its base",
    "alora_invocation_tokens": "takes effect only after certain tokens",
    "arrow_config": "chooses between adapters while it runs",
    "monteclora_config": "is drawn at random",
    "kasa_config": "takes parts of the base's weights away first",
    "use_qalora": "is made for weights quantized by GPTQ",
    "use_bdlora": "has block-diagonal factors",
}

# Ways to begin that change the base's weights, so that the adapter fits the changed ones only.
_CHANGED_BASES = ("pissa", "corda", "olora", "loftq", "lora_ga")

# Factors that are kept in memory at once; the slices in work are of one tensor, or of two or three.
_KEPT = 8


@dataclass(frozen=True)
class Lora:
    """An adapter that the user names.

    Attributes:
        path: its folder.
        scale: how much of its change is added.
    """

    path: Path
    scale: float = 1.0


def parse_lora(spec: str) -> Lora:
    """`DIR` or `DIR=SCALE`; a folder whose name has a `=` is taken as it is.

    Raises:
        UsageError: the scale is no number.
    """
    folder, sign, scale = spec.rpartition("=")
    if not sign or Path(spec).is_dir():
        return Lora(Path(spec))
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not folder or not math.isfinite(number):
        raise UsageError(
            f"{spec!r} is no adapter with a scale.", "Write DIR or DIR=SCALE, such as ~/adapters/chat=0.5."
        )
    return Lora(Path(folder), number)


@dataclass
class AdapterModule:
    """The tensors of an adapter for one module of the model, by role."""

    name: str
    roles: dict[str, StoredTensor] = field(default_factory=dict)


class Adapter:
    """An open adapter; made by `open_adapter`."""

    def __init__(self, lora: Lora, config: Mapping[str, Any], shard: Shard) -> None:
        self.path = lora.path
        self.scale = lora.scale
        self.shard = shard
        self.load: Callable[[Factors], LoadedFactors] = lru_cache(_KEPT)(Factors.load)
        self._config = config
        self.modules: dict[str, AdapterModule] = {}
        self.whole: dict[str, StoredTensor] = {}
        self._sort()

    @property
    def recipe(self) -> str:
        """What the merged weights depend on besides the files that hold weights."""
        names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")
        settings = [self._config.get(name) for name in (*names, "trainable_token_indices")]
        return f"{self.path.resolve()} {self.scale} {settings}"

    @property
    def origin(self) -> str:
        """A hint that tells which model the adapter was trained on, as far as it says so."""
        base = self._config.get("base_model_name_or_path")
        return f"It was trained on {shown(base)}." if isinstance(base, str) and base else ""

    def close(self) -> None:
        """Close the file."""
        self.shard.close()

    def _sort(self) -> None:
        """Tell the tensors apart: factors of modules, and those that are held whole."""
        for own_name, tensor in self.shard.tensors.items():
            if tensor.dtype not in WEIGHT_DTYPES:
                raise InputError(
                    f"{self.shard.path}: tensor {shown(own_name)} is {tensor.dtype}; "
                    f"adapters are {', '.join(WEIGHT_DTYPES)}."
                )
            name = own_name.removeprefix(_PREFIX)
            ending = next((ending for ending in _ROLES if name.endswith(ending)), "")
            if ending:
                module = name.removesuffix(ending)
                place, role = self.modules.setdefault(module, AdapterModule(module)).roles, _ROLES[ending]
            else:
                # bases of layers that are trained besides, when embeddings are resized or biases trained
                place, role = self.whole, name.replace(".base_layer.", ".")
            if role in place:
                both = f"{shown(place[role].name)} and {shown(own_name)}"
                raise InputError(f"{self.shard.path}: {both} are for the same place.", "Save the adapter again.")
            place[role] = tensor
        if not self.shard.tensors:
            raise InputError(f"{self.shard.path} holds no tensor.", "The adapter was not saved; save it again.")

    def scaling(self, module: str, rank: int) -> float:
        """alpha over the rank of one module, or over its root.

        Raises:
            InputError: the tensors have another rank than the configuration says.
        """
        said = self._setting("r", "rank_pattern", module, 8)
        if rank != said:
            raise InputError(
                f"{self.path}: {shown(module)} has the rank {rank}, but {CONFIG} says {said:g}.", self.origin
            )
        alpha = self._setting("lora_alpha", "alpha_pattern", module, 8)
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _setting(self, name: str, patterns: str, module: str, default: float) -> float:
        """A number of the configuration; the first pattern that matches the end of a module's name decides."""
        value, where = self._config.get(name, default), name
        for pattern, special in (self._config.get(patterns) or {}).items():
            if _matches(pattern, module, self.path / CONFIG):
                value, where = special, f"{patterns}[{shown(pattern)}]"
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**31:
            raise InputError(f"{self.path / CONFIG}: {where} is {shown(value)}, not a number that can be used.")
        return value

    def token_indices(self, module: str, count: int) -> tuple[int, ...]:
        """Ids of the tokens whose embeddings the adapter holds.

        Raises:
            InputError: the configuration does not say them, or not so many.
        """
        said = self._config.get("trainable_token_indices")
        if isinstance(said, dict):
            said = next((said[name] for name in said if f".{module}".endswith(f".{name}")), None)
        ids = said if isinstance(said, list) else []
        if len(ids) != count or any(type(index) is not int or index < 0 for index in ids):
            raise InputError(
                f"{self.path / CONFIG}: trainable_token_indices does not say whose {count} rows {shown(module)} holds."
            )
        return tuple(ids)

    @property
    def transposed(self) -> bool:
        """Whether linear weights of the base are stored as `[in, out]`."""
        return bool(self._config.get("fan_in_fan_out"))

    @property
    def uses_magnitudes(self) -> bool:
        """Whether every low-rank change has magnitudes (DoRA)."""
        return bool(self._config.get("use_dora"))


def _matches(pattern: str, module: str, path: Path) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except (re.error, RecursionError) as error:
        raise InputError(f"{path}: {shown(pattern)} is no regular expression: {error}.") from error


def open_adapter(lora: Lora) -> Adapter:
    """Open an adapter's folder and check all but its weights.

    Raises:
        InputError: no LoRA adapter, pickled, broken, or of a kind that is not merged.
        FileError: the file system refuses.
    """
    path = lora.path
    if not path.exists():
        raise FileError(f"There is no folder {path}.", "--lora takes the folder of a PEFT adapter.")
    if not path.is_dir():
        raise InputError(f"{path} is a file.", "--lora takes the folder of a PEFT adapter.")
    if not (path / CONFIG).exists():
        raise InputError(f"{path} has no {CONFIG}, so it is no PEFT adapter.", "--lora takes the folder of one.")
    config = read_object(path / CONFIG)
    _refuse_kind(config, path / CONFIG)
    if not (path / WEIGHTS).exists():
        if (path / PICKLED).exists():
            raise InputError(
                f"{path} holds its weights only as {PICKLED}: reading pickled files can run whatever code they"
                " contain, so they are refused.",
                f"Save it again with PEFT, which writes {WEIGHTS}.",
            )
        raise InputError(f"{path} has no {WEIGHTS}.", "Download the adapter again.")
    shard = open_shard(path / WEIGHTS)
    try:
        return Adapter(lora, config, shard)
    except BaseException:
        shard.close()
        raise


def _refuse_kind(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: an adapter of type {shown(kind)} cannot be merged.", "Only LORA can.")
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise InputError(f"{path}: the adapter {reason} ({name}), so it cannot be merged into weights.")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_CHANGED_BASES):
        raise InputError(
            f"{path}: the adapter was trained on weights that {shown(begun)} had changed before.",
            "Save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{path}: {name} is {shown(config[name])}, not an object.")


def replaces_vocabulary(adapter: Adapter) -> bool:
    """Whether the adapter brings embeddings of its own, to which its tokenizer belongs."""
    trained = any("tokens" in module.roles for module in adapter.modules.values())
    return trained or any(map(is_embedding, adapter.whole))


def is_embedding(name: str) -> bool:
    """Whether a tensor of this name is the embedding of the tokens."""
    return f".{name}".endswith(f".{EMBEDDING}")
