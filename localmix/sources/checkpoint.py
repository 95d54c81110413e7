"""A Hugging Face checkpoint folder as a Source: config.json, safetensors, tokenizer; nothing is executed.

What the folder should hold follows from config.json and the architecture's row; everything is compared with
that before the first weight is read. A folder without weights gives a source that can only be planned.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType as ValueType
from gguf.utility import size_label

from localmix.architectures import find_architecture
from localmix.architectures.base import (
    LEFTOVERS,
    MOST_TOKENS,
    QUANTIZED_ENDINGS,
    Architecture,
    ExpectedTensor,
    Number,
)
from localmix.errors import FileError, InputError
from localmix.sources.adapter import Adapter, Lora, open_adapter, replaces_vocabulary
from localmix.sources.base import MetaValue, ShapeOnlySource, Source, TensorInfo, f32, text
from localmix.sources.documents import listed, read_object, read_optional_object, shown
from localmix.sources.fp8 import widen_fp8
from localmix.sources.lora import describe, lay_over
from localmix.sources.mxfp4 import PackedTensor, pack
from localmix.sources.quantized import Fp8Scheme, read_scheme, unquantized_hint
from localmix.sources.safetensors import WEIGHT_DTYPES, Shard, StoredTensor, open_shard
from localmix.sources.tokenizers import has_tokenizer, read_tokenizer
from localmix.tensor_types import FLOAT_TYPES, TensorType, widen

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DOWNLOAD = "Download the checkpoint again, for example with `localmix pull REPOSITORY`."

# Weights that only Python's pickle reads; training_args.bin, optimizer.pt and their like are none.
_PICKLED = re.compile(r"((pytorch_)?model\b.*|consolidated.*)\.(bin|pt|pth|pkl)|.*\.ckpt")

# Safetensors files in the same folder that are not the model.
_NOT_THE_MODEL = ("adapter_", "consolidated", "optimizer")

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")

# A plain name of a file in the same folder: no separators, no drive, no NUL, not hidden.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors")

_LAYER_NUMBER = re.compile(r"\.layers?\.(\d{1,9})\.")

# How the hub's cache names the folder of a repository.
_CACHED = re.compile(r"models--(?:.+--)?(?P<name>.+)")

_UNTIED_HEAD = "output.weight"
_MOST_SENTENCES = 4

_TYPES: Mapping[str, TensorType] = {"BF16": TensorType.BF16, "F16": TensorType.F16, "F32": TensorType.F32}

_CONFIG_TYPES: Mapping[str, TensorType] = {
    "bfloat16": TensorType.BF16,
    "float16": TensorType.F16,
    "float32": TensorType.F32,
}


def _i32(value: int) -> MetaValue:
    return MetaValue(ValueType.INT32, int(value))


# generation_config.json → the sampling settings that llama.cpp's programs start from.
_SAMPLING: Mapping[str, tuple[str, Callable[[Any], MetaValue]]] = {
    "top_k": ("top_k", _i32),
    "top_p": ("top_p", f32),
    "min_p": ("min_p", f32),
    "xtc_probability": ("xtc_probability", f32),
    "xtc_threshold": ("xtc_threshold", f32),
    "temperature": ("temp", f32),
    "penalty_last_n": ("penalty_last_n", _i32),
    "repetition_penalty": ("penalty_repeat", f32),
    "penalty_repeat": ("penalty_repeat", f32),
    "mirostat": ("mirostat", _i32),
    "mirostat_tau": ("mirostat_tau", f32),
    "mirostat_eta": ("mirostat_eta", f32),
}


@dataclass(frozen=True)
class _Layout:
    """Where the rows of one GGUF tensor come from: stored tensors one after the other, or computed values."""

    parts: tuple[StoredTensor, ...]
    tensor: ExpectedTensor | None = None
    values: npt.NDArray[np.float32] | None = None


class Checkpoint(Source):
    """A checkpoint with weights; made by `open_checkpoint`."""

    def __init__(
        self,
        path: Path,
        metadata: dict[str, MetaValue],
        tensors: Sequence[TensorInfo],
        notes: list[str],
        layouts: Mapping[str, _Layout],
        shards: Sequence[Shard],
        recipe: str = "",
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self.notes = notes
        self.recipe = recipe
        self._layouts = layouts
        self._shards = shards

    def read(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        layout = self._layouts[tensor.name]
        if not 0 <= start <= stop <= tensor.rows:
            raise IndexError(f"rows {start}:{stop} of {tensor.name}, which has {tensor.rows}")
        if layout.values is not None:
            return layout.values.reshape(1, -1)[start:stop]
        rows_of_part = tensor.rows // len(layout.parts)
        pieces: list[npt.NDArray[Any]] = []
        while start < stop:
            number, first = divmod(start, rows_of_part)
            last = min(rows_of_part, first + stop - start)
            rows = _read_rows(layout.parts[number], layout.tensor, rows_of_part, first, last)
            pieces.append(_as_type(rows, layout.parts[number].dtype, tensor.type))
            start += last - first
        if not pieces:
            return np.empty((0, tensor.columns), FLOAT_TYPES[tensor.type])
        found = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if layout.tensor is not None and layout.tensor.shift:
            found = found + np.float32(layout.tensor.shift)
        return found

    def files(self) -> Sequence[Path]:
        return [shard.path for shard in self._shards]

    def check_unchanged(self) -> None:
        for shard in self._shards:
            shard.file.check_unchanged()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def _read_rows(part: StoredTensor, tensor: ExpectedTensor | None, rows: int, first: int, last: int) -> npt.NDArray[Any]:
    """Rows `[first:last)` of the `rows` that one stored tensor gives the GGUF file, in the stored dtype."""
    blocks, rearrange = (tensor.blocks, tensor.rearrange) if tensor is not None else (0, None)
    which, of = tensor.turn if tensor is not None else (0, 1)
    if len(part.shape) == 1:
        values = part.read_rows(0, part.shape[0])
        if rearrange:
            values = rearrange(values.reshape(blocks, -1, 1))
        return values.reshape(rows, -1)[first:last]
    part = replace(part, shape=(math.prod(part.shape[:-1]), part.shape[-1]))
    if not rearrange:
        return part.read_rows(first * of, last * of)[which::of]
    # Rows move within their block only, so the blocks that the slice touches are read whole.
    given, taken = rows // blocks, part.shape[0] // blocks
    start, stop = first // given, -(-last // given)
    stored = part.read_rows(start * taken, stop * taken).reshape(stop - start, taken, -1)
    made = rearrange(stored)
    return made.reshape(-1, made.shape[-1])[first - start * given : last - start * given]


def _as_type(rows: npt.NDArray[Any], dtype: str, kind: TensorType) -> npt.NDArray[Any]:
    """Rows of a stored dtype as the type the tensor is handed out in: the same one, or F32."""
    stored = _TYPES.get(dtype)
    if stored == kind:
        return rows
    return rows.astype(np.float32) if stored is None else widen(rows, stored)


def open_checkpoint(path: Path, *, pre: str | None = None, loras: Sequence[Lora] = ()) -> Source:
    """Open a checkpoint folder and check it in full, except for the weights themselves.

    Args:
        path: a folder with config.json, safetensors files and a tokenizer. Without any file of weights the
            result can be planned but not read.
        pre: llama.cpp's name for the way that the tokenizer splits, instead of recognising it.
        loras: adapters that are merged into the weights while they are read.

    Raises:
        InputError: broken, incomplete, already quantized, or of a kind that is not converted; or an adapter is.
        FileError: the file system refuses.
    """
    path = Path(path)
    names = list_folder(path)
    config_path = path / CONFIG
    if CONFIG not in names:
        raise InputError(f"{path} has no {CONFIG}, so it is not a checkpoint.", _hint_without_config(path, names))
    config: Mapping[str, Any] = read_object(config_path)
    row = find_architecture(config, config_path)
    scheme = read_scheme(config, config_path, row.packed)
    config = row.text_config(config, config_path)
    settings = row.settings(config, config_path)
    notes: list[str] = []
    with ExitStack() as opened:
        shards = open_shards(path, names, opened)
        stored = _collect(path, row, shards, notes)
        _widen(path, config, scheme, stored, notes)
        adapters = open_adapters(path, loras, shards, opened)
        if adapters:
            stored = lay_over(path, stored, adapters, row.rename)
            notes += describe(adapters, stored)
        embedding = row.rules[0].source
        if any(replaces_vocabulary(adapter) for adapter in adapters) and embedding in stored:
            settings["vocab_size"] = stored[embedding].shape[0]
        elif shards:
            settings["vocab_size"] = _embedding_rows(row, settings, stored, config_path, notes)
        derived = row.derive(config, settings, config_path)
        notes += [f"{config_path}: {note}." for note in derived.notes]
        expected = row.tensors(settings)
        layouts = _match(path, row, expected, stored) if shards else {}
        float_type = _config_type(config)
        tensors = [TensorInfo(name, values.shape, TensorType.F32) for name, values in derived.tensors.items()]
        for tensor in expected:
            if tensor.name in layouts or (tensor.required and not shards):
                kind = _handed_out_as(tensor, layouts.get(tensor.name), float_type)
                tensors.append(TensorInfo(tensor.name, tensor.shape, kind))
        layouts |= {name: _Layout((), values=values) for name, values in derived.tensors.items()}
        metadata = _general_metadata(path, row, tensors)
        if adapters:
            parts = [path, *(adapter.path for adapter in adapters)]
            metadata["general.name"] = text(" + ".join(map(_model_name, parts)))
        metadata |= row.metadata(settings)
        metadata |= derived.metadata
        if shards or has_tokenizer(path):
            folder = tokenizer_folder(path, adapters)
            tokenizer = read_tokenizer(folder, config, int(settings["vocab_size"]), row.extra_tokens, pre)
            metadata |= {**tokenizer.metadata, **row.vocabulary}
            notes += tokenizer.notes
        opened.pop_all()
    if not shards:
        return ShapeOnlySource(path, metadata, tensors, notes)
    recipe = "\n".join(adapter.recipe for adapter in adapters)
    return Checkpoint(path, metadata, tensors, notes, layouts, [*shards, *(a.shard for a in adapters)], recipe)


def open_adapters(path: Path, loras: Sequence[Lora], shards: Sequence[Shard], opened: ExitStack) -> list[Adapter]:
    """Open the adapters that are to be merged into the weights of a folder.

    Raises:
        InputError: the folder has no weights, or an adapter is none.
    """
    if loras and not shards:
        raise InputError(f"{path} has no weights to merge {loras[0].path} into.", _DOWNLOAD)
    adapters: list[Adapter] = []
    for lora in loras:
        adapters.append(open_adapter(lora))
        opened.callback(adapters[-1].close)
    return adapters


def tokenizer_folder(path: Path, adapters: Sequence[Adapter]) -> Path:
    """The folder whose tokenizer belongs to the weights: that of an adapter which brings embeddings of its own."""
    own = [adapter.path for adapter in adapters if replaces_vocabulary(adapter) and has_tokenizer(adapter.path)]
    return own[-1] if own else path


def list_folder(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except NotADirectoryError as error:
        raise InputError(f"{path} is a file; a checkpoint is a folder with {CONFIG}.") from error
    except OSError as error:
        raise FileError(f"{path} cannot be opened: {error.strerror or error}.") from error


def _hint_without_config(path: Path, names: set[str]) -> str:
    """The next step for the folders that are taken for a checkpoint most often."""
    if "adapter_config.json" in names:
        return "It is a LoRA adapter: give the folder of its base model, and this one with --lora."
    if any(name.endswith(".gguf") for name in names):
        return "To use a GGUF file, give the file itself."
    # a folder of models, or how the hub's cache keeps one
    below = [found for level in ("*", "snapshots/*") for found in path.glob(f"{level}/{CONFIG}") if found.is_file()]
    return f"Give {max(below, key=os.path.getmtime).parent}." if below else _DOWNLOAD


def open_shards(path: Path, names: set[str], opened: ExitStack) -> list[Shard]:
    """All shards of the folder, open; none if it holds no weights at all.

    Raises:
        InputError: shards are missing, disagree with the index, or only pickled weights are there.
    """
    found = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith(_NOT_THE_MODEL))
    weight_map: dict[str, str] = {}
    if INDEX in names:
        weight_map = _read_index(path / INDEX)
        wanted = sorted(set(weight_map.values()))
    elif SINGLE in names:
        wanted = [SINGLE]
    else:
        wanted = _with_gaps(found)
    missing = [name for name in wanted if not os.path.exists(path / name)]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(wanted)} shards: {listed(missing, len(missing))}.",
            _DOWNLOAD,
        )
    if not wanted:
        pickled = sorted(name for name in names if _PICKLED.fullmatch(name))
        if pickled:
            raise InputError(
                f"{path} holds its weights only as {listed(pickled, 3)}: reading pickled files can run "
                "whatever code they contain, so they are refused.",
                "Take a revision with .safetensors files.",
            )
    shards: list[Shard] = []
    for name in wanted:
        shards.append(open_shard(path / name))
        opened.callback(shards[-1].close)
    if weight_map:
        _compare_with_index(path / INDEX, weight_map, shards)
    return shards


def _with_gaps(found: Sequence[str]) -> list[str]:
    """Shard names found without an index, completed with those that their numbering says should be there."""
    wanted = set(found)
    for name in found:
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            total = int(numbered["total"])
            wanted |= {f"{numbered['stem']}-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)}
    return sorted(wanted)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name → shard name, every shard name checked to be a plain file name of this folder."""
    weight_map = read_object(path, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map.", _DOWNLOAD)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise InputError(
                f"{path} places tensor {shown(tensor)} in {shown(shard)}, "
                "which is not the name of a safetensors file in this folder.",
                "It is not opened; take the checkpoint from a source you trust.",
            )
    return weight_map


