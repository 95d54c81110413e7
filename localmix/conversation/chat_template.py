"""Render a model's chat template: somebody's program, so in a sandbox and with limits on size and memory.

The environment is the one that Hugging Face templates are written for. Time is limited from outside, by
killing the process that renders (see `chat.Engine`): nothing else stops a loop for certain.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from localmix.errors import InputError

OUTPUT_LIMIT = 4_000_000  # characters; a context of a million tokens
MEMORY_LIMIT = 512 * 2**20  # bytes that rendering may add to the process
HINT = "Use another one with --chat-template FILE."


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos: str = "",
    eos: str = "",
    name: str = "The chat template",
) -> str:
    """The prompt that asks the model for the next message.

    A template that refuses a system message (Mixtral's early ones do) gets it in front of the first user
    message.

    Args:
        template: Jinja source.
        messages: with the keys `role` (system, user, assistant) and `content`.
        bos, eos: the text of these tokens.
        name: what error sentences call it.

    Raises:
        InputError: the template is broken, refuses the conversation, or goes beyond a limit.
    """
    try:
        return _render(template, messages, bos, eos)
    except _TooMuch as error:
        raise InputError(f"{name} {error}.", HINT) from error
    except Exception as error:  # whatever somebody's program raises
        if messages and messages[0]["role"] == "system":
            return render(template, _without_system(messages), bos=bos, eos=eos, name=name)
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{name} fails: {reason}.", HINT) from error


def prepare() -> None:
    """Load the template language before it is needed."""
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401


class _TooMuch(Exception):
    pass


def _render(template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str) -> str:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    variables = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": True,
        "bos_token": bos,
        "eos_token": eos,
        "tools": None,
        "documents": None,
    }
    parts: list[str] = []
    length = 0
    try:
        with _limited_memory():
            for part in environment.from_string(template).generate(variables):
                length += len(part)
                if length > OUTPUT_LIMIT:
                    raise _TooMuch(f"writes more than {OUTPUT_LIMIT:,} characters")
                parts.append(part)
    except MemoryError:
        raise _TooMuch(f"takes more than {MEMORY_LIMIT // 2**20} MiB") from None
    return "".join(parts)


def _without_system(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        first = {"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}
        return [first, *rest[1:]]
    return rest


def _raise_exception(message: object) -> NoReturn:
    raise ValueError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Let the process grow by `MEMORY_LIMIT` and no more, where the system enforces it (Linux)."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
