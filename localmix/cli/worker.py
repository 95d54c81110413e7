"""`localmix worker`: see `localmix.distribution`."""

from __future__ import annotations

import queue
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

import click

from localmix.cli.console import Console
from localmix.cli.parameters import examples, parse_size, threads_option
from localmix.distribution.protocol import DEFAULT_PORT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from localmix.distribution.front import Event
    from localmix.distribution.rpc_server import ServedDevice

_WHY = (
    "Whoever reaches this port reads and writes what this program may, and makes it crash: the protocol knows no"
    " password and hides nothing."
)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Port to listen on; 0 for any free one.",
)
@click.option(
    "--insecure-network", is_flag=True, help="Listen on an address that others reach, though nothing protects it."
)
@click.option("--device", metavar="NAME[,…]", default="", help="Devices to offer; the GPUs by default, else the CPU.")
@click.option("--mem", "offered", metavar="SIZE", help="Offer no more than so much memory of each device.")
@click.option("--cache", is_flag=True, help="Keep the weights that come on the disk, so that they come only once.")
@threads_option
@click.option("--json", is_flag=True, help="What happens as JSON on stdout, one object a line.")
@examples(
    "localmix worker",
    "localmix worker --mem 12GiB --cache",
    "localmix worker --host 192.168.1.20 --insecure-network",
    "ssh -N -L 50052:127.0.0.1:50052 the-other-machine      # then, beside it:",
    "localmix chat mixtral --rpc 127.0.0.1:50052",
)
def command(
    host: str,
    port: int,
    insecure_network: bool,
    device: str,
    offered: str | None,
    cache: bool,
    threads: int | None,
    json: bool,
) -> int:
    """Lend this machine's memory and devices to a model that another machine runs with --rpc.

    Starts llama.cpp's ggml-rpc-server, and serves one client at a time until Ctrl-C. It listens on this machine
    alone: reach it through an SSH tunnel, or name an address with --host and --insecure-network.
    """
    from localmix.distribution import front
    from localmix.distribution.rpc_server import RpcServer, find_rpc_server
    from localmix.errors import LocalmixError, UsageError
    from localmix.native.devices import default_threads

    teller = _Teller(json)
    try:
        limit = parse_size(offered) if offered else None
        if not _is_loopback(host):
            if not insecure_network:
                raise UsageError(
                    f"{host} is an address that other machines reach. {_WHY}",
                    "Use an SSH tunnel (docs/machines.md), or in a network that you trust --insecure-network.",
                )
            teller.console.warn(f"{host} can be reached by other machines. {_WHY}")
        program = find_rpc_server()
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        with ExitStack() as stack:
            listener = stack.enter_context(front.listen(host, port))
            folder = _cache_folder() if cache else None
            server = RpcServer(
                program,
                threads=threads or default_threads(),
                devices=[word for word in device.split(",") if word],
                cache=folder,
            )
            stack.enter_context(server)
            stack.enter_context(front.Front(listener, server, limit, events.put))
            teller.begin(host, listener.getsockname()[1], server.devices, folder)
            teller.tell(events)
    except KeyboardInterrupt:
        if not teller.began:
            raise
        teller.end()
        return 0
    except LocalmixError as error:
        if not json:
            raise
        teller.line("error", message=error.message, hint=error.hint, exit_code=error.exit_code)
        teller.console.error(error)
        return error.exit_code


class _Teller:
    """Says what happens: to a person, or as JSON to a program."""

    def __init__(self, json: bool) -> None:
        # here, because Ctrl-C in the middle of an import leaves Python 3.11 with the exit code of a signal
        from localmix.sizes import size

        self._size = size
        self._json = json
        self.console = Console()
        self.began = False

    def begin(self, host: str, port: int, devices: Sequence[ServedDevice], cache: Path | None) -> None:
        """Where the worker is, and what it has."""
        from dataclasses import asdict

        from localmix.distribution.protocol import Endpoint

        self.began = True
        endpoint = str(Endpoint(host, port))
        folder = cache / "rpc" if cache is not None else None
        self.line("listening", host=host, port=port, devices=[asdict(device) for device in devices], cache=folder)
        names = ", ".join(f"{device.name} ({device.description})" for device in devices)
        self.console.note(f"Listening at {endpoint} with {names}. Ctrl-C ends it.")
        if folder is not None:
            self.console.note(f"Weights are kept in {folder}.")

    def tell(self, events: queue.SimpleQueue[Event]) -> NoReturn:
        """Say what happens, until Ctrl-C."""
        from localmix.distribution import front

        size = self._size
        while True:
            try:
                event = events.get(timeout=0.5)  # a wait without an end cannot be interrupted on Windows
            except queue.Empty:
                continue
            if isinstance(event, front.Came):
                self.line("came", client=event.client)
                self._note(f"{event.client} loads a model.")
            elif isinstance(event, front.Left):
                self.line("left", **vars(event))
                why = f": {event.reason}" if event.reason else ""
                self._note(
                    f"{event.client} is gone after {event.seconds:.0f} s{why}; {size(event.received)} came,"
                    f" {size(event.sent)} went."
                )
            elif isinstance(event, front.Refused):
                self.line("refused", client=event.client)
                self._note(f"{event.client} was refused: one client at a time.")
            elif isinstance(event, front.Restarted):
                self.line("restarted", reason=event.reason)
                self.console.warn(f"ggml-rpc-server crashed and runs again: {event.reason or 'it said nothing'}.")
            else:
                raise event.error

    def end(self) -> None:
        """The last words."""
        self.line("stopped")
        self.console.note("Stopped.")

    def line(self, event: str, **fields: object) -> None:
        """One line for a program."""
        if self._json:
            import json

            self.console.raw(json.dumps({"event": event, **fields}, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()

    def _note(self, text: str) -> None:
        import time

        self.console.note(f"{time.strftime('%H:%M:%S')} {text}")


def _is_loopback(host: str) -> bool:
    """Whether a name or address means this machine to this machine, and to no other."""
    import ipaddress
    import socket

    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)
    except (OSError, ValueError):
        return False  # listening will say what is wrong with it


def _cache_folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("localmix", appauthor=False)
