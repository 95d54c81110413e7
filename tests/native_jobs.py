"""Jobs that tests run in a worker, where llama.cpp may abort."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from localmix.native.model import Context, Model
from localmix.worker import Channel


def count_tokens(channel: Channel, path: Path, text: str) -> int:
    with Model(path) as model:
        return len(model.tokenize(text))


def truncate_while_mapped(channel: Channel, path: Path) -> None:
    with Model(path) as model, Context(model, context_length=256, threads=1) as context:
        os.truncate(path, 8192)
        context.decode(np.arange(20, 120), np.arange(100))


def open_context_in_little_memory(channel: Channel, path: Path, length: int) -> None:
    import resource

    with Model(path) as model:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + (512 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with Context(model, context_length=length):
            pass
