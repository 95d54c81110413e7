"""`localmix serve` beside a llama-server started by hand: eight streams at once, and what the gateway adds to a token.

    python bench/serve.py                            # about ten minutes on 2 cores
    python bench/serve.py --threads 1 --repeat 9

A Mixtral of 1.2 G random weights answers eight clients at once, through localmix and through a second llama-server
with the arguments and the environment of localmix's own, in turns, so that the ratio is the gateway's alone; each pair
gives a ratio and the median of the ratios counts, so that a slow moment of the machine hits both. The gateway's
processor time is read from its process, and what it adds to the first token and to one request is measured with
TinyMix, which answers at once. Writes SERVE.md beside this file.
"""

from __future__ import annotations

import json
import platform
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from chat import build_models
from side_by_side import Pairs, Side, options, side_of

STREAMS, REPLY, CONTEXT = 8, 64, 512
END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Place:
    """A server that answers.

    Attributes:
        engine: the process of llama-server.
        gateway: localmix's own, if it stands before it.
    """

    address: tuple[str, int]
    engine: psutil.Process
    gateway: psutil.Process | None = None


@dataclass(frozen=True)
class Streamed:
    """What a round of streams took.

    Attributes:
        first: seconds to the first event, of the middle stream.
        seconds: to the end of the last.
    """

    tokens: int
    first: float
    seconds: float


def request(prompt: str, tokens: int) -> bytes:
    """A streamed completion of so many tokens."""
    body = json.dumps(
        {"prompt": prompt, "stream": True, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False}
    ).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def stream(place: Place, streams: int, tokens: int, number: int) -> Streamed:
    """Ask for that many streams at once and read them to their ends, in one thread."""
    waiting = selectors.DefaultSelector()
    clients = [socket.create_connection(place.address) for _ in range(streams)]
    first: dict[socket.socket, float] = {}
    tails: dict[socket.socket, bytes] = {}
    events = 0
    started = time.perf_counter()
    for index, client in enumerate(clients):
        client.sendall(request(f"{number} {index} the", tokens))
        waiting.register(client, selectors.EVENT_READ, client)
    while waiting.get_map():
        for key, _ in waiting.select():
            client = key.data
            data = client.recv(65536)
            tail = tails.get(client, b"") + data
            if b"data: " in data:
                first.setdefault(client, time.perf_counter() - started)
            events += data.count(b"data: ")
            tails[client] = tail[-len(END) :]
            if not data or tail.endswith(END):
                assert tail.endswith(END), tail
                waiting.unregister(client)
                client.close()
    seconds = time.perf_counter() - started
    assert events >= streams * tokens, events
    return Streamed(streams * tokens, statistics.median(first.values()), seconds)


@contextmanager
def serving(side: Side, model: Path) -> Iterator[tuple[Place, Place]]:
    """`localmix serve`, and a llama-server with the same arguments on a port of its own."""
    options = ("--port", 0, "--ctx", CONTEXT, "--slots", STREAMS, "--threads", side.threads)
    command = [sys.executable, "-m", "localmix", "serve", model, *options, "--json"]
    with (
        (side.folder / "log.txt").open("wb") as log,
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log) as ours,
    ):
        theirs = None
        try:
            address = wait_until_ready(ours)
            gateway = psutil.Process(ours.pid)
            (engine,) = (child for child in gateway.children(recursive=True) if child.name() == "llama-server")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                by_hand = free.getsockname()
            theirs = subprocess.Popen(
                alone(engine.cmdline(), by_hand[1]), stdout=log, stderr=log, env=without_router(engine.environ())
            )
            yield Place(address, engine, gateway), Place(wait_for(by_hand), psutil.Process(theirs.pid))
        finally:
            for process in (ours, theirs):
                if process is not None:
                    process.terminate()
                    process.wait()


def alone(arguments: list[str], port: int) -> list[str]:
    """llama-server's command line with a port instead of its socket."""
    place = arguments.index("--host")
    return [*arguments[: place + 1], "127.0.0.1", "--port", str(port), *arguments[place + 2 :]]


def without_router(variables: dict[str, str]) -> dict[str, str]:
    """llama-server's environment, but for what ties it to whoever started it."""
    return {name: value for name, value in variables.items() if not name.startswith("LLAMA_SERVER_")}


def wait_until_ready(process: subprocess.Popen[bytes]) -> tuple[str, int]:
    """The address that `localmix serve` tells."""
    assert process.stdout is not None
    address = ("", 0)
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "listening":
            address = (event["host"], event["port"])
        if event["event"] == "ready":
            return address
    sys.exit("localmix serve ended before it was ready.")


