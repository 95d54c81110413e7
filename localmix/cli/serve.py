"""`localmix serve`: an OpenAI-compatible API and a chat page; see `localmix.serving`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localmix.cli.console import Console
from localmix.cli.memory_check import placement_options
from localmix.cli.parameters import FILE, MODEL, examples, rope_options, threads_option

if TYPE_CHECKING:
    from localmix.cli.memory_check import Choice
    from localmix.conversation.chat_events import DraftSettings
    from localmix.rope_scaling import RopeScaling
    from localmix.serving import service
    from localmix.serving.engine_options import EngineOptions
    from localmix.serving.policy import Policy
    from localmix.serving.server_log import ServerLog
    from localmix.serving.service import Event

KEY_VARIABLE = "LOCALMIX_API_KEY"

_SLOTS = (4, 2, 1)  # the first of these that fits
_MOST_SLOTS = 256
_MOST_CACHE_BYTES = 8 * 2**30
_KEY_BYTES = 4096
_SHORTEST_KEY = 8
_NGRAM_TOKENS = 16
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
    help=f"Requests that are worked on at once, each with its own context; {_SLOTS[0]} by default, or what fits.",
)
@click.option("--chat-template", type=FILE, metavar="FILE", help="Use this Jinja template.")
@click.option("--draft", metavar="MODEL|ngram", help="Speculative decoding: a smaller model, or a look at the context.")
@click.option(
    "--draft-tokens", type=click.IntRange(1, 64), help="Tokens proposed at a time; 4 by default, 16 with ngram."
)
@click.option("--embeddings", is_flag=True, help="Make vectors instead of text; embedding models always do.")
@placement_options
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
    chat_template: Path | None,
    draft: str | None,
    draft_tokens: int | None,
    embeddings: bool,
    device: str,
    gpu_layers: int | None,
    experts: str,
    kv_type: str,
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
    from localmix.errors import Interrupted, LocalmixError

    console = Console()
    teller = _Teller(console, json, open_page)
    try:
        with contextlib.ExitStack() as stack:
            from localmix.serving.engine_options import check_further
            from localmix.serving.service import private_folder

            further = check_further(ctx.meta.get(_FURTHER, []))
            policy, teller.made_key = _policy(console, host, port, api_key, api_key_file, allowed_hosts, origins)
            folder = stack.enter_context(private_folder())
            loading = _Loading(console, folder, device, rope, threads, chat_template, further, force)
            check = {"kv_type": kv_type, "gpu_layers": gpu_layers, "experts": experts, "embeddings": embeddings}
            options = loading.options(models, context, slots, _draft(draft, draft_tokens, len(models)), check)
            log = _open_log(console, port, log_json)
            if log is not None:
                stack.callback(log.close)
                teller.log = log.path
            _serve(loading.program, options, folder, policy, teller, log)
    except LocalmixError as error:
        if not json:
            raise
        teller.line("error", message=error.message, hint=error.hint, exit_code=error.exit_code)
        console.error(error)
        return error.exit_code
    if not teller.was_ready:
        raise Interrupted("Stopped.")
    return 0


def _serve(
    program: Path,
    options: Sequence[EngineOptions],
    folder: Path,
    policy: Policy,
    teller: _Teller,
    log: ServerLog | None,
) -> None:
    """Run everything until a signal comes."""
    import asyncio
    import functools

    from localmix.serving.engine import Engine
    from localmix.serving.service import Stop, run, stopped_by_signals

    def writer(name: str) -> Callable[[str], None]:
        return functools.partial(log.line, name) if log is not None else lambda line: None

    async def main() -> None:
        engines = [Engine(program, each, folder, writer(each.name), teller) for each in options]
        stop = Stop()
        with stopped_by_signals(stop):
            await run(engines, policy, log.request if log is not None else lambda access: None, teller, stop)

    try:
        asyncio.run(main())
    finally:
        teller.end()


class _Teller:
    """Says what happens: to a person, or as JSON to a program.

    Attributes:
        made_key: the API key, where it was made here and nobody knows it yet.
        log: the file, if there is one.
        was_ready: whether everything answered once.
    """

    def __init__(self, console: Console, json: bool, open_page: bool) -> None:
        self._console = console
        self._json = json
        self._open_page = open_page
        self._loading = ""
        self.made_key: str | None = None
        self.log: Path | None = None
        self.was_ready = False

    def __call__(self, event: Event) -> None:
        from localmix.serving import engine, service

        console = self._console
        if isinstance(event, service.Loading):
            self._tell_loading(event)
            return
        console.status()
        if isinstance(event, service.Listening):
            self.line("listening", url=event.url, host=event.host, port=event.port)
        elif isinstance(event, service.Ready):
            self._tell_ready(event)
        elif isinstance(event, engine.Restarting):
            self.line("restarting", model=event.model, reason=event.reason, attempt=event.attempt)
            console.warn(
                f"{event.reason} {event.model} is started again in {event.pause:g} s"
                f" (attempt {event.attempt} of {event.attempts})."
            )
        elif isinstance(event, engine.Restarted):
            self.line("restarted", model=event.model)
            console.note(f"{event.model} answers again.")
        elif isinstance(event, engine.GivenUp):
            self.line("failed", model=event.model, reason=event.reason)
            console.warn(f"{event.model} is given up: {event.reason}")
        elif isinstance(event, service.Draining):
            self.line("draining")
            console.note("Waiting for the requests that are running; Ctrl-C again cuts them.")
        else:
            self.line("stopped", cut=event.cut)
            cut = f" {event.cut} request{'s were' if event.cut > 1 else ' was'} cut." if event.cut else ""
            console.note(f"Stopped.{cut}")

    def line(self, event: str, **fields: object) -> None:
        """One line for a program."""
        if self._json:
            import json

            self._console.raw(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def end(self) -> None:
        """Leave no status line behind."""
        self._console.status()

    def _tell_loading(self, event: service.Loading) -> None:
        if event.model != self._loading:
            self._loading = event.model
            self.line("loading", model=event.model)
            if not sys.stderr.isatty():
                self._console.note(f"Loading {event.model} …")
        if event.share < 1:
            self._console.status(f"Loading {event.model}: {event.share:.0%}")
        else:
            self._console.status(f"{event.model} is loaded; it gets ready …")

    def _tell_ready(self, event: service.Ready) -> None:
        self.was_ready = True
        key = {"api_key": self.made_key} if self.made_key else {}
        self.line("ready", url=event.url, models=event.models, page=event.page, log=str(self.log or ""), **key)
        if not self._json:
            fields = {"models": ", ".join(event.models), "API": f"{event.url}/v1"}
            if event.page:
                fields["chat page"] = f"{event.url}/"
            if self.made_key:
                fields["API key"] = f"{self.made_key} (made for this run; it is shown only now)"
            if self.log:
                fields["log"] = str(self.log)
            self._console.fields(fields)
            sys.stdout.flush()
            self._console.note("Ctrl-C ends it.")
        if self._open_page and event.page:
            import webbrowser

            webbrowser.open(f"{event.url}/")
        elif self._open_page:
            self._console.warn("This llama-server has no chat page. `localmix doctor --build-server` builds one in.")


class _Loading:
    """How models are loaded.

    Args:
        folder: for files that llama-server reads.

    Attributes:
        program: llama-server.
    """

    def __init__(
        self,
        console: Console,
        folder: Path,
        device: str,
        rope: RopeScaling | None,
        threads: int | None,
        template: Path | None,
        further: tuple[str, ...],
        force: bool,
    ) -> None:
        from localmix.serving.server_binary import find_server

        self.program = find_server().path
        self._console = console
        self._folder = folder
        self._device = self._usable_device(device)
        self._rope = rope
        self._threads = threads
        self._template = template.absolute() if template is not None else None
        self._further = further
        self._force = force
        if template is not None and not template.is_file():
            from localmix.errors import FileError

            raise FileError(f"The chat template {template} does not exist, or is no file.")

    def options(
        self,
        names: Sequence[str],
        context: int | None,
        slots: int | None,
        draft: DraftSettings | None,
        check: dict[str, Any],
    ) -> list[EngineOptions]:
        """How each model is started, all of them at once in memory.

        Args:
            names: as the user typed them; none for the model used last.
            slots: None for as many as fit.
            check: further arguments of `MemoryCheck`.

        Raises:
            LocalmixError: a model cannot be found or read, or does not fit.
        """
        import dataclasses

        from localmix import library
        from localmix.capacity import memory
        from localmix.cli.memory_check import MemoryCheck

        memory_check = MemoryCheck(
            self._console,
            context,
            device=self._device,
            draft=draft.model if draft else None,
            slots=_SLOTS if slots is None else (slots,),
            generation=False,
            **check,
        )
        found: list[EngineOptions] = []
        room = memory.available().bytes
        for name in names or (None,):
            path = library.resolve(name, library.Purpose.RUN, memory_check.fits).absolute()
            choice = memory_check.check(path, self._force)
            memory_check.reserve(path)
            room -= choice.need.total
            engine = self._engine(path, choice, draft)
            if any(engine.name == other.name for other in found):
                from localmix.errors import UsageError

                raise UsageError(f"{engine.name} is named twice.", "Clients could not tell the two apart.")
            found.append(engine)
        if not names:
            library.remember(found[0].model)
        # half of what is left: the rest is for other programs and for the cache of files
        share = min(_MOST_CACHE_BYTES, max(0, room) // 2 // len(found))
        return [dataclasses.replace(engine, cache_bytes=share) for engine in found]

    def _engine(self, path: Path, choice: Choice, draft: DraftSettings | None) -> EngineOptions:
        from localmix import library
        from localmix.serving.engine_options import PLAIN_TEMPLATE, EngineOptions, rope_base
        from localmix.sources.open import open_source

        model, kind = library.split_name(path)
        name = f"{model}:{kind}" if kind else model
        with open_source(path) as source:
            template = self._template
            if template is None and not choice.embeddings and not source.get("tokenizer.chat_template"):
                template = self._folder / "plain.jinja"
                template.write_text(PLAIN_TEMPLATE, encoding="utf-8")
                self._console.note(f"{name} has no chat template: it goes on with the text of a conversation.")
            pools = source.get("{arch}.pooling_type") is not None
            base = rope_base(source, self._rope)
            if choice.embeddings and not source.generates:
                self._console.note(f"{name} makes vectors (/v1/embeddings), not text.")
        return EngineOptions(
            model=path,
            name=name,
            context=choice.context,
            slots=choice.slots,
            kv_type=choice.kv_type,
            placement=choice.placement,
            repack=choice.repack,
            threads=self._threads,
            rope=self._rope,
            rope_base=base,
            draft=None if choice.embeddings else draft,
            template=template,
            embeddings=choice.embeddings,
            pooling=None if pools else "mean",
            further=self._further,
        )

    def _usable_device(self, device: str) -> str:
        """The devices to reckon with: none but the processor where llama-server was built for no other."""
        from localmix.native.devices import has_gpu_backend
        from localmix.serving.server_binary import server_devices

        if device == "cpu" or (device == "auto" and not has_gpu_backend()) or server_devices(self.program):
            return device
        said, hint = (
            "llama-server was built without a GPU",
            "`localmix doctor --build-server --backend cuda` builds one with CUDA.",
        )
        if device == "auto":
            self._console.note(f"{said}: models run on the processor. {hint}")
            return "cpu"
        from localmix.errors import UsageError

        raise UsageError(f"{said}, so there is no --device {device}.", hint)


def _draft(spec: str | None, tokens: int | None, models: int) -> DraftSettings | None:
    from localmix import library
    from localmix.conversation.chat_events import DraftSettings
    from localmix.errors import UsageError

    if spec is None:
        if tokens is not None:
            raise UsageError("--draft-tokens needs --draft.", "Name a smaller model, or ngram.")
        return None
    if spec == "ngram":
        return DraftSettings(None, tokens or _NGRAM_TOKENS)
    if models > 1:
        raise UsageError("A draft model works for one model only.", "Serve one, or use --draft ngram.")
    return DraftSettings(library.resolve(spec, library.Purpose.RUN).absolute(), tokens or DraftSettings.length)


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