def _compare_with_index(path: Path, weight_map: Mapping[str, str], shards: Sequence[Shard]) -> None:
    for shard in shards:
        placed = {tensor for tensor, name in weight_map.items() if name == shard.path.name}
        absent, extra = placed - shard.tensors.keys(), shard.tensors.keys() - placed
        if absent or extra:
            problems = [f"lacks {listed(sorted(absent), 3)}"] if absent else []
            problems += [f"holds {listed(sorted(extra), 3)} besides"] if extra else []
            raise InputError(f"{shard.path} disagrees with {path.name}: it {' and '.join(problems)}.", _DOWNLOAD)


def _collect(path: Path, row: Architecture, shards: Sequence[Shard], notes: list[str]) -> dict[str, StoredTensor]:
    """All tensors of all shards by the names that the row's rules have, without known leftovers.

    Raises:
        InputError: a tensor in two shards.
    """
    stored: dict[str, StoredTensor] = {}
    dropped: list[str] = []
    elsewhere: list[str] = []
    for shard in shards:
        for own_name, tensor in shard.tensors.items():
            name = row.rename(own_name)
            if row.elsewhere and re.search(row.elsewhere, name):
                elsewhere.append(own_name)
                continue
            if name in stored:
                both = f"{stored[name].file.path.name} and in {shard.path.name}"
                raise InputError(f"{path}: tensor {shown(name)} is in {both}.", _DOWNLOAD)
            stored[name] = tensor
    if row.packed:
        pack(stored)
    for name in filter(LEFTOVERS.search, list(stored)):
        del stored[name]
        dropped.append(name)
    if elsewhere:
        notes.append(
            f"{path}: {len(elsewhere)} tensors are of parts that a GGUF file of this model does not have: "
            f"{listed(elsewhere, 3)}."
        )
    if dropped:
        notes.append(f"{path}: {len(dropped)} leftover tensors are dropped: {listed(dropped, 3)}.")
    return stored


