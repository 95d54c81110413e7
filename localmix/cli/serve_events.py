"""What happens to a running `localmix serve`: said to a person, or written as JSON for a program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.serving import engine, service

if TYPE_CHECKING:
    from localmix.cli.console import Console
    from localmix.serving.engine_options import EngineOptions
    from localmix.serving.service import Event


class Teller:
    """Says what happens: to a person, or as JSON to a program.

    Attributes:
        made_key: the API key, where it was made here and nobody knows it yet.
        log: the file, if there is one.
        served: how the models are started.
        was_ready: whether everything answered once.
    """

    def __init__(self, console: Console, json: bool, open_page: bool) -> None:
        self._console = console
        self._json = json
        self._open_page = open_page
        self._loading = ""
        self.made_key: str | None = None
        self.log: Path | None = None
        self.served: Sequence[EngineOptions] = ()
        self.was_ready = False

    def __call__(self, event: Event) -> None:
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
            fields = {"models": "; ".join(map(_describe, self.served)), "API": f"{event.url}/v1"}
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


def _describe(options: EngineOptions) -> str:
    """A model, and what localmix found room for."""
    at_once = f"{options.slots} requests at once" if options.slots > 1 else "one request at a time"
    return f"{options.name}, {at_once}, {options.context} positions each"
