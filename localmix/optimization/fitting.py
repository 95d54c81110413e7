"""Fitting: the largest target with which a model still fits a machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localmix.capacity.memory import Available
from localmix.capacity.placement import weigh
from localmix.capacity.requirements import Requirements
from localmix.capacity.simulation import Setting
from localmix.errors import CapacityError
from localmix.optimization.target import Target
from localmix.plan import Planner
from localmix.presets import Preset
from localmix.sizes import size
from localmix.sources.base import Source

_LARGEST = "Q8_0"  # indistinguishable from the original: more is not taken even where there is room


@dataclass(frozen=True)
class Fitting:
    """A target for a machine.

    Attributes:
        target: rounded down to a hundredth of its unit, by which the output is called.
        beside: bytes that the model takes besides its weights.
        capped: there would be room for more than any quantization gains by.
    """

    target: Target
    room: Available
    setting: Setting
    beside: int
    capped: bool

    def describe(self) -> str:
        """A sentence on what the target leaves room for."""
        name, positions = self.target.name, self.setting.context
        if self.capped:
            return f"{name}, the size of Q8_0, fits with a context of {positions}; more gains hardly anything."
        return (
            f"{name} is the most that fits into {size(self.room.bytes)} ({self.room.limit}): beside the weights, a"
            f" context of {positions} and all else take {size(self.beside)}."
        )


def largest_target(source: Source, room: Available, setting: Setting) -> Fitting:
    """The most bytes that a model's file may have to fit a machine, with its KV cache and buffers.

    Args:
        setting: the context and the type of its cache.

    Raises:
        CapacityError: the context alone does not fit.
    """
    requirements = Requirements(source)
    requirements.simulate([setting])
    need = requirements.need(weigh(source.tensors), setting)
    beside = need.total - need.weights
    left = room.bytes - beside
    most = Planner(source).plan(Preset(_LARGEST, _LARGEST)).file_bytes
    unit, name = (2**30, "GiB") if min(left, most) >= 2**30 else (2**20, "MiB")
    # rounded up where that fits: nothing of the largest type is to be given away for a name
    capped = left >= -(-most * 100 // unit) * unit // 100
    hundredths = -(-most * 100 // unit) if capped else left * 100 // unit
    if hundredths <= 0:
        raise CapacityError(
            f"A context of {setting.context} leaves no room for weights in {size(room.bytes)} ({room.limit}): it and"
            f" all else take {size(beside)}.",
            "Give a shorter one with --ctx, or a smaller cache with --kv-type q8_0.",
        )
    told = f"{hundredths // 100}.{hundredths % 100:02d}"
    target = Target(f"{told}{name}", bytes=hundredths * unit // 100)
    target = replace(target, room=f"{room.bytes / 2**30:.1f} GiB ({room.limit}), a context of {setting.context} beside")
    return Fitting(target, room, setting, beside, capped)
