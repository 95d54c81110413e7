"""Plan: the type, size and place of every tensor of an output, before any weight is read.

A plan costs milliseconds. Because each slice has its address before it is made, the stream can produce slices in
any order on all cores, and disk and memory are checked before the work.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGUFValueType as ValueType

from localmix.errors import InputError, UsageError
from localmix.gguf_format import encode_entry, encode_header, encode_value, layout, padded, tensor_bytes
from localmix.importance import Importance
from localmix.native.kernels import requires_importance
from localmix.native.mixture import Mixture, choose_types, file_type
from localmix.optimization.recipe import describe_rules, fold_rules
from localmix.presets import Preset, Recipe, Rule
from localmix.sources.base import MetaValue, Source, TensorInfo, text, u32
from localmix.tensor_types import FLOAT_TYPES, TensorType

QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION
LEAST_SPLIT_BYTES = 10**6
COPY = "COPY"  # the base of the preset that leaves every tensor as it is
RECIPE = "localmix.recipe"  # begins the metadata entries of a mixture that was chosen for one model


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output.

    Attributes:
        info: name and shape, with the type it has in the source.
        type: the type it will have.
        part: number of the file it lies in, 0 for an output that is not split.
        offset: where its bytes start, counted from the start of that file.
        bytes: how many there are.
        meant: the type the preset wanted when the columns fit no block of it, else None.
    """

    info: TensorInfo
    type: TensorType
    part: int
    offset: int
    bytes: int
    meant: TensorType | None = None


@dataclass(frozen=True)
class Plan:
    """Everything about an output but its weights.

    Attributes:
        type: the preset's name.
        headers: the head of each file; more than one when the output is split.
        tensors: in the order of the source.
    """

    type: str
    headers: tuple[bytes, ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without metadata and padding."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes of each file."""
        sizes = [len(header) for header in self.headers]
        for tensor in self.tensors:
            sizes[tensor.part] += padded(tensor.bytes)
        return tuple(sizes)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.part_bytes)

    def paths(self, path: Path) -> tuple[Path, ...]:
        """The file of each part, for an output called `path`; llama.cpp's names when it is split."""
        count = len(self.headers)
        if count == 1:
            return (path,)
        stem = path.name.removesuffix(".gguf")
        return tuple(path.with_name(f"{stem}-{part + 1:05d}-of-{count:05d}.gguf") for part in range(count))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.info.elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of a weight, as `llama-quantize` prints it."""
        return self.weight_bytes * 8 / self.parameters

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        """Tensors whose columns fit no block of the type that was meant."""
        return tuple(tensor for tensor in self.tensors if tensor.meant is not None)


class Planner:
    """Plans outputs of one source; many types cost little more than one.

    Args:
        source: the model; its weights are not read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._skeleton = _skeleton(source)
        self._encoded: dict[int, tuple[MetaValue, bytes]] = {}

    def plan(
        self,
        preset: Preset,
        *,
        rules: Sequence[Rule] = (),
        has_imatrix: bool = False,
        importance: Importance | None = None,
        split_bytes: int | None = None,
    ) -> Plan:
        """Decide the type of every tensor.

        Args:
            preset: from `presets.load_presets`.
            rules: go before the preset's own.
            has_imatrix: an importance matrix will be there; it changes some mixtures.
            importance: the importance matrix, if it is already at hand; its origin goes into the metadata.
            split_bytes: put no more than this into one file, unless a single tensor is larger.

        Raises:
            InputError: llama.cpp cannot quantize this model, or the preset is a recipe of another one.
            UsageError: a rule is no regular expression.
        """
        mixture = self._mixture(preset, rules, has_imatrix or importance is not None)
        infos = [replace(tensor, type=mixture.types[tensor.name]) for tensor in self._source.tensors]
        whole = self._metadata(preset, importance)
        if preset.recipe is not None:
            whole |= self._describe_recipe(preset, preset.recipe, mixture)
        parts = _parts(infos, whole, split_bytes)
        headers: list[bytes] = []
        tensors: list[PlannedTensor] = []
        for part, members in enumerate(parts):
            metadata = whole if part == 0 else {}
            if len(parts) > 1:
                metadata |= _split_metadata(part, len(parts), len(infos))
            header = encode_header(metadata, [infos[index] for index in members], self._encode)
            headers.append(header)
            offsets, _ = layout(infos[index] for index in members)
            for index, offset in zip(members, offsets, strict=True):
                info = infos[index]
                tensors.append(
                    PlannedTensor(
                        self._source.tensors[index],
                        info.type,
                        part,
                        len(header) + offset,
                        tensor_bytes(info),
                        mixture.fallbacks.get(info.name),
                    )
                )
        return Plan(preset.name, tuple(headers), tuple(tensors))

    def _encode(self, value: MetaValue) -> bytes:
        """`encode_value`, once for each array: a vocabulary takes a quarter of a second."""
        if value.type != ValueType.ARRAY:
            return encode_value(value)
        if id(value) not in self._encoded:
            self._encoded[id(value)] = value, encode_value(value)  # held, so that no other gets its id
        return self._encoded[id(value)][1]

    def _mixture(self, preset: Preset, rules: Sequence[Rule], has_imatrix: bool) -> Mixture:
        if preset.base == COPY:
            return Mixture({tensor.name: tensor.type for tensor in self._source.tensors}, {})
        return choose_types(
            self._skeleton,
            preset.base,
            [(rule.tensor, rule.type) for rule in (*rules, *preset.rules)],
            output_type=preset.output,
            embedding_type=preset.embedding,
            pure=preset.pure,
            has_imatrix=has_imatrix,
        )

    def _metadata(self, preset: Preset, importance: Importance | None) -> dict[str, MetaValue]:
        metadata = dict(self._source.metadata)
        if preset.base != COPY:
            metadata = {key: value for key, value in metadata.items() if not key.startswith(RECIPE)}
        metadata["general.quantization_version"] = u32(QUANTIZATION_VERSION)
        if preset.base != COPY:
            metadata["general.file_type"] = u32(file_type(preset.base))
        if importance is not None:
            metadata["quantize.imatrix.file"] = text(importance.path.name)
            if importance.datasets:
                metadata["quantize.imatrix.dataset"] = text(importance.datasets[0])
            metadata["quantize.imatrix.entries_count"] = u32(len(importance.entries))
            metadata["quantize.imatrix.chunks_count"] = u32(importance.chunk_count)
        return metadata

    def _describe_recipe(self, preset: Preset, recipe: Recipe, mixture: Mixture) -> dict[str, MetaValue]:
        """The types that a recipe gives, as they turned out, and what they were chosen for.

        Raises:
            InputError: the recipe is of another model.
        """
        patterns = [_compiled(rule) for rule in preset.rules]
        types = {
            tensor.name: mixture.types[tensor.name]
            for tensor in self._source.tensors
            if any(pattern.search(tensor.name) for pattern in patterns)
        }
        left = [name for name, kind in mixture.types.items() if name not in types and kind not in FLOAT_TYPES]
        if len(types) != recipe.tensors or left:
            raise InputError(
                f"The recipe {preset.name} is of another model: it names {recipe.tensors} tensors, of which"
                f" {len(types)} are in {self._source.path}" + (f", and says nothing of {left[0]}." if left else "."),
                "Let one be chosen for this model with `localmix quantize --target`.",
            )
        return {
            RECIPE: text(describe_rules(fold_rules(types))),
            f"{RECIPE}.base": text(preset.base),
            f"{RECIPE}.target": text(recipe.target),
            f"{RECIPE}.sensitivities": text(recipe.sensitivities),
        }


