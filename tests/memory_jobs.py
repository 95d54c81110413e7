"""Job of test_memory: what llama.cpp itself says a context takes, without loading weights."""

from __future__ import annotations

import re
from pathlib import Path

from localmix.native import library
from localmix.native.devices import PROCESSOR
from localmix.native.model import Context, Model
from localmix.worker import Channel


def measure(channel: Channel, path: Path, context_length: int) -> tuple[float, float]:
    """MiB of the KV cache and of the compute buffer."""
    with (
        Model(path, placement=PROCESSOR, simulate=True) as model,
        library.log.capture() as lines,
        Context(model, context_length=context_length),
    ):
        text = "\n".join(lines)
    cache = sum(map(float, re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", text)))
    compute = sum(map(float, re.findall(r"compute buffer size = +([\d.]+) MiB", text)))
    return cache, compute
