"""`localmix serve`: an OpenAI-compatible API and a chat page; see `localmix.serving`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from localmix.cli.console import Console
from localmix.cli.memory_check import placement_options, rpc_option
from localmix.cli.parameters import FILE, MODEL, examples, rope_options, threads_option

if TYPE_CHECKING:
    from localmix.cli.serve_events import Teller
    from localmix.distribution.machines import Machines
    from localmix.distribution.protocol import Endpoint
    from localmix.rope_scaling import RopeScaling
    from localmix.serving.engine_options import EngineOptions
    from localmix.serving.policy import Policy
    from localmix.serving.server_log import ServerLog

KEY_VARIABLE = "LOCALMIX_API_KEY"

_MOST_SLOTS = 256
_KEY_BYTES = 4096
_SHORTEST_KEY = 8
_FURTHER = "localmix.serve.further"


class _WithFurther(click.Command):
    """A command that keeps what stands behind `--` for another program."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            place = args.index("--")
            ctx.meta[_FURTHER] = args[place + 1 :]
            args = args[:place]
        return super().parse_args(ctx, args)


@click.command(cls=_WithFurther)
@click.argument("models", metavar="[MODEL]…", type=MODEL, nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need an API key.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 for any free one."
)
@click.option(
    "--api-key-file",
    type=FILE,
    metavar="FILE",
    help=f"Clients must show the key in this file; also from the variable {KEY_VARIABLE}.",
)
@click.option(
    "--api-key", metavar="KEY", help="The same, but who lists this machine's processes sees it: prefer a file."
)
@click.option(
    "--allow-host", "allowed_hosts", multiple=True, metavar="NAME", help="A further name that clients reach this by."
)
@click.option(
    "--cors", "origins", multiple=True, metavar="ORIGIN", help="Let the pages of this origin use the API, or * for all."
)
@click.option("--open", "open_page", is_flag=True, help="Open the chat page in the browser.")
@click.option(
    "--ctx",
    "context",
    type=click.IntRange(16, 2**31 - 1),
    help="Positions of context for each request; 4096 by default, less if the model was trained for less.",
)
@click.option(
    "--slots",
    type=click.IntRange(1, _MOST_SLOTS),
    help="Requests that are worked on at once, each with its own context; 4 by default, or fewer that fit.",
)
@click.option(
    "--chat-template",
    metavar="FILE",
    help="Use this Jinja template, or the one of this name where the model brings several.",
)
@click.option("--draft", metavar="MODEL|ngram", help="Speculative decoding: a smaller model, or a look at the context.")
@click.option(
    "--draft-tokens", type=click.IntRange(1, 64), help="Tokens proposed at a time; 4 by default, 16 with ngram."
)
@click.option("--embeddings", is_flag=True, help="Make vectors instead of text; embedding models always do.")
@placement_options
@rpc_option
@rope_options
@threads_option
@click.option("--force", is_flag=True, help="Load models even if memory seems too small.")
@click.option("--log-json", is_flag=True, help="Write the log as JSON, one object a line.")
@click.option("--json", is_flag=True, help="What happens as JSON on stdout, one object a line.")
@examples(
    "localmix serve",
    "localmix serve tinymix:Q4_K --open",
    "localmix serve mixtral all-MiniLM-L6-v2 --ctx 8192 --slots 2",
    "localmix serve --host 0.0.0.0 --api-key-file key.txt",
    "localmix serve mixtral -- --temp 0.2 --cache-reuse 256",
)
@click.pass_context
def command(
    ctx: click.Context,
    models: tuple[str, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    api_key: str | None,
    allowed_hosts: tuple[str, ...],
    origins: tuple[str, ...],
    open_page: bool,
    context: int | None,
    slots: int | None,
    chat_template: str | None,
    draft: str | None,
    draft_tokens: int | None,
    embeddings: bool,
    device: str,
    gpu_layers: int | None,
    experts: str,
    kv_type: str,
    rpc: tuple[Endpoint, ...],
    rope: RopeScaling | None,
    threads: int | None,
    force: bool,
    log_json: bool,
    json: bool,
) -> int:
    """Serve models to programs and browsers: an OpenAI-compatible API, and a chat page.

    Each model runs in a llama-server of its own, which is started again when it crashes. Nobody reaches them but
    through localmix, which listens on this machine alone unless another --host is named. Ctrl-C lets running requests
    end, and a second one does not. What stands behind -- goes to llama-server as it is.
    """
    from localmix.cli.serve_events import Teller
    from localmix.errors import InputError, Interrupted, LocalmixError

    console = Console()
    teller = Teller(console, json, open_page)
    try:
        with contextlib.ExitStack() as stack:
            from localmix.cli.serve_models import Preparation, Wishes
            from localmix.serving.engine_options import check_further
            from localmix.serving.server_binary import find_server
            from localmix.serving.service import private_folder

            wishes = Wishes(
                context=context,
                slots=slots,
                kv_type=kv_type,
                device=device,
                gpu_layers=gpu_layers,
                experts=experts,
                rope=rope,
                threads=threads,
                draft=draft,
                draft_tokens=draft_tokens,
                template=chat_template,
                embeddings=embeddings,
                force=force,
                further=check_further(ctx.meta.get(_FURTHER, [])),
            )
            policy, teller.made_key = _policy(console, host, port, api_key, api_key_file, allowed_hosts, origins)
            server = find_server()
            program = server.path
            machines = None
            if rpc:
                from localmix.distribution.machines import Machines

                if server.rpc is False:
                    raise InputError(
                        "This llama-server was built without its RPC back end, so that it knows no other machines.",
                        "`localmix doctor --build-server` builds one with it.",
                    )
                machines = stack.enter_context(Machines(rpc))
                wishes = dataclasses.replace(wishes, remote=machines.devices)
            folder = stack.enter_context(private_folder())
            options = Preparation(console, program, folder, wishes).engines(models)
            teller.served = options
            log = _open_log(console, port, log_json)
            if log is not None:
                stack.callback(log.close)
                teller.log = log.path
            _serve(program, options, folder, policy, teller, log, machines)
        if not teller.was_ready:
            raise Interrupted("Stopped.")
    except (LocalmixError, KeyboardInterrupt) as stopped:
        if not json:
            raise
        # the document of other commands has many lines
        error = stopped if isinstance(stopped, LocalmixError) else Interrupted("Stopped.")
        teller.line("error", message=error.message, hint=error.hint, exit_code=error.exit_code)
        console.error(error)
        return error.exit_code
    return 0


def _serve(
    program: Path,
    options: Sequence[EngineOptions],
    folder: Path,
    policy: Policy,
    teller: Teller,
    log: ServerLog | None,
    machines: Machines | None,
) -> None:
    """Run everything until a signal comes."""
    import asyncio
    import functools

    from localmix.serving.engine import Engine
    from localmix.serving.service import Stop, run, stopped_by_signals

    def writer(name: str) -> Callable[[str], None]:
        return functools.partial(log.line, name) if log is not None else lambda line: None

    async def main() -> None:
        blame = machines.explain if machines is not None else lambda: None
        engines = [Engine(program, each, folder, writer(each.name), teller, blame=blame) for each in options]
        stop = Stop()
        with stopped_by_signals(stop):
            await run(engines, policy, log.request if log is not None else lambda access: None, teller, stop)

    try:
        asyncio.run(main())
    finally:
        teller.end()


def _policy(
    console: Console,
    host: str,
    port: int,
    key: str | None,
    key_file: Path | None,
    allowed_hosts: Sequence[str],
    origins: Sequence[str],
) -> tuple[Policy, str | None]:
    """Who may talk to the gateway, and the key if one had to be made."""
    from localmix.errors import UsageError
    from localmix.serving.policy import Policy
    from localmix.serving.service import new_key

    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s@?#]+", origin, re.IGNORECASE):
            raise UsageError(f"--cors {origin}: no origin of a page.", "Write it as https://chat.example, or *.")
    chosen = _key(key, key_file)
    made = None
    if not _is_loopback(host):
        if not chosen:
            chosen = made = new_key()
        console.warn(
            f"Whoever reaches {host} over the network and has the API key can use the models. Nothing is encrypted:"
            " where others can listen, put a proxy with TLS in front."
        )
    if "*" in origins and not chosen:
        console.warn("With --cors '*' and no API key, every page that a browser here shows can use the models.")
    names = frozenset(name.lower() for name in allowed_hosts)
    policy = Policy(host, port, chosen, names, frozenset(origin.lower() for origin in origins))
    return policy, made


def _key(given: str | None, file: Path | None) -> str:
    """The API key that the user wants, empty for none."""
    from localmix.errors import UsageError
    from localmix.output import file_error

    if given is not None and file is not None:
        raise UsageError("--api-key and --api-key-file name two keys.", "Use one of them.")
    where, text = "--api-key", given
    if file is not None:
        where = str(file)
        try:
            with file.open("rb") as opened:
                text = opened.read(_KEY_BYTES).decode("ascii", "replace").strip()
        except OSError as error:
            raise file_error(error, file, "read") from error
    elif given is None:
        where, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE) or None
    if text is None:
        return ""
    if not re.fullmatch(rf"[!-~]{{{_SHORTEST_KEY},256}}", text):
        raise UsageError(
            f"{where}: an API key is {_SHORTEST_KEY} to 256 letters, digits and signs, without spaces.",
            "One is made: `python -c 'import secrets; print(secrets.token_urlsafe(24))' > key.txt`.",
        )
    return text


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _open_log(console: Console, port: int, as_json: bool) -> ServerLog | None:
    from localmix.serving.server_log import ServerLog, log_folder

    path = log_folder() / (f"serve-{port}.log" if port else "serve.log")
    try:
        return ServerLog(path, as_json)
    except OSError as error:
        console.warn(f"There is no log: {path} cannot be written ({error.strerror}).")
        return None
