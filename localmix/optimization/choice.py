"""Choice: the type of each tensor with which a model of a given size diverges least from the original.

Damage adds up over tensors: what one does is told by the relative error of its type and how sensitive the model is to
it. A knapsack over (damage, bytes) gives each a type. By this measure no preset of at most the same size is better: the
best of them is where the search begins a second time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from localmix.errors import CapacityError, InputError, LocalmixError, UsageError
from localmix.gguf_format import padded, tensor_bytes
from localmix.optimization.freedom import K_TYPES, Freedom, Terms
from localmix.optimization.knapsack import Choice, Losses, Sizes, solve
from localmix.optimization.recipe import fold_rules
from localmix.optimization.sampled_error import Errors, can_hold
from localmix.optimization.target import Target
from localmix.plan import COPY, Plan
from localmix.presets import Preset, Presets, Recipe
from localmix.sources.base import TensorInfo
from localmix.tensor_types import FLOAT_TYPES, TensorType

# An output that stays this much below its target is worth a word.
WORTH_A_WORD = 0.005

_PASSES = 8  # of the search for a size: each knows better how long the head of the file gets
_SPEED_STEPS = 20  # halvings of the range in which the price of a second is looked for
_DECADES = 8.0  # and that range


class Sensitivity(Protocol):
    """What `optimization.sensitivities` knows of a model."""

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""

    def damage(self, tensor_name: str, relative_error: float) -> float:
        """Nats of divergence that an error of one tensor does."""


@dataclass(frozen=True)
class Rated:
    """A preset by our measure.

    Attributes:
        damage: expected divergence from the original, in nats a token.
        bytes: of the output.
        seconds: of a token in generation on this machine; None where speeds were not asked for.
    """

    name: str
    damage: float
    bytes: int
    bits_per_weight: float
    seconds: float | None = None


@dataclass(frozen=True)
class Chosen:
    """A mixture for one target.

    Attributes:
        preset: what `Planner.plan` takes: a recipe, unless one of the presets is the best there is.
        plan: what becomes of it.
        rated: the mixture by its own measure.
        best_preset: the best preset of at most the target's size; None if none is so small.
        notes: sentences on what is unusual.
    """

    target: Target
    preset: Preset
    plan: Plan
    rated: Rated
    best_preset: Rated | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """A preset of this model; its plan is not kept, whose head can have megabytes."""

    preset: Preset
    types: Mapping[str, TensorType]
    rated: Rated
    file_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class _Found:
    """Options of the free tensors, and what becomes of them.

    Attributes:
        free: bytes of the free tensors.
        counted: bytes of the output, as the target counts them.
    """

    options: Choice
    types: Mapping[str, TensorType]
    preset: Preset
    plan: Plan
    free: int
    counted: int


class Chooser:
    """Chooses mixtures of one model; many targets cost little more than one.

    Args:
        freedom: what is left to choose.
        presets: to compare with, and to begin with.
        errors: relative errors of `freedom.quantizable`, for `freedom.wanted_types`.
        sensitivities: of the model's tensors.
        seconds: of one weight in generation, by type, of those that are chosen from. Then no mixture is slower than the
            best K-quant preset of at most its size. Without them only the size counts.

    Attributes:
        rated: the presets that this model can have, from the largest on.
    """

    def __init__(
        self,
        freedom: Freedom,
        presets: Presets,
        errors: Errors,
        sensitivities: Sensitivity,
        seconds: Mapping[TensorType, float] | None = None,
    ) -> None:
        self._freedom = freedom
        self._speeds = seconds
        self._errors = errors
        self._sensitivities = sensitivities
        self._options = [freedom.options(tensor, errors[tensor.name]) for tensor in freedom.free]
        most = max(map(len, self._options), default=0)
        # an option that a tensor does not have loses everything
        self._losses: Losses = np.full((len(self._options), most), np.inf)
        self._seconds: Losses = np.zeros_like(self._losses)
        for row, (tensor, kinds) in enumerate(zip(freedom.free, self._options, strict=True)):
            for column, kind in enumerate(kinds):
                self._losses[row, column] = self._damage(tensor, kind)
                self._seconds[row, column] = self._time(tensor, kind)
        self._candidates = [
            found for preset in presets.presets.values() if (found := self._candidate(preset)) is not None
        ]
        self._candidates.sort(key=lambda candidate: -candidate.rated.bytes)
        self.rated = [candidate.rated for candidate in self._candidates]

    def _damage(self, tensor: TensorInfo, kind: TensorType) -> float:
        # a plain type whose error was not asked for is the user's own wish
        error = 0.0 if kind == tensor.type else self._errors[tensor.name].get(kind, 0.0)
        return self._sensitivities.damage(tensor.name, error)

    def _time(self, tensor: TensorInfo, kind: TensorType) -> float:
        """Seconds that a tensor takes of a token in generation."""
        source = self._freedom.source
        if self._speeds is None:
            return 0.0
        tied = not any(other.name == "output.weight" for other in source.tensors)
        if tensor.name.startswith("token_embd") and not tied:
            return 0.0  # one row is looked up
        share = 1.0
        if len(tensor.shape) == 3:
            share = source.number("{arch}.expert_used_count", tensor.shape[0]) / tensor.shape[0]
        return tensor.elements * share * self._speeds.get(kind, 0.0)

    def _candidate(self, preset: Preset) -> _Candidate | None:
        """A general preset as it would be for this model; None where it cannot be had, or not be rated."""
        freedom = self._freedom
        plain = preset.base == COPY or preset.base in (kind.name for kind in FLOAT_TYPES)
        if plain or preset.recipe is not None or (preset.imatrix == "required" and not freedom.has_imatrix):
            return None
        adapted = freedom.adapt(preset)
        try:
            plan = freedom.plan(adapted)
        except InputError:  # columns for which llama.cpp knows no other type
            return None
        types = {tensor.info.name: tensor.type for tensor in plan.tensors}
        for tensor in freedom.free:
            if types[tensor.name] not in (*self._errors[tensor.name], tensor.type):
                return None
        return _Candidate(adapted, types, self._rate(plan, types), plan.file_bytes, plan.weight_bytes)

    def _rate(self, plan: Plan, types: Mapping[str, TensorType]) -> Rated:
        tensors = self._freedom.quantizable
        return Rated(
            plan.type,
            sum(self._damage(tensor, types[tensor.name]) for tensor in tensors),
            plan.file_bytes,
            plan.bits_per_weight,
            sum(self._time(tensor, types[tensor.name]) for tensor in tensors) if self._speeds is not None else None,
        )

    def choose(self, target: Target) -> Chosen:
        """The mixture that loses least within a target.

        Raises:
            UsageError: the target is below the smallest mixture, or above the model as it is.
            InputError: nothing of the model can be quantized.
            CapacityError: the machine that it is for is too small for the smallest mixture.
        """
        freedom = self._freedom
        if not freedom.quantizable:
            raise InputError("llama.cpp quantizes no tensor of this model: none has columns that fit a type's blocks.")
        if not freedom.free:
            raise UsageError("There is nothing to choose: no tensor of this model is left whose type is not fixed.")
        limit = target.limit(freedom.source.parameters)
        whole = target.measure(freedom.plan(Preset(COPY, COPY)))
        if limit > whole:
            told = target.describe(whole, freedom.source.parameters)
            raise UsageError(
                f"The target {target.name} is more than the model has as it is: {told}.",
                "Name a smaller one; nothing is gained by more.",
            )
        rivals, seconds = self._rivals(target, limit)
        best = min(rivals, key=lambda rival: rival.rated.damage, default=None)
        base = best or (self._candidates[-1] if self._candidates else None)
        name = base.preset.base if base is not None else "Q8_0"
        sizes = self._sizes(target)
        notes: list[str] = []
        found = self._make(target, name, sizes, _smallest(sizes, self._losses))
        if found.counted > limit and best is None:
            raise self._too_small(target, found)
        beside = found.counted - found.free  # known better with each pass: the head tells the types
        for _ in range(_PASSES):
            options = self._solve(sizes, limit - beside, best, seconds)
            if options is None:
                break
            tried = self._make(target, name, sizes, options)
            if tried.counted <= limit:
                found = tried
                break
            beside = tried.counted - tried.free
        rated = self._rate(found.plan, found.types)
        is_slower = (rated.seconds or 0.0) > seconds * (1 + 1e-9)  # more than another order of adding makes
        if best is not None and (found.counted > limit or is_slower or rated.damage > best.rated.damage):
            preset = replace(best.preset, name=target.name)
            plan = freedom.plan(preset)
            notes.append(f"{target.name}: nothing better was found than {best.rated.name} as it is.")
            rated = replace(best.rated, name=target.name)
        else:
            preset, plan = found.preset, found.plan
        counted = target.measure(plan)
        if counted < limit * (1 - WORTH_A_WORD):
            all_best = bool((_taken(self._losses, found.options) <= self._losses.min(axis=1)).all())
            reason = "every tensor has the best of its types" if all_best else "no better type fits what is left"
            notes.append(f"{target.name}: the output stays {100 * (1 - counted / limit):.1f} % below: {reason}.")
        return Chosen(target, preset, plan, rated, best.rated if best is not None else None, tuple(notes))

    def _rivals(self, target: Target, limit: int) -> tuple[list[_Candidate], float]:
        """The presets of at most a size with types that may be chosen, and the seconds that a token may take."""
        within = [
            found
            for found in self._candidates
            if target.measure(found) <= limit and self._options_of(found) is not None
        ]
        if self._speeds is None:
            return within, math.inf
        names = {tensor.name: tensor.type for tensor in self._freedom.free}
        usual = [found for found in within if all(found.types[name] in (*K_TYPES, own) for name, own in names.items())]
        if not usual:
            return within, math.inf
        seconds = min(usual, key=lambda found: found.rated.damage).rated.seconds or 0.0
        return [found for found in within if (found.rated.seconds or 0.0) <= seconds], seconds

    def _sizes(self, target: Target) -> Sizes:
        """Bytes of every option of the free tensors, as the target counts them."""
        sizes: Sizes = np.zeros(self._losses.shape, np.int64)
        for row, (tensor, kinds) in enumerate(zip(self._freedom.free, self._options, strict=True)):
            for column, kind in enumerate(kinds):
                size = tensor_bytes(replace(tensor, type=kind))
                sizes[row, column] = size if target.bytes is None else padded(size)
        return sizes

    def _make(self, target: Target, base: str, sizes: Sizes, options: Choice) -> _Found:
        """What becomes of options."""
        freedom = self._freedom
        chosen = {
            tensor.name: kinds[option]
            for tensor, kinds, option in zip(freedom.free, self._options, options, strict=True)
        }
        all_types = {**freedom.fixed, **chosen}
        types = {tensor.name: all_types[tensor.name] for tensor in freedom.quantizable}
        rules = fold_rules(types)
        patterns = [re.compile(rule.tensor) for rule in rules]
        named = sum(any(pattern.search(tensor.name) for pattern in patterns) for tensor in freedom.source.tensors)
        infos = {tensor.name: tensor for tensor in freedom.quantizable}
        imatrix = "recommended" if freedom.has_imatrix else "optional"
        if not all(can_hold(infos[tensor], kind, has_importance=False) for tensor, kind in types.items()):
            imatrix = "required"
        origin = self._sensitivities.origin
        preset = Preset(
            target.name,
            base,
            imatrix,
            f"The best mixture of {target.name} for {freedom.source.get('general.name', 'one model')}.",
            rules,
            recipe=Recipe(target.name, origin, named),
        )
        plan = freedom.plan(preset)
        free = int(sizes[np.arange(len(options)), options].sum())
        return _Found(options, types, preset, plan, free, target.measure(plan))

    def _solve(self, sizes: Sizes, room: int, best: _Candidate | None, seconds: float) -> Choice | None:
        """Options of the free tensors for so many bytes, and so many seconds of a token."""
        rows, losses = np.arange(len(sizes)), self._losses
        start = self._options_of(best) if best is not None else None
        # too large by no more than the recipe takes in the head
        if start is not None and int(sizes[rows, start].sum()) > room:
            start = None
        if seconds == math.inf or not self._seconds.any():
            return _solve_twice(sizes, losses, room, start)
        fixed = [tensor for tensor in self._freedom.quantizable if tensor.name in self._freedom.fixed]
        allowed = seconds - sum(self._time(tensor, self._freedom.fixed[tensor.name]) for tensor in fixed)
        least = start
        # A price of a second in nats: none first, then the lowest that keeps to the time.
        scale = float(losses[np.isfinite(losses)].max() / self._seconds.max())
        low, high = -_DECADES, _DECADES
        for step in range(_SPEED_STEPS):
            middle = (low + high) / 2
            price = 0.0 if step == 0 else scale * 10.0**middle
            found = _solve_twice(sizes, losses + price * self._seconds, room, start)
            if found is None:
                return least
            keeps = float(self._seconds[rows, found].sum()) <= allowed
            if keeps and (least is None or _taken(losses, found).sum() < _taken(losses, least).sum()):
                least = found
            if keeps and step == 0:
                break
            if step:
                low, high = (low, middle) if keeps else (middle, high)
        return least

    def _options_of(self, candidate: _Candidate) -> Choice | None:
        """A preset as options of the free tensors; None where one of its types is not to be chosen."""
        options: Choice = np.zeros(len(self._options), np.intp)
        for row, (tensor, kinds) in enumerate(zip(self._freedom.free, self._options, strict=True)):
            if candidate.types[tensor.name] not in kinds:
                return None
            options[row] = kinds.index(candidate.types[tensor.name])
        return options

    def _too_small(self, target: Target, smallest: _Found) -> LocalmixError:
        told = target.describe(smallest.counted, self._freedom.source.parameters)
        more = "With an importance matrix (--imatrix) there are smaller types; `localmix imatrix` makes one."
        if target.room:
            hint = "A shorter --ctx or a smaller --kv-type leaves more."
            return CapacityError(
                f"No mixture of this model fits into {target.room}: the smallest has {told},"
                f" and {target.name} are left.",
                hint if self._freedom.has_imatrix else f"{hint} {more}",
            )
        if self._freedom.terms != Terms():
            hint = "Allow smaller types."
        elif not self._freedom.has_imatrix:
            hint = more
        else:
            hint = "Name a larger one."
        return UsageError(
            f"The target {target.name} is too small for this model: the smallest mixture has {told}.", hint
        )


def _taken(losses: Losses, options: Choice) -> Losses:
    """What each item loses."""
    taken: Losses = losses[np.arange(len(options)), options]
    return taken


def _smallest(sizes: Sizes, losses: Losses) -> Choice:
    """The smallest option of each item."""
    options: Choice = np.where(np.isfinite(losses), sizes, np.iinfo(np.int64).max).argmin(axis=1)
    return options


def _solve_twice(sizes: Sizes, losses: Losses, room: int, start: Choice | None) -> Choice | None:
    """The better of two searches: from nothing, and from a preset."""
    found = [solve(sizes, losses, room), *([solve(sizes, losses, room, start)] if start is not None else [])]
    solved = [options for options in found if options is not None]
    return min(solved, key=lambda options: float(_taken(losses, options).sum()), default=None)