def _compiled(rule: Rule) -> re.Pattern[str]:
    try:
        return re.compile(rule.tensor)
    except re.error as error:
        raise UsageError(f"{rule.tensor!r} is no regular expression: {error}.") from error


def _parts(infos: Sequence[TensorInfo], metadata: Mapping[str, MetaValue], limit: int | None) -> list[list[int]]:
    """Indexes of the tensors of each file, in order; all in one file without a limit on its bytes, head included.

    Args:
        metadata: goes into the first file, where a vocabulary can take megabytes.
    """
    if limit is None:
        return [list(range(len(infos)))]
    split = _split_metadata(0, 0, 0)
    parts: list[list[int]] = [[]]
    head, data = len(encode_header({**metadata, **split}, [])), 0
    for index, info in enumerate(infos):
        head += len(encode_entry(info, 0))
        data += padded(tensor_bytes(info))
        if parts[-1] and padded(head) + data > limit:
            parts.append([])
            head = len(encode_header(split, [])) + len(encode_entry(info, 0))
            data = padded(tensor_bytes(info))
        parts[-1].append(index)
    return parts


def _split_metadata(part: int, count: int, tensors: int) -> dict[str, MetaValue]:
    """What llama.cpp looks for in each part (llama.cpp, tools/gguf-split)."""
    return {
        "split.no": MetaValue(ValueType.UINT16, part),
        "split.count": MetaValue(ValueType.UINT16, count),
        "split.tensors.count": MetaValue(ValueType.INT32, tensors),
    }


def _skeleton(source: Source) -> bytes:
    """A GGUF file with the model's hyper-parameters and tensor names, and at most two rows of each tensor.

    The rules look at names, layers, columns and the number of dimensions, never at the number of rows, so a
    planned 87 GiB model is a few megabytes of zeros. Token lists are left out where the vocabulary's size is known.
    """
    metadata = {
        key: value
        for key, value in source.metadata.items()
        if not (key.startswith("tokenizer.") and source.get("{arch}.vocab_size") is not None)
    }
    infos = [
        replace(tensor, shape=(*(min(2, length) for length in tensor.shape[:-1]), tensor.columns))
        for tensor in source.tensors
    ]
    return encode_header(metadata, infos) + bytes(layout(infos)[1])


