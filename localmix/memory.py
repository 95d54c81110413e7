"""Memory before anything is loaded: what a model needs, what this machine has, and what would help.

The need is computed from metadata: weights as the plan or the file says, the KV cache by its formula, the
compute buffer by the two places where llama.cpp's graph is widest. The formulas give what llama.cpp 0.3.36
allocates to 1 MiB, on dense and mixture models from 512 to 131072 positions (tests/test_memory.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from localmix.errors import InputError, UsageError
from localmix.sources.base import Source

GIB = 2**30
MIB = 2**20

# bytes of one value in the KV cache
KV_TYPES = {"f16": 2.0, "bf16": 2.0, "f32": 4.0, "q8_0": 34 / 32, "q4_0": 18 / 32}

# positions to run and to measure with where nothing else is asked for
DEFAULT_CONTEXT = 4096

# A machine sold with 16 GB reports 15.3 to 15.8 GiB, the rest is the firmware's and the graphics'; the
# system itself takes about one more.
FLOOR_GB = 16
REPORTED_SHARE = 15.3 / 16
SYSTEM_BYTES = 1 * GIB

_INTERPRETER_BYTES = 170 * MIB  # both processes of a chat, with llama.cpp's libraries
_TOKEN_BYTES = 300  # one token in llama.cpp's vocabulary: text, score and two map entries
_KV_CELLS = 256  # llama.cpp rounds the context up to a multiple


@dataclass(frozen=True)
class Need:
    """Bytes that running a model takes.

    Attributes:
        weights: mapped from the file; the system can drop and read them again, so too many of them are slow.
        kv: the KV cache of the whole context.
        compute: buffers of the widest step of the graph.
        other: vocabulary and interpreter.
    """

    weights: int
    kv: int
    compute: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.compute + self.other


@dataclass(frozen=True)
class Available:
    """Bytes that can be taken without swapping, and what limits them, for a sentence."""

    bytes: int
    limit: str

    def fits(self, need: Need) -> bool:
        """Whether the need can be met."""
        return need.total <= self.bytes


def need(source: Source, weights: int, context: int, kv_type: str = "f16", batch: int = 512) -> Need:
    """What a model takes in memory.

    Args:
        source: for its metadata; weights are not read.
        weights: bytes of the weights, from the plan or the file.
        context: positions.
        kv_type: of both halves of the KV cache, one of `KV_TYPES`.
        batch: tokens in one step (llama.cpp's `n_ubatch`).
    """
    cells = -(-context // _KV_CELLS) * _KV_CELLS
    return Need(
        weights,
        int(cells * _kv_values(source) * KV_TYPES[kv_type]),
        _compute_bytes(source, cells, min(batch, cells)),
        _INTERPRETER_BYTES + _TOKEN_BYTES * _vocabulary(source),
    )


def largest_context(source: Source, weights: int, available: Available, kv_type: str = "f16") -> int:
    """The longest context that fits, in steps of 256 positions and no longer than the trained one; 0 if none does."""
    steps = trained_context(source) // _KV_CELLS
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        if available.fits(need(source, weights, middle * _KV_CELLS, kv_type)):
            low = middle
        else:
            high = middle - 1
    return low * _KV_CELLS


def trained_context(source: Source) -> int:
    """Positions the model was trained for; 4096 when it does not say."""
    return source.number("{arch}.context_length") or DEFAULT_CONTEXT


def _kv_values(source: Source) -> int:
    """Numbers that one position adds to the KV cache, over all layers."""
    heads = source.numbers("{arch}.attention.head_count", (1,))
    head_size = source.number("{arch}.embedding_length") // (heads[0] or 1)
    kv_heads = source.numbers("{arch}.attention.head_count_kv", heads)
    # one number for all layers, or one for each
    all_heads = sum(kv_heads) if len(kv_heads) > 1 else source.number("{arch}.block_count") * kv_heads[0]
    key = source.number("{arch}.attention.key_length", head_size)
    value = source.number("{arch}.attention.value_length", head_size)
    return all_heads * (key + value)


def _compute_bytes(source: Source, cells: int, batch: int) -> int:
    """The wider of the two wide places: the logits, or one layer's feed-forward with the attention mask."""
    hidden = source.number("{arch}.embedding_length")
    dense = max(source.numbers("{arch}.feed_forward_length"))
    experts = source.number("{arch}.expert_used_count")
    wide = source.number("{arch}.expert_feed_forward_length", dense) * experts if experts else dense
    logits = 4 * batch * (_vocabulary(source) + 2 * hidden)
    layer = 4 * batch * (3 * wide + 4 * hidden) + 2 * batch * cells
    return max(logits, layer)


def _vocabulary(source: Source) -> int:
    tokens = source.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise InputError(f"{source.path}: the metadata entry tokenizer.ggml.tokens is {tokens!r}, not a list.")
    return source.number("{arch}.vocab_size", len(tokens))


def available() -> Available:
    """What this process can take now: free and reclaimable memory, or what its cgroups leave. Swap never counts."""
    memory = psutil.virtual_memory()
    found = Available(memory.available, f"what is free of this machine's {memory.total / GIB:.1f} GiB")
    for headroom, name in _cgroup_headroom():
        if headroom < found.bytes:
            found = Available(headroom, name)
    return found


def machine(gigabytes: float) -> Available:
    """What a machine sold with so much memory has for a model."""
    usable = int(gigabytes * REPORTED_SHARE * GIB - SYSTEM_BYTES)
    return Available(max(0, usable), f"a machine with {gigabytes:g} GB")


def parse_gigabytes(text: str) -> float:
    """`16`, `16G`, `16GB` or `12.5 GiB` as a number.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UsageError(f"{text!r} is no size of memory.", "Write gigabytes, such as 16 or 32GB.")
    return float(match[1])


def _cgroup_headroom(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, str]]:
    """(bytes, name) of every memory limit on the way from this process's cgroup to the root, v1 and v2.

    Headroom is limit − (used − file cache): the cache is given back when it is needed.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        mounts: tuple[Path, ...]
        if controllers == "":
            mounts, files = (root, root / "unified"), ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mounts, files = (root / "memory",), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        parts = [part for part in name.split("/") if part not in ("", "..")]
        for mount in mounts:
            # In a container the mount begins at our own group and the path does not exist below it.
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                headroom = _headroom(folder, *files)
                if headroom is not None:
                    found.append((headroom, f"the memory limit of cgroup /{'/'.join(parts[:depth])}"))
    return found


def _headroom(folder: Path, limit_file: str, usage_file: str, prefix: str) -> int | None:
    try:
        limit = int((folder / limit_file).read_text())  # "max" is no number
        used = int((folder / usage_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit >= 2**60:  # v1's way of saying that there is none
        return None
    cache = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, limit - max(0, used - cache))