def _widen(
    path: Path, config: Mapping[str, Any], scheme: Fp8Scheme | None, stored: dict[str, StoredTensor], notes: list[str]
) -> None:
    """Put wide tensors in the place of FP8 ones; all that is left must be plain weights.

    Raises:
        InputError: weights are quantized in another way, or are not floating point.
    """
    dtype = "F32" if _config_type(config) == TensorType.F32 else "BF16"
    block = scheme.block if scheme is not None else None
    count, dropped = widen_fp8(stored, dtype=dtype, block=block, scaled=scheme is not None)
    if count:
        notes.append(f"{path}: {count} FP8 tensors are widened to {dtype}.")
    if dropped:
        notes.append(f"{path}: {len(dropped)} scales of activations are dropped: {listed(dropped, 3)}.")
    for name, tensor in stored.items():
        if isinstance(tensor, PackedTensor):
            continue
        method = next((method for ending, method in QUANTIZED_ENDINGS.items() if name.endswith(ending)), None)
        if method:
            raise InputError(
                f"{path}: the checkpoint is already quantized ({method}): it holds {shown(name)}.",
                unquantized_hint(path),
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise InputError(
                f"{tensor.file.path}: tensor {shown(name)} is {tensor.dtype}; "
                f"weights must be {', '.join(WEIGHT_DTYPES)}.",
                unquantized_hint(path),
            )


def _embedding_rows(
    row: Architecture,
    settings: Mapping[str, Number],
    stored: Mapping[str, StoredTensor],
    config_path: Path,
    notes: list[str],
) -> int:
    """Size of the vocabulary: that of config.json, or the embedding's where it has more rows."""
    said = int(settings["vocab_size"])
    embedding = stored.get(row.rules[0].source)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[0] == said:
        return said
    rows = embedding.shape[0]
    if rows < said or rows > MOST_TOKENS:
        raise InputError(
            f"{config_path}: vocab_size is {said}, but {embedding.name} in {embedding.file.path.name} has {rows} rows.",
            "config.json and weights belong to different models.",
        )
    notes.append(f"{config_path}: vocab_size is {said}, the embedding's {rows} rows are kept.")
    return rows


def _match(
    path: Path, row: Architecture, expected: Sequence[ExpectedTensor], stored: Mapping[str, StoredTensor]
) -> dict[str, _Layout]:
    """Stored tensors put in the places that the architecture has for them.

    Raises:
        InputError: tensors are missing, are of a wrong shape, or belong nowhere.
    """
    layouts: dict[str, _Layout] = {}
    used: set[str] = set()
    lacking: list[ExpectedTensor] = []
    for tensor in expected:
        parts = [stored[name] for name in tensor.sources if name in stored]
        used.update(name for name in tensor.sources if name in stored)
        if len(parts) == (tensor.shape[0] if tensor.stacked else 1):
            _require_shape(tensor, parts)
            layouts[tensor.name] = _Layout(tuple(parts), tensor)
        elif parts or tensor.required:
            lacking.append(tensor)
    problems = _missing_sentences(lacking, stored)
    unmapped = sorted(stored.keys() - used)
    if unmapped:
        told = "1 tensor belongs" if len(unmapped) == 1 else f"{len(unmapped)} tensors belong"
        problems.append(f"{told} nowhere in a {row.model_type} model of this config.json: {listed(unmapped, 3)}")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}.", "Check that config.json and weights belong together.")
    return layouts


