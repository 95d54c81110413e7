"""What can be set about replies: a row each, for the options of `localmix chat` and for `/set`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import click

from localmix.cli.parameters import Command, FiniteRange

if TYPE_CHECKING:
    from localmix.sampling import Sampling

    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # not generic at run time before click 8.4

LIMIT = "limit"  # the one that is no field of `Sampling`


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: what the user types, after `--` or `/set`.
        field: of `Sampling`, or `LIMIT`.
        none: the word for None, where the setting may be left to chance or to the context.
    """

    name: str
    field: str
    type: _Type
    about: str
    none: str = ""

    def parse(self, text: str) -> Any:
        """The value that a text means.

        Raises:
            UsageError: it means none.
        """
        from localmix.errors import UsageError

        if self.none and text.lower() in (self.none, "none"):
            return None
        try:
            return self.type.convert(text, None, None)
        except click.BadParameter as error:
            hint = error.message if "<" in error.message or ">" in error.message else self.about
            raise UsageError(f"{text!r} is no value for {self.name}.", hint) from error

    def accepts(self, value: object) -> bool:
        """Whether a value from a file is one that the user could have set."""
        from localmix.errors import UsageError

        try:
            return bool(self.parse(str(value).lower()) == value)
        except UsageError:
            return False


_WHOLE = click.IntRange(0, 2**31 - 1)

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("temperature", "temperature", FiniteRange(min=0), "How daring; 0 takes the likeliest token always."),
        Setting("top-k", "top_k", _WHOLE, "Choose among so many tokens; 0 among all."),
        Setting("top-p", "top_p", FiniteRange(0, 1), "Choose among the likeliest that together reach this share."),
        Setting("min-p", "min_p", FiniteRange(0, 1), "Leave out what is less likely than this part of the likeliest."),
        Setting("repeat-penalty", "repeat_penalty", FiniteRange(min=0.01), "Against repetition; 1 does nothing."),
        Setting(
            "seed",
            "seed",
            click.IntRange(0, 2**32 - 1),
            "The same seed and question give the same reply.",
            none="random",
        ),
        Setting("max-tokens", LIMIT, click.IntRange(1, 2**31 - 1), "Longest reply.", none="context"),
    )
}


def setting_options(function: Command) -> Command:
    """An option for each setting; the command gets `settings`, a dict of the fields that were given."""
    from localmix.sampling import Sampling

    defaults = dataclasses.asdict(Sampling())

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        given = {setting.field: options.pop(f"set_{setting.field}") for setting in SETTINGS.values()}
        chosen = {name: value for name, value in given.items() if value is not None}
        return function(*args, settings=chosen, **options)

    option: Any = wrapped
    for setting in reversed(SETTINGS.values()):
        default = defaults.get(setting.field)
        told = f" [default: {default}, or the model's own]" if default is not None else ""
        option = click.option(
            f"--{setting.name}", f"set_{setting.field}", type=setting.type, help=f"{setting.about}{told}"
        )(option)
    return cast(Command, option)


def sampling_for(own: Mapping[str, float], chosen: Mapping[str, Any]) -> Sampling:
    """How to choose tokens: what the user chose, else what the model says itself, else the defaults."""
    from localmix.sampling import Sampling

    fields = {field: value for field, value in chosen.items() if field != LIMIT}
    return dataclasses.replace(Sampling.for_model(own), **fields)


def accepted(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings in a file those that are known and in their range."""
    known = {setting.field: setting for setting in SETTINGS.values() if setting.field != LIMIT}
    return {field: value for field, value in stored.items() if field in known and known[field].accepts(value)}
