"""Replies of the chat page that go on for a while without a reader, so that a reload takes them up again.

llama-server keeps the stream of a request with an `X-Conversation-Id` going when its client leaves, for as long as the
reply lasts. Here it goes on for a while without a reader, and is stopped then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Place = TypeVar("Place")


@dataclass
class _Kept(Generic[Place]):
    place: Place
    readers: int = 0
    timer: asyncio.TimerHandle | None = None


class Conversations(Generic[Place]):
    """Where each conversation's reply is made, and how many read it.

    Args:
        stop: ends the reply of a conversation; called when nobody came back for it.
        seconds: how long to wait.
    """

    def __init__(self, stop: Callable[[Place, str], Coroutine[Any, Any, None]], seconds: float) -> None:
        self._stop = stop
        self._seconds = seconds
        self._kept: dict[str, _Kept[Place]] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, name: str) -> Place | None:
        """Where its reply is made, or None."""
        kept = self._kept.get(name)
        return kept.place if kept else None

    def join(self, name: str, place: Place) -> None:
        """One more reads it."""
        kept = self._kept.setdefault(name, _Kept(place))
        kept.place = place
        kept.readers += 1
        if kept.timer is not None:
            kept.timer.cancel()
            kept.timer = None

    def leave(self, name: str) -> None:
        """One has read it to its end, or has gone."""
        kept = self._kept.get(name)
        if kept is None:  # closed meanwhile
            return
        kept.readers -= 1
        if kept.readers == 0:
            kept.timer = asyncio.get_running_loop().call_later(self._seconds, self._end, name)

    def close(self) -> None:
        """Wait for nobody any more."""
        for kept in self._kept.values():
            if kept.timer is not None:
                kept.timer.cancel()
        for task in self._stopping:
            task.cancel()
        self._kept.clear()

    def _end(self, name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._stop(self._kept.pop(name).place, name))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)
