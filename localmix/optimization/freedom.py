"""Freedom: which tensors of a model may get which types, before it is known what each would lose.

llama.cpp's planner says which tensors are quantized at all, and what falls back for want of columns. The user can fix
types of tensors, or set the least.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from localmix.errors import UsageError
from localmix.importance import Importance
from localmix.plan import Plan, Planner
from localmix.presets import Preset, Rule
from localmix.sources.base import Source, TensorInfo
from localmix.tensor_types import TensorType, bits

# For columns that are no multiple of 256, K-quants fall back to the last four.
K_TYPES = (
    TensorType.Q2_K,
    TensorType.Q3_K,
    TensorType.Q4_K,
    TensorType.Q5_K,
    TensorType.Q6_K,
    TensorType.Q8_0,
    TensorType.Q4_0,
    TensorType.Q4_1,
    TensorType.Q5_0,
    TensorType.Q5_1,
)
# All types of llama.cpp's general mixtures. Those for ternary, binary or MXFP4 weights are for models trained so.
TYPES = (
    TensorType.IQ1_S,
    TensorType.IQ1_M,
    TensorType.IQ2_XXS,
    TensorType.IQ2_XS,
    TensorType.IQ2_S,
    TensorType.IQ3_XXS,
    TensorType.IQ3_S,
    TensorType.IQ4_XS,
    TensorType.IQ4_NL,
    *K_TYPES,
)


@dataclass(frozen=True)
class Terms:
    """What is fixed before anything is chosen.

    Attributes:
        types: those to choose from; None for all, and to leave tensors as they are where the target has room for that.
        minima: tensors that match a pattern get no type of fewer bits than this one; the first match decides.
        rules: types that tensors have by name; they are not chosen.
        output, embedding: types of output.weight and token_embd.weight, likewise.
    """

    types: tuple[TensorType, ...] | None = None
    minima: tuple[Rule, ...] = ()
    rules: tuple[Rule, ...] = ()
    output: TensorType | None = None
    embedding: TensorType | None = None


class Freedom:
    """What is fixed for one source, and what is left to choose.

    Args:
        source: the model; its weights are not read.
        importance: the importance matrix, if it is at hand.
        has_imatrix: there will be one.
        split_bytes: as of `Planner.plan`.

    Attributes:
        quantizable: the tensors that llama.cpp quantizes.
        free: those of them whose type the user has not fixed.
        fixed: the types of all tensors that are not free.

    Raises:
        UsageError: a rule or a minimum is no regular expression, or a minimum matches no tensor.
        InputError: llama.cpp cannot quantize this model.
    """

    def __init__(
        self,
        source: Source,
        terms: Terms | None = None,
        *,
        importance: Importance | None = None,
        has_imatrix: bool = False,
        split_bytes: int | None = None,
    ) -> None:
        self.source = source
        self.terms = terms or Terms()
        self.has_imatrix = has_imatrix or importance is not None
        self._planner = Planner(source)
        self._importance = importance
        self._split_bytes = split_bytes
        changing, _ = self._compare(Terms())
        self.quantizable = [tensor for tensor in source.tensors if tensor.name in changing]
        free, types = self._compare(self.terms)
        self.free = [tensor for tensor in self.quantizable if tensor.name in free]
        self.fixed = {name: kind for name, kind in types.items() if name not in free}
        self._minima = self._find_minima()

    def plan(self, preset: Preset) -> Plan:
        """What becomes of a preset.

        Raises:
            InputError, UsageError: see `Planner.plan`.
        """
        return self._planner.plan(
            preset, has_imatrix=self.has_imatrix, importance=self._importance, split_bytes=self._split_bytes
        )

    def adapt(self, preset: Preset) -> Preset:
        """A preset with the types that the user fixed."""
        return _adapt(preset, self.terms)

    def _compare(self, terms: Terms) -> tuple[set[str], dict[str, TensorType]]:
        """Names of the tensors whose type depends on the mixture, as llama.cpp says, and the types under one."""
        plans = [self.plan(_adapt(Preset(base, base, pure=True), terms)) for base in ("Q8_0", "Q4_0")]
        one, other = ({tensor.info.name: tensor.type for tensor in plan.tensors} for plan in plans)
        return {name for name, kind in one.items() if other[name] != kind}, one

    def _find_minima(self) -> dict[str, TensorType]:
        minima: dict[str, TensorType] = {}
        for rule in self.terms.minima:
            matched = self._matches(rule)
            if not matched:
                raise UsageError(
                    f"The minimum {rule.tensor}={rule.type.name} matches no tensor of this model.",
                    "Patterns are searched in names such as blk.0.attn_v.weight.",
                )
            for name in matched:
                minima.setdefault(name, rule.type)
        return minima

    def _matches(self, rule: Rule) -> list[str]:
        try:
            pattern = re.compile(rule.tensor)
        except re.error as error:
            raise UsageError(f"{rule.tensor!r} is no regular expression: {error}.") from error
        return [tensor.name for tensor in self.source.tensors if pattern.search(tensor.name)]

    def notes(self) -> list[str]:
        """Sentences on minima that do nothing, because the tensors that they match are never quantized."""
        names = {tensor.name for tensor in self.free}
        notes = []
        for rule in self.terms.minima:
            matched = self._matches(rule)
            if not names.intersection(matched):
                notes.append(
                    f"The minimum {rule.tensor}={rule.type.name} changes nothing: {matched[0]} stays"
                    f" {self.fixed[matched[0]].name} in any case."
                )
        return notes

    @property
    def wanted_types(self) -> set[TensorType]:
        """The types whose errors have to be known: those to choose from, those of the presets, and the fixed ones."""
        fixed = {self.fixed[tensor.name] for tensor in self.quantizable if tensor.name in self.fixed}
        return {*TYPES, *(self.terms.types or ()), *fixed}

    def options(self, tensor: TensorInfo, errors: Mapping[TensorType, float]) -> list[TensorType]:
        """The types that a free tensor may get: of those to choose from, or of all where it can hold none of them.

        Args:
            errors: those of the types that the tensor can hold.
        """
        least = self._minima.get(tensor.name)
        own = (tensor.type,) if self.terms.types is None else ()
        for kinds in ((*(self.terms.types or TYPES), *own), (*TYPES, tensor.type)):
            known = [kind for kind in dict.fromkeys(kinds) if kind in errors or kind == tensor.type]
            held = [kind for kind in known if least is None or bits(kind) >= bits(least)]
            if held:
                return held
        return [tensor.type]


def _adapt(preset: Preset, terms: Terms) -> Preset:
    return replace(
        preset,
        rules=(*terms.rules, *preset.rules),
        output=terms.output or preset.output,
        embedding=terms.embedding or preset.embedding,
    )