def _require_shape(tensor: ExpectedTensor, parts: Iterable[StoredTensor]) -> None:
    for part in parts:
        if part.shape != tensor.stored:
            raise InputError(
                f"{part.file.path}: {part.name} has the shape {list(part.shape)}, "
                f"config.json asks for {list(tensor.stored)}.",
                "config.json and weights belong to different models.",
            )


def _missing_sentences(lacking: Sequence[ExpectedTensor], stored: Mapping[str, StoredTensor]) -> list[str]:
    """What is absent, most telling first: whole layers, single experts, single tensors."""
    if not lacking:
        return []
    present = {number[1] for number in map(_LAYER_NUMBER.search, stored) if number}
    layers = sorted({tensor.layer for tensor in lacking if tensor.layer is not None} - set(map(int, present)))
    sentences = [_missing("layer", layers)] if layers else []
    single: list[str] = []
    for tensor in lacking:
        if tensor.layer in layers:
            continue
        absent = [(number, name) for number, name in enumerate(tensor.sources) if name not in stored]
        if tensor.stacked:
            sentences.append(_missing("expert", [number for number, _ in absent], f" of {shown(tensor.source)}"))
        else:
            single.append(absent[0][1])
    if single:
        sentences.append(f"{listed(single)} {'is' if len(single) == 1 else 'are'} missing")
    if any(tensor.name == _UNTIED_HEAD for tensor in lacking):
        sentences.append("config.json does not say that it shares the embedding (tie_word_embeddings)")
    return sentences if len(sentences) <= _MOST_SENTENCES else [*sentences[:_MOST_SENTENCES], "and more"]