def check_split(plan: Plan, limit: int) -> list[str]:
    """Look for files of a split output that are larger than they may be.

    Returns:
        A sentence, when a tensor alone is too large for a file.

    Raises:
        UsageError: the limit is so small that hardly a tensor keeps to it.
    """
    if limit < LEAST_SPLIT_BYTES:
        raise UsageError(f"Files of {limit:,} bytes are too small for a model; 1 MB is the least.")
    larger = [part for part, size in enumerate(plan.part_bytes) if size > limit]
    if not larger:
        return []
    first = next(tensor.info.name for tensor in plan.tensors if tensor.part == larger[0])
    return [
        f"{plan.type}: {len(larger)} of {len(plan.headers)} files are larger than {limit:,} bytes,"
        f" because a tensor is not divided ({first} is the first)."
    ]


def check_quantizable(plan: Plan, source: Source) -> None:
    """Refuse a source that is already quantized where the plan would change it again.

    Raises:
        InputError: a tensor is quantized and the plan gives it another type.
    """
    for tensor in plan.tensors:
        if tensor.type != tensor.info.type and tensor.info.type not in FLOAT_TYPES:
            raise InputError(
                f"{source.path} is already quantized ({tensor.info.name} is {tensor.info.type.name}).",
                "Quantize from the checkpoint or from a BF16, F16 or F32 file; --allow-requantize goes on"
                " with the loss added to the first one.",
            )


def check_importance(plan: Plan, importance: Importance | None) -> None:
    """Make sure that every tensor that needs an importance row has one, before any weight is read.

    Raises:
        InputError: there is no importance matrix, it lacks a tensor, or it is of another model.
    """
    for tensor in plan.tensors:
        rows = importance.rows(tensor.info) if importance is not None else None
        low_bits = plan.type == "Q2_K_S" and tensor.type == TensorType.Q2_K
        if rows is not None or tensor.type in FLOAT_TYPES or tensor.type == tensor.info.type:
            continue
        if requires_importance(tensor.type) or (low_bits and tensor.info.name.startswith("blk.")):
            if importance is None:
                raise InputError(
                    f"{plan.type} needs an importance matrix ({tensor.info.name} becomes {tensor.type.name}).",
                    "Make one with `localmix imatrix --corpus FILE`, then give it with --imatrix.",
                )
            raise InputError(
                f"{importance.path} says nothing about {tensor.info.name}, which {plan.type} needs.",
                "Make it again with `localmix imatrix` from this model.",
            )


def check_coverage(plan: Plan, importance: Importance) -> list[str]:
    """Compare the names of an importance matrix with those of the weights it could be for, before any is read.

    Returns:
        A sentence, when it leaves out some of the blocks' weights that are quantized.

    Raises:
        InputError: it says nothing about any weight of a block, so it is of another model.
    """
    weights = [tensor for tensor in plan.tensors if tensor.info.name.startswith("blk.") and len(tensor.info.shape) > 1]
    if weights and not any(tensor.info.name in importance.entries for tensor in weights):
        named = next(iter(sorted(importance.entries)), "nothing")
        raise InputError(
            f"{importance.path} is the importance matrix of another model: it names {named}, and no weight here.",
            "Make one for this model with `localmix imatrix`.",
        )
    quantized = [tensor.info.name for tensor in weights if tensor.type not in FLOAT_TYPES]
    missing = [name for name in quantized if name not in importance.entries]
    if not missing:
        return []
    return [
        f"The importance matrix {importance.path} covers {len(quantized) - len(missing)} of the {len(quantized)}"
        f" weights of blocks that are quantized; {missing[0]} is one that it leaves out."
    ]


def check_rules(plan: Plan, rules: Sequence[Rule]) -> list[str]:
    """Look for rules that do nothing.

    Returns:
        A sentence for each rule that changes none of the tensors it matches.

    Raises:
        UsageError: a rule matches no tensor.
    """
    notes = []
    for rule in rules:
        try:
            # near enough to ECMAScript's syntax; what Python reads otherwise, or not, is llama.cpp's to judge
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                pattern = re.compile(rule.tensor)
        except (re.error, FutureWarning):
            continue
        matched = [tensor for tensor in plan.tensors if pattern.search(tensor.info.name)]
        if not matched:
            raise UsageError(
                f"The rule {rule.tensor}={rule.type.name} matches no tensor of this model.",
                "Patterns are searched in names such as blk.0.attn_v.weight.",
            )
        if not any(rule.type in (tensor.type, tensor.meant) for tensor in matched):
            notes.append(
                f"{plan.type}: the rule {rule.tensor}={rule.type.name} changes nothing: the {len(matched)} tensors that"
                f" it matches, such as {matched[0].info.name}, are never quantized or another rule decides."
            )
    return notes
