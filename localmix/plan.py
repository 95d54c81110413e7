"""Plan: the type, size and place of every tensor of an output, before any weight is read.

A plan costs milliseconds. Because each slice has its address before it is made, the stream can produce slices in
any order on all cores, and disk and memory are checked before the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from localmix.errors import InputError, UsageError
from localmix.gguf_format import encode_header, layout, tensor_bytes
from localmix.importance import Importance
from localmix.native.kernels import requires_importance
from localmix.native.mixture import choose_types, file_type
from localmix.presets import Preset, Rule
from localmix.sources.base import MetaValue, Source, TensorInfo, text, u32
from localmix.tensor_types import FLOAT_TYPES, TensorType

QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output.

    Attributes:
        info: name and shape, with the type it has in the source.
        type: the type it will have.
        offset: where its bytes start, counted from the start of the output file.
        bytes: how many there are.
        meant: the type the preset wanted when the columns fit no block of it, else None.
    """

    info: TensorInfo
    type: TensorType
    offset: int
    bytes: int
    meant: TensorType | None = None


@dataclass(frozen=True)
class Plan:
    """Everything about an output file but its weights."""

    type: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without metadata and padding."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + layout(output_info(tensor) for tensor in self.tensors)[1]

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

    @property
    def histogram(self) -> dict[str, int]:
        """How many tensors have each type."""
        return dict(Counter(tensor.type.name for tensor in self.tensors))


def output_info(tensor: PlannedTensor) -> TensorInfo:
    """The tensor as the output names it: with its new type."""
    return replace(tensor.info, type=tensor.type)


class Planner:
    """Plans outputs of one source; many types cost little more than one.

    Args:
        source: the model; its weights are not read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._skeleton = _skeleton(source)

    def plan(
        self,
        preset: Preset,
        *,
        rules: Sequence[Rule] = (),
        has_imatrix: bool = False,
        importance: Importance | None = None,
    ) -> Plan:
        """Decide the type of every tensor.

        Args:
            preset: from `presets.load_presets`.
            rules: go before the preset's own.
            has_imatrix: an importance matrix will be there; it changes some mixtures.
            importance: the importance matrix, if it is already at hand; its origin goes into the metadata.

        Raises:
            InputError: llama.cpp cannot quantize this model.
            UsageError: a rule is no regular expression or matches nothing.
        """
        mixture = choose_types(
            self._skeleton,
            preset.base,
            [(rule.tensor, rule.type) for rule in (*rules, *preset.rules)],
            output_type=preset.output,
            embedding_type=preset.embedding,
            pure=preset.pure,
            has_imatrix=has_imatrix or importance is not None,
        )
        infos = [replace(tensor, type=mixture.types[tensor.name]) for tensor in self._source.tensors]
        header = encode_header(self._metadata(preset, importance), infos)
        offsets, _ = layout(infos)
        tensors = tuple(
            PlannedTensor(
                tensor, info.type, len(header) + offset, tensor_bytes(info), mixture.fallbacks.get(info.name)
            )
            for tensor, info, offset in zip(self._source.tensors, infos, offsets, strict=True)
        )
        return Plan(preset.name, header, tensors)

    def _metadata(self, preset: Preset, importance: Importance | None) -> dict[str, MetaValue]:
        metadata = dict(self._source.metadata)
        metadata["general.quantization_version"] = u32(QUANTIZATION_VERSION)
        metadata["general.file_type"] = u32(file_type(preset.base))
        if importance is not None:
            metadata["quantize.imatrix.file"] = text(importance.path.name)
            if importance.datasets:
                metadata["quantize.imatrix.dataset"] = text(importance.datasets[0])
            metadata["quantize.imatrix.entries_count"] = u32(len(importance.entries))
            metadata["quantize.imatrix.chunks_count"] = u32(importance.chunk_count)
        return metadata


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


def check_quantizable(plan: Plan, source: Source, allow_requantize: bool = False) -> None:
    """Refuse a source that is already quantized where the plan would change it again.

    Raises:
        InputError: a tensor is quantized and the plan gives it another type.
    """
    for tensor in plan.tensors:
        if tensor.type == tensor.info.type or tensor.info.type in FLOAT_TYPES:
            continue
        if not allow_requantize:
            raise InputError(
                f"{source.path} is already quantized ({tensor.info.name} is {tensor.info.type.name}).",
                "Quantize from the checkpoint or from a BF16, F16 or F32 file: a second loss adds to the first.",
            )
        raise UsageError(f"{source.path}: tensors of type {tensor.info.type.name} cannot be widened yet.")


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
