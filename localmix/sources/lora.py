"""LoRA adapters laid over the tensors of a checkpoint: merged while they are read, never on disk.

Every tensor of an adapter must find its place in the checkpoint. What lies above, a converter or a quantizer, reads
merged tensors as it reads stored ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from localmix.errors import InputError, UsageError
from localmix.sources.adapter import CONFIG, EMBEDDING, HEAD, Adapter, AdapterModule, is_embedding
from localmix.sources.documents import listed, shown
from localmix.sources.low_rank import BiasChange, ExpertPart, Factors, LowRankChange, MergedTensor, ReplacedRows
from localmix.sources.safetensors import WEIGHT_DTYPES, StoredTensor

# What a module may have beside its two factors.
_BESIDES = ("magnitude", "bias", "tokens")

# Experts of a mixture as transformers 5 and later stacks them, and the names in checkpoints: gate, up, down.
_EXPERTS = re.compile(r"(?P<block>.+)\.(?P<name>mlp|block_sparse_moe)\.experts(\.base_layer)*")
_EXPERT_NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))


def _same_name(name: str) -> str:
    return name


class _Overlay:
    """The changes of all adapters, collected by the tensor of the checkpoint that they are for."""

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.stored = stored
        self.changes: dict[str, list[LowRankChange | BiasChange]] = {}
        self.whole: dict[str, StoredTensor] = {}
        self.rows: dict[str, ReplacedRows] = {}
        self.adapters: dict[str, list[Adapter]] = {}

    def origin(self, name: str) -> StoredTensor | None:
        """What is read before anything is added."""
        return self.whole.get(name) or self.stored.get(name)

    def find(self, name: str) -> str:
        """The checkpoint's name of a tensor; transformers 5 has another one for the mixture of Mixtral."""
        older = name.replace(".mlp.", ".block_sparse_moe.")
        return older if name not in self.stored and older in self.stored else name

    def add(self, name: str, change: LowRankChange | BiasChange, adapter: Adapter) -> None:
        """Note a change."""
        self.changes.setdefault(name, []).append(change)
        self.touch(name, adapter)

    def touch(self, name: str, adapter: Adapter) -> None:
        """Note whose a change is; what is held whole cannot be added to what others change."""
        others = self.adapters.setdefault(name, [])
        if adapter not in others:
            others.append(adapter)
        if (name in self.whole or name in self.rows) and len(others) > 1:
            folders = " and ".join(str(other.path) for other in others)
            raise InputError(
                f"{folders} both change {shown(name)}, and one of them holds it whole.", "Merge one of them."
            )

    def tensors(self) -> dict[str, StoredTensor]:
        """The checkpoint's tensors, those that adapters change being merged while they are read."""
        found = dict(self.stored)
        for name, adapters in self.adapters.items():
            origin = self.origin(name)
            assert origin is not None
            base = self.stored.get(name)
            # an output that the checkpoint shares with its embedding is stored as that is
            model = base or next(tensor for other, tensor in self.stored.items() if is_embedding(other))
            found[name] = MergedTensor(
                name=base.name if base is not None else name,
                dtype=model.dtype,
                shape=origin.shape,
                file=origin.file,
                offset=origin.offset,
                origin=origin,
                changes=tuple(self.changes.get(name, ())),
                rows=self.rows.get(name),
                adapters=tuple(adapter.path for adapter in adapters),
            )
        return found


