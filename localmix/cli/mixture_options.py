"""Options of `plan` and `quantize` for outputs whose types are chosen for a size."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from localmix.cli.parameters import FILE, Command

if TYPE_CHECKING:
    from localmix.capacity.memory import Available
    from localmix.cli.console import Console
    from localmix.optimization.choice import Rated
    from localmix.optimization.fitting import Fitting
    from localmix.optimization.optimizer import Request
    from localmix.optimization.target import Target
    from localmix.sources.base import Source

_HERE = "here"


def rated_document(rated: Rated | None) -> dict[str, Any] | None:
    """A preset by the measure that mixtures are chosen by, for JSON."""
    if rated is None:
        return None
    return {
        "type": rated.name,
        "bytes": rated.bytes,
        "bpw": rated.bits_per_weight,
        "expected_divergence": rated.damage,
        "seconds": rated.seconds,
    }


@dataclass(frozen=True)
class MixtureWish:
    """What the user says about sizes, and how mixtures are chosen.

    Attributes:
        targets: as given.
        fit: memory of a machine, `here` for this one, or None.
        fast: speed counts, too.
    """

    targets: tuple[Target, ...]
    fit: str | None
    request: Request
    fast: bool = False

    @property
    def is_given(self) -> bool:
        """Whether anything is to be chosen."""
        return bool(self.targets) or self.fit is not None

    def take_word(self, words: Sequence[str]) -> tuple[MixtureWish, tuple[str, ...]]:
        """The wish and the arguments, where `--fit` took the model for its own: `--fit tinymix` means this machine."""
        if self.fit in (None, _HERE) or re.match(r"\s*\d+(\.\d+)?\s*(G|GB|GiB)?\s*$", self.fit or ""):
            return self, tuple(words)
        return replace(self, fit=_HERE), (str(self.fit), *words)

    def timed(self, console: Console, threads: int | None) -> MixtureWish:
        """The wish with the speeds of the types on this machine where they count; the first time they are measured."""
        from localmix.measurement.type_speed import measure
        from localmix.tensor_types import ENCODABLE

        if not self.fast:
            return self
        with console.progress() as progress:
            found = measure(ENCODABLE, threads, progress=progress)
        if found.busy:
            console.warn(
                f"Other programs used {found.others:.0%} of the processor while the speeds of the types were measured,"
                " and these did not settle: another run may choose otherwise."
            )
        return replace(self, request=replace(self.request, seconds=found.seconds))

    @property
    def room(self) -> Available:
        """The memory to fit into.

        Raises:
            UsageError: it is no size.
        """
        from localmix.capacity import memory

        return memory.available() if self.fit == _HERE else memory.machine(memory.parse_gigabytes(str(self.fit)))

    def fitting(self, source: Source, context: int | None, kv_type: str) -> Fitting:
        """The largest target for the memory to fit into.

        Args:
            context: positions; None for 4096, less if the model was trained for less.

        Raises:
            UsageError, CapacityError: see `fitting.largest_target`.
        """
        from localmix.capacity import memory
        from localmix.capacity.simulation import Setting
        from localmix.optimization.fitting import largest_target

        context = context or min(memory.DEFAULT_CONTEXT, memory.trained_context(source))
        return largest_target(source, self.room, Setting(context, kv_type))


def mixture_options(function: Command) -> Command:
    """Options for chosen mixtures; the command gets one argument `wish`, a `MixtureWish`."""

    @click.option(
        "--target",
        "targets",
        multiple=True,
        metavar="SIZE|BPWbpw",
        help="Choose the type of each tensor for this size: 12GiB, 2799104B or 3.5bpw. May be given several times.",
    )
    @click.option(
        "--fit",
        is_flag=False,
        flag_value=_HERE,
        metavar="[RAM]",
        help="As --target, with the largest size that fits this machine, or one sold with so many GB.",
    )
    @click.option(
        "--sensitivity",
        type=FILE,
        metavar="FILE",
        help="What `localmix sensitivity` measured on this model; priors of other models by default.",
    )
    @click.option(
        "--min",
        "minima",
        multiple=True,
        metavar="PATTERN=TYPE",
        help="With --target: tensors whose name matches get no type of fewer bits; the first match decides.",
    )
    @click.option(
        "--types",
        "choice",
        metavar="fast|k|all|TYPE,…",
        help="With --target: types to choose from, all by default. fast: a mixture no slower here than K-quants;"
        " k: K-quants.",
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        targets: tuple[str, ...],
        fit: str | None,
        sensitivity: Path | None,
        minima: tuple[str, ...],
        choice: str | None,
        **others: Any,
    ) -> Any:
        from localmix.errors import UsageError
        from localmix.optimization.freedom import Terms
        from localmix.optimization.optimizer import Request
        from localmix.optimization.target import parse_target
        from localmix.quantize import parse_rule

        given = [("--sensitivity", sensitivity), ("--min", minima), ("--types", choice)]
        alone = [name for name, value in given if value]
        if alone and not targets and fit is None:
            raise UsageError(f"{alone[0]} is for a mixture that is chosen.", "Say how large with --target or --fit.")
        terms = Terms(types=_parse_types(choice), minima=tuple(parse_rule(minimum) for minimum in minima))
        request = Request(terms, sensitivity)
        wanted = dict.fromkeys(parse_target(target) for target in targets)
        wish = MixtureWish(tuple(wanted), fit, request, choice == "fast")
        return function(*args, wish=wish, **others)

    return cast(Command, wrapped)


def _parse_types(choice: str | None) -> tuple[Any, ...] | None:
    """`k` or `Q4_K,Q6_K` as tensor types; None for no choice among them.

    Raises:
        UsageError: a type does not exist.
    """
    from localmix.errors import UsageError
    from localmix.optimization.freedom import K_TYPES
    from localmix.presets import tensor_type

    if choice in (None, "all", "fast"):
        return None
    if choice == "k":
        return K_TYPES
    names = [name.strip() for name in str(choice).split(",") if name.strip()]
    hint = "Write fast, k, all, or types such as Q4_K,Q6_K."
    if not names:
        raise UsageError("--types names no type.", hint)
    try:
        return tuple(dict.fromkeys(tensor_type(name) for name in names))
    except UsageError as error:
        raise UsageError(error.message, error.hint or hint) from None