def wait_for(address: tuple[str, int]) -> tuple[str, int]:
    """The address, once a llama-server there has loaded its model."""
    while True:
        try:
            with socket.create_connection(address) as client:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if client.recv(65536).startswith(b"HTTP/1.1 200"):
                    return address
        except OSError:
            pass
        time.sleep(0.1)


def spent(process: psutil.Process | None) -> float:
    """Processor seconds of a process by itself; to the nanosecond where the system tells, else to its clock's tick."""
    if process is None:
        return 0.0
    try:
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except OSError:
        times = process.cpu_times()
        return times.user + times.system


def wakes(process: psutil.Process | None) -> int:
    """How often a process has begun to wait for something."""
    return process.num_ctx_switches().voluntary if process is not None else 0


@dataclass(frozen=True)
class Cost:
    """What a token costs the gateway: processor seconds, and how often it waits."""

    seconds: float
    wakes: float


def throughput(side: Side, model: Path) -> tuple[list[Pairs], list[Cost]]:
    """Tokens per second, seconds to the first token, processor time of a token; and the gateway's part of that."""
    title = f"{model.stem}, {STREAMS} streams of {REPLY}"
    speed = Pairs(title, "llama-server by hand", "tokens/s")
    first = Pairs(f"{title}, first token", "llama-server by hand", "s")
    work = Pairs(f"{title}, processor time of a token", "llama-server by hand", "ms")
    costs = []
    with serving(side, model) as (ours, theirs):
        for place in (ours, theirs):
            stream(place, STREAMS, 4, 0)  # the file is read now
        for number in range(side.repeat):
            # who goes first changes, for what the machine does by turns
            for place in (ours, theirs) if number % 2 else (theirs, ours):
                gateway, engine, waits = spent(place.gateway), spent(place.engine), wakes(place.gateway)
                done = stream(place, STREAMS, REPLY, number + 1)
                gateway, engine = spent(place.gateway) - gateway, spent(place.engine) - engine
                if place is ours:
                    costs.append(Cost(gateway / done.tokens, (wakes(place.gateway) - waits) / done.tokens))
                for row, figure in (
                    (speed, done.tokens / done.seconds),
                    (first, done.first),
                    (work, (gateway + engine) / done.tokens * 1000),
                ):
                    (row.ours if place is ours else row.theirs).append(figure)
    return [speed, first, work], costs


def latency(side: Side, model: Path) -> tuple[Pairs, Pairs]:
    """Milliseconds of a whole request for one token, and from token to token of one stream."""
    one = Pairs(f"{model.stem}, a request for one token", "llama-server by hand", "ms")
    each = Pairs(f"{model.stem}, from token to token", "llama-server by hand", "ms")
    with serving(side, model) as (ours, theirs):
        for number in range(10 * side.repeat):
            for place in (ours, theirs):
                whole = stream(place, 1, 1, number)
                (one.ours if place is ours else one.theirs).append(whole.seconds * 1000)
                long = stream(place, 1, 200, number)
                gap = (long.seconds - long.first) / 199 * 1000
                (each.ours if place is ours else each.theirs).append(gap)
    return one, each


def report(rows: list[Pairs], added: list[Pairs], costs: list[Cost], side: Side) -> str:
    """SERVE.md."""
    cost, waits = (statistics.median(getattr(one, name) for one in costs) for name in ("seconds", "wakes"))
    lines = [
        "# localmix serve beside a llama-server started by hand",
        "",
        "Through `localmix serve`, and with a llama-server with the same arguments and environment,"
        f" --threads {side.threads}, in turns; the median of the ratios counts, and the middle half of them shows the"
        " noise. `python bench/serve.py` measures it again.",
        "",
        f"Machine: {platform.machine()}, {psutil.cpu_count(logical=False)} cores.",
        "",
        "| work | against | theirs | localmix | ratio | middle half | pairs |",
        "|---|---|--:|--:|--:|---|--:|",
        *(row.line() for row in (*rows, *added)),
        "",
        f"A token of {STREAMS} streams costs the gateway {cost * 1e6:.0f} µs of processor time and {waits:.2f} waits.",
        "It adds "
        + " and ".join(
            f"{statistics.median(row.ours) - statistics.median(row.theirs):.2f} ms ({row.work.partition(', ')[2]})"
            for row in added
        )
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write SERVE.md."""
    parser = options(__doc__ or "", "chat", "5 GB", "SERVE.md", repeat=9)
    asked = parser.parse_args()
    side = side_of(asked)
    (model, _), small = build_models(side)
    rows, costs = throughput(side, model)
    text = report(rows, list(latency(side, small)), costs, side)
    print(text)
    asked.results.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