def lay_over(
    path: Path,
    stored: Mapping[str, StoredTensor],
    adapters: Sequence[Adapter],
    rename: Callable[[str], str] = _same_name,
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with adapters laid over them; nothing is read yet.

    With several adapters each one's change is that of the checkpoint's own weights, and the changes are added up.

    Args:
        path: the checkpoint, for messages.
        stored: its tensors by name.
        adapters: what `open_adapter` opened.
        rename: applied to the adapters' names, as it was to those of `stored`.

    Returns:
        All tensors by name. The changed ones keep the dtype that the checkpoint has; a vocabulary may have another
        size. An output that the checkpoint shares with its embedding may be there besides.

    Raises:
        InputError: a tensor of an adapter belongs nowhere, or is of another shape than the weight it changes.
    """
    overlay = _Overlay(path, stored)
    for adapter in adapters:
        _place_whole(overlay, adapter, rename)
        for module in adapter.modules.values():
            _place(overlay, adapter, module, rename)
    tensors = overlay.tensors()
    _check_vocabulary(overlay, tensors)
    return tensors


def _place_whole(overlay: _Overlay, adapter: Adapter, rename: Callable[[str], str]) -> None:
    """Put the tensors that the adapter holds whole in the place of the checkpoint's."""
    homeless: list[str] = []
    for own_name, tensor in adapter.whole.items():
        name = rename(own_name)
        base = overlay.stored.get(name)
        if base is None:
            if name != HEAD or not any(map(is_embedding, overlay.stored)):
                homeless.append(tensor.name)
                continue
        elif (
            not tensor.shape
            or base.shape[1:] != tensor.shape[1:]
            or (base.shape != tensor.shape and not _has_vocabulary_rows(name))
        ):
            raise _other_base(overlay, adapter, tensor.name, f"has the shape {list(tensor.shape)}", name, base)
        if adapter.scale != 1:
            raise UsageError(
                f"{adapter.path} holds {shown(name)} whole, so it cannot be weighed with {adapter.scale:g}.",
                "Give it without a scale.",
            )
        overlay.whole[name] = tensor
        overlay.touch(name, adapter)
    if homeless:
        raise InputError(
            f"{adapter.path}: {len(homeless)} tensors belong nowhere in {overlay.path}: {listed(homeless, 3)}.",
            adapter.origin,
        )


def _has_vocabulary_rows(name: str) -> bool:
    """Whether a tensor of this name has a row for each token of the vocabulary: the embedding or the output."""
    return is_embedding(name) or f".{name}".endswith(f".{HEAD}")


def _place(overlay: _Overlay, adapter: Adapter, module: AdapterModule, rename: Callable[[str], str]) -> None:
    """Put the changes of one module where they belong."""
    roles = module.roles
    if "tokens" in roles:
        _place_rows(overlay, adapter, module, rename)
        if len(roles) == 1:
            return
    first, second = ("embedding A", "embedding B") if "embedding A" in roles else ("A", "B")
    leftovers = [tensor.name for role, tensor in roles.items() if role not in (first, second, *_BESIDES)]
    if first not in roles or second not in roles or leftovers:
        names = listed(leftovers or (tensor.name for tensor in roles.values()))
        raise InputError(f"{adapter.path} holds {names}, but not the other tensors of that module.")
    a, b = roles[first], roles[second]
    if min(len(a.shape), len(b.shape)) < 2 or 0 in (*a.shape, *b.shape):
        raise InputError(
            f"{adapter.path}: {shown(a.name)} and {shown(b.name)} are no matrices.", "Save the adapter again, gathered."
        )
    name = overlay.find(rename(f"{module.name}.weight"))
    if overlay.origin(name) is None:
        _place_experts(overlay, adapter, module, a, b, rename)
        return
    _require_floats(overlay, adapter, name)
    _place_product(overlay, adapter, module, name, a, b)
    if "bias" in roles:
        _place_bias(overlay, adapter, module, rename(f"{module.name}.bias"), a.shape[0])


def _place_product(
    overlay: _Overlay, adapter: Adapter, module: AdapterModule, name: str, a: StoredTensor, b: StoredTensor
) -> None:
    """Add the product of two factors to one tensor of the checkpoint."""
    base, magnitude = overlay.origin(name), module.roles.get("magnitude")
    assert base is not None
    (rank, inner), (outer, inner_rank) = _matrix_shape(a.shape), _matrix_shape(b.shape)
    own = _matrix_shape(base.shape)
    transposed = "embedding A" in module.roles or (adapter.transposed and own == (inner, outer))
    wanted = (inner, outer) if transposed else (outer, inner)
    if rank != inner_rank or own != wanted:
        raise _other_base(overlay, adapter, a.name, f"is for a weight of {list(wanted)}", name, base)
    if (magnitude is not None) != adapter.uses_magnitudes:
        has = "has no lora_magnitude_vector" if magnitude is None else "has a lora_magnitude_vector"
        raise InputError(
            f"{adapter.path}: {shown(module.name)} {has}, but {CONFIG} says use_dora: {adapter.uses_magnitudes}."
        )
    if magnitude is not None and math.prod(magnitude.shape) != outer:
        raise InputError(
            f"{adapter.path}: {shown(magnitude.name)} has {math.prod(magnitude.shape)} values for {outer} rows.",
            adapter.origin,
        )
    change = LowRankChange(
        Factors(a, b, transposed=transposed),
        adapter.scaling(module.name, rank),
        adapter.scale,
        adapter.load,
        magnitude,
        of_columns=transposed,
        weights=base,
    )
    overlay.add(name, change, adapter)


def _place_bias(overlay: _Overlay, adapter: Adapter, module: AdapterModule, name: str, rank: int) -> None:
    """Add the bias of a second factor to the bias of the layer."""
    bias, base = module.roles["bias"], overlay.origin(name)
    if base is None or base.shape != bias.shape:
        raise _other_base(overlay, adapter, bias.name, f"has the shape {list(bias.shape)}", name, base)
    overlay.add(name, BiasChange(bias, adapter.scaling(module.name, rank) * adapter.scale), adapter)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns, a convolution's further dimensions being columns; a vector is no matrix of any shape."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)


def _place_rows(overlay: _Overlay, adapter: Adapter, module: AdapterModule, rename: Callable[[str], str]) -> None:
    """Put the embeddings of chosen tokens in the place of the checkpoint's."""
    values = module.roles["tokens"]
    name = rename(f"{module.name}.weight")
    base = overlay.origin(name)
    if base is None or base.shape[1:] != values.shape[1:]:
        raise _other_base(overlay, adapter, values.name, f"has the shape {list(values.shape)}", name, base)
    indices = adapter.token_indices(module.name, values.shape[0])
    if max(indices, default=0) >= base.shape[0]:
        raise _other_base(overlay, adapter, values.name, f"is for token {max(indices)}", name, base)
    if adapter.scale != 1:
        raise UsageError(
            f"{adapter.path} holds rows of {shown(name)} whole, so it cannot be weighed with {adapter.scale:g}.",
            "Give it without a scale.",
        )
    overlay.rows[name] = ReplacedRows(indices, values)
    overlay.touch(name, adapter)


def _place_experts(
    overlay: _Overlay,
    adapter: Adapter,
    module: AdapterModule,
    a: StoredTensor,
    b: StoredTensor,
    rename: Callable[[str], str],
) -> None:
    """Deal factors that are stacked over the experts of a layer out to the experts' own tensors."""
    found = _EXPERTS.fullmatch(module.name)
    layout = _expert_layout(overlay.stored, found, rename) if found and module.roles.keys() == {"A", "B"} else None
    if layout is None:
        raise InputError(
            f"{adapter.path}: {shown(a.name)} belongs to no weight of {overlay.path}"
            f" (there is no {shown(rename(f'{module.name}.weight'))}).",
            adapter.origin,
        )
    gates, ups, downs = layout
    count = len(gates)
    _require_floats(overlay, adapter, gates[0])
    gate, down = overlay.stored[gates[0]].shape, overlay.stored[downs[0]].shape
    (stacked, inner), (outer, inner_rank) = _matrix_shape(a.shape), _matrix_shape(b.shape)
    rows, hidden = gate
    if stacked == inner_rank and stacked % count == 0 and (outer, inner) == (2 * rows, hidden):
        parts = [(gates, 0, rows), (ups, rows, 2 * rows)]
    elif stacked == inner_rank and stacked % count == 0 and (outer, inner) == down:
        parts = [(downs, 0, outer)]
    else:
        made = f"is for {count} experts' weights of {[outer, inner]}"
        raise _other_base(overlay, adapter, a.name, made, gates[0], overlay.stored[gates[0]])
    parameter = _parameter(module.name, "down_proj" if len(parts) == 1 else "gate_up_proj")
    scale = adapter.scaling(parameter, stacked // count)
    for names, start, stop in parts:
        for expert, name in enumerate(names):
            factors = Factors(a, b, expert=ExpertPart(expert, count, start, stop))
            change = LowRankChange(factors, scale, adapter.scale, adapter.load)
            overlay.add(name, change, adapter)


def _parameter(module: str, name: str) -> str:
    """The name of a stacked parameter, to which PEFT's patterns of ranks refer."""
    return f"{module.replace('.base_layer', '')}.{name}"


def _expert_layout(
    stored: Mapping[str, StoredTensor], found: re.Match[str], rename: Callable[[str], str]
) -> tuple[list[str], list[str], list[str]] | None:
    """Names of all experts' gate, up and down matrices of one layer; None where the checkpoint has none."""
    for block in (found["name"], "block_sparse_moe", "mlp"):
        prefix = rename(f"{found['block']}.{block}.experts.")
        for leaves in _EXPERT_NAMES:
            columns: list[list[str]] = [[], [], []]
            while all(f"{prefix}{len(columns[0])}.{leaf}.weight" in stored for leaf in leaves):
                number = len(columns[0])
                for column, leaf in zip(columns, leaves, strict=True):
                    column.append(f"{prefix}{number}.{leaf}.weight")
            if columns[0]:
                return columns[0], columns[1], columns[2]
    return None


def _require_floats(overlay: _Overlay, adapter: Adapter, name: str) -> None:
    base = overlay.stored.get(name)
    if base is not None and base.dtype not in WEIGHT_DTYPES:
        raise InputError(
            f"{overlay.path}: {shown(base.name)} is {base.dtype}, into which {adapter.path} cannot be merged.",
            "Take the checkpoint in bf16, f16 or f32.",
        )


def _other_base(
    overlay: _Overlay, adapter: Adapter, own_name: str, made: str, name: str, base: StoredTensor | None
) -> InputError:
    has = f"{shown(name)} has the shape {list(base.shape)}" if base is not None else f"there is no {shown(name)}"
    return InputError(
        f"{adapter.path} is no adapter of {overlay.path}: {shown(own_name)} {made}, and {has}.", adapter.origin
    )


def _check_vocabulary(overlay: _Overlay, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse an adapter that holds only one of embedding and output in another size."""
    named = {ending: name for name in tensors for ending in (EMBEDDING, HEAD) if f".{name}".endswith(f".{ending}")}
    if len(named) < 2 or not set(named.values()) & overlay.whole.keys():
        return
    rows = {ending: tensors[name].shape[0] for ending, name in named.items()}
    if rows[EMBEDDING] != rows[HEAD]:
        folder = next(overlay.adapters[name][0].path for name in named.values() if name in overlay.whole)
        raise InputError(
            f"{folder} gives the model {rows[EMBEDDING]} embeddings but {rows[HEAD]} outputs.",
            "An adapter of a larger vocabulary must hold both (modules_to_save).",
        )


def describe(adapters: Iterable[Adapter], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Sentences on what each adapter changes."""
    notes = []
    for adapter in adapters:
        merged = [tensor for tensor in tensors.values() if isinstance(tensor, MergedTensor)]
        count = sum(adapter.path in tensor.adapters for tensor in merged)
        weighed = "" if adapter.scale == 1 else f" with the scale {adapter.scale:g}"
        notes.append(f"{adapter.path} is merged into {count} tensors{weighed}.")
    return notes
