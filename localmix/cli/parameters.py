"""Parameters that several commands share: models, types, and the options for JSON and Markdown."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from localmix.presets import Presets

    _Parameter = click.ParamType[str]
else:
    _Parameter = click.ParamType  # not generic at run time before click 8.4

Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


class FiniteRange(click.FloatRange):
    """A range of numbers; NaN, which no comparison refuses, and infinities are outside of it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


class ModelName(_Parameter):
    """A path or a library name; the shell completes both."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from localmix import library

        items = [CompletionItem(name, help=about) for name, about in library.complete(incomplete)]
        return items or [CompletionItem(incomplete, type="file")]


class TypeNames(_Parameter):
    """One or more quantization types or names of sets, with commas between; the shell completes the last one."""

    name = "type"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from localmix.presets import load_presets

        presets = load_presets()
        before, comma, last = incomplete.rpartition(",")
        choices = {name: preset.advice for name, preset in presets.presets.items()}
        choices |= {alias: f"the same as {name}" for alias, name in presets.aliases.items()}
        choices |= {name: ", ".join(types) for name, types in presets.sets.items()}
        return [
            CompletionItem(f"{before}{comma}{name}", help=about)
            for name, about in choices.items()
            if name.lower().startswith(last.lower())
        ]


class SetName(_Parameter):
    """The name of a set of types; the shell completes it."""

    name = "set"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from localmix.presets import load_presets

        return [
            CompletionItem(name, help=", ".join(types))
            for name, types in load_presets().sets.items()
            if name.startswith(incomplete)
        ]


class TypesOrModel(_Parameter):
    """For `plan`, which takes both in any order."""

    name = "model or type"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        types = TypeNames().shell_complete(ctx, param, incomplete) if incomplete else []
        return types + ModelName().shell_complete(ctx, param, incomplete)


MODEL = ModelName()
TYPES = TypeNames()
SET = SetName()

json_option = click.option("--json", is_flag=True, help="One JSON document on stdout, and no colour.")
markdown_option = click.option("--markdown", is_flag=True, help="The table as Markdown.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 512), help="Threads to use; the physical cores by default."
)
lora_option = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="DIR[=SCALE]",
    help="Merge a LoRA adapter, with SCALE so much of it; may be given several times.",
)
presets_option = click.option(
    "--presets", "presets_file", type=FILE, metavar="FILE", help="Take types and sets from this file instead."
)


def rope_options(function: Command) -> Command:
    """Options for longer contexts; the command gets one argument `rope`, a `RopeScaling` or None."""

    @click.option("--rope-scaling", type=click.Choice(["none", "linear", "yarn"]), help="How positions are stretched.")
    @click.option(
        "--rope-factor", type=FiniteRange(min=0, min_open=True), help="How many times longer the context gets."
    )
    @click.option("--rope-freq-base", type=FiniteRange(min=0, min_open=True), help="Base of the rotary frequencies.")
    @click.option(
        "--ntk-factor", type=FiniteRange(min=1), help="NTK-aware scaling: a base for a context so many times longer."
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        rope_scaling: str | None,
        rope_factor: float | None,
        rope_freq_base: float | None,
        ntk_factor: float | None,
        **others: Any,
    ) -> Any:
        from localmix.errors import UsageError
        from localmix.rope_scaling import RopeScaling

        if rope_scaling in ("linear", "yarn") and rope_factor is None:
            raise UsageError(f"--rope-scaling {rope_scaling} needs --rope-factor.")
        if rope_factor is not None and rope_scaling not in ("linear", "yarn"):
            raise UsageError("--rope-factor needs --rope-scaling linear or yarn.")
        rope = RopeScaling(rope_scaling, rope_factor, rope_freq_base, ntk_factor)
        return function(*args, rope=None if rope == RopeScaling() else rope, **others)

    return cast(Command, wrapped)


def examples(*lines: str) -> Callable[[Command], Command]:
    """A decorator that ends a command's help with examples; put it below `click.command`."""

    def add(function: Command) -> Command:
        # \b keeps click from wrapping the lines
        shown = "".join(f"\n      {line}" for line in lines)
        function.__doc__ = f"{function.__doc__ or ''}\n\n    \b\n    Examples:{shown}"
        return function

    return add


_UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """`20GiB`, `500MB` or `2799104B` in bytes; a bare K, M or G is decimal, as in llama.cpp's tools.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if not size:
        from localmix.errors import UsageError

        raise UsageError(f"{text!r} is no size.", "Write a number with B, MB, MiB, GB or GiB, such as 20GiB.")
    return size


def parse_types(spec: str, presets: Presets | None = None) -> list[str]:
    """`Q4_K,Q8_0` or `chinese-mixtral` as the presets' names, each once, in the order given.

    Raises:
        UsageError: a type or set is unknown.
    """
    if presets is None:
        from localmix.presets import load_presets

        presets = load_presets()
    names: dict[str, None] = {}
    for word in filter(None, (word.strip() for word in spec.split(","))):
        names |= dict.fromkeys(presets.sets[word] if word in presets.sets else (_type(word, presets),))
    if not names:
        from localmix.errors import UsageError

        raise UsageError("No type was named.", f"Known types: {', '.join(presets.presets)}.")
    return list(names)


def _type(word: str, presets: Presets) -> str:
    from localmix.errors import UsageError

    try:
        return presets.canonical(word)
    except UsageError as error:
        import difflib

        # here a set is as good as a type
        known = {name.upper(): name for name in (*presets.presets, *presets.aliases, *presets.sets)}
        near = [known[name] for name in difflib.get_close_matches(word.upper(), known, n=3, cutoff=0.6)]
        everything = f"Known types: {', '.join(presets.presets)}. Sets: {', '.join(presets.sets)}."
        raise UsageError(error.message, f"Did you mean {', '.join(near)}?" if near else everything) from error
