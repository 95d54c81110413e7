"""The workers of one run, for the parent of whatever computes with them.

    with Machines(parse_endpoints("10.0.0.2:50052,10.0.0.3:50052")) as machines:
        fit = Examiner(Wish(remote=machines.devices), available()).examine(path)
        ...                                   # load the model with fit.placement, in a child

While it is open, a child of `localmix.worker` that dies because a worker is lost says so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from localmix import worker
from localmix.distribution.protocol import DeviceMemory, Endpoint, visit
from localmix.distribution.relay import Listening, Lost, Reached, relay
from localmix.errors import InputError, LocalmixError, NetworkError, UsageError
from localmix.native.devices import REMOTE, Device, has_rpc_backend
from localmix.native.library import PINNED_VERSION

# a child that dies of a lost worker is seen to before the news of the worker arrives
_NEWS_SECONDS = 0.5
# what still computes by itself then is ended after so long
_GRACE_SECONDS = 1.0
_MOST_DEVICES = 16  # llama_max_devices()


class Machines:
    """Workers that were found to be there, and a relay to them; a context manager.

    Attributes:
        devices: theirs, as llama.cpp calls them once it is connected.

    Raises (when entered):
        NetworkError: a worker cannot be used; the sentence says why.
        UsageError: they have more devices than llama.cpp takes.
        InputError: the engine was built without its part for this.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.devices: tuple[Device, ...] = ()
        self._endpoints = endpoints
        self._stack = ExitStack()
        self._relay = worker.Worker(relay, endpoints)
        self._ports: tuple[int, ...] = ()
        # of workers that have not been reached since; of the relay itself under None
        self._losses: dict[Endpoint | None, NetworkError] = {}
        self._ended = False
        self._closed = threading.Event()
        self._news = threading.Condition()

    def __enter__(self) -> Machines:
        if not has_rpc_backend():
            raise InputError(
                "The engine was built without its RPC back end, with which a model is spread over machines.",
                'Run `make setup`, or `CMAKE_ARGS="-DGGML_RPC=on" pip install --force-reinstall --no-deps'
                f" --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={PINNED_VERSION}`.",
            )
        with ExitStack() as stack:
            stack.enter_context(self._relay)
            stack.callback(self._closed.set)
            threading.Thread(target=self._listen, daemon=True).start()
            # all at the same time, or one worker under two names would not be seen
            with ExitStack() as visits, ThreadPoolExecutor(len(self._endpoints)) as pool:
                memories = list(pool.map(lambda endpoint: visits.enter_context(visit(endpoint)), self._endpoints))
            with self._news:
                self._news.wait_for(lambda: self._ports or self._ended)
            if self.failure is not None:
                raise self.failure
            self.devices = tuple(self._name(memories))
            if len(self.devices) > _MOST_DEVICES:
                raise UsageError(
                    f"llama.cpp takes {_MOST_DEVICES} devices, and these workers have {len(self.devices)}."
                )
            worker.death_reasons.append(self.explain)
            stack.callback(worker.death_reasons.remove, self.explain)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def failure(self) -> NetworkError | None:
        """Which worker is lost, and why; None if each was reached again since."""
        return next(iter(self._losses.copy().values()), None)

    def explain(self) -> NetworkError | None:
        """As `failure`, for a process that has just died."""
        with self._news:
            self._news.wait_for(lambda: self.failure is not None, _NEWS_SECONDS)
        return self.failure

    def _name(self, memories: Sequence[Sequence[DeviceMemory]]) -> Iterator[Device]:
        number = 0
        for endpoint, port, memory in zip(self._endpoints, self._ports, memories, strict=True):
            for place, device in enumerate(memory):
                title = f"{endpoint}, device {place}" if len(memory) > 1 else str(endpoint)
                yield Device(f"RPC{number}", title, REMOTE, device.free, device.total, f"127.0.0.1:{port}")
                number += 1

    def _listen(self) -> None:
        try:
            for event in self._relay:
                if isinstance(event, Listening):
                    with self._news:
                        self._ports = event.ports
                        self._news.notify_all()
                elif isinstance(event, Reached):
                    self._losses.pop(event.endpoint, None)
                elif isinstance(event, Lost):
                    self._fail(event.endpoint, event.error)
        except (LocalmixError, worker.WorkerFailure) as error:
            if not self._closed.is_set():
                self._fail(None, NetworkError(f"The connection to the workers ended: {error}"))
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _fail(self, endpoint: Endpoint | None, error: NetworkError) -> None:
        with self._news:
            self._losses[endpoint] = error
            self._news.notify_all()
        # most die of it at once; one in the middle of a long step of its own would come to it later
        for child in worker.running - {self._relay}:
            child.condemn(error, _GRACE_SECONDS)