def _missing(what: str, numbers: Sequence[int], of: str = "") -> str:
    if len(numbers) == 1:
        return f"{what} {numbers[0]}{of} is missing"
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{what}s {', '.join(map(str, numbers[:8]))}{more}{of} are missing"


def _config_type(config: Mapping[str, Any]) -> TensorType:
    """The type of the weights as config.json tells it; BF16 if it does not."""
    return _CONFIG_TYPES.get(str(config.get("dtype") or config.get("torch_dtype")), TensorType.BF16)


def _handed_out_as(tensor: ExpectedTensor, layout: _Layout | None, float_type: TensorType) -> TensorType:
    """F32 where every GGUF file has it, else what is stored; experts of mixed types meet in F32."""
    if tensor.float32:
        return TensorType.F32
    if layout is None:
        return float_type
    dtypes = {part.dtype for part in layout.parts}
    return _TYPES.get(dtypes.pop(), TensorType.F32) if len(dtypes) == 1 else TensorType.F32


def _general_metadata(path: Path, row: Architecture, tensors: Sequence[TensorInfo]) -> dict[str, MetaValue]:
    """The `general.` key-values: architecture, kind of file, sampling settings, name and size."""
    metadata = {"general.architecture": text(row.name), "general.type": text("model")}
    metadata |= _sampling_metadata(path / "generation_config.json")
    metadata["general.name"] = text(_model_name(path))
    experts = [tensor for tensor in tensors if "_exps." in tensor.name and len(tensor.shape) == 3]
    total = sum(tensor.elements for tensor in tensors)
    shared = total - sum(tensor.elements for tensor in experts)
    of_one_expert = sum(tensor.elements // tensor.shape[0] for tensor in experts)
    count = experts[0].shape[0] if experts else 0
    metadata["general.size_label"] = text(size_label(total, shared, of_one_expert, count))
    return metadata


def _model_name(path: Path) -> str:
    """The folder's name; in the hub's cache, where folders are named after revisions, the repository's."""
    folder = Path(os.path.abspath(path))
    repository = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    name = repository["name"] if repository else folder.name
    return name.encode("utf-8", "replace").decode("utf-8")


def _sampling_metadata(path: Path) -> dict[str, MetaValue]:
    """The sampling settings of generation_config.json; null means that there is none."""
    metadata: dict[str, MetaValue] = {}
    config = read_optional_object(path)
    for name, (key, write) in _SAMPLING.items():
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**31:
            raise InputError(f"{path}: {name} is {shown(value)}, not a number that can be used.")
        metadata[f"general.sampling.{key}"] = write(value)
    return metadata
