"""Have llama.cpp itself say what a context takes, with its `no_alloc`: no weight is read and nothing is allocated.

It needs the model's hyper-parameters and the shapes of its tensors, so it runs on a skeleton: a GGUF file of that
head, without a vocabulary, over a hole in place of the weights. A context takes about 10 ms, in a child process.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.errors import InputError
from localmix.gguf_format import encode_header, layout
from localmix.sizes import MIB
from localmix.sources.base import Source, text, u32
from localmix.tensor_types import TensorType

if TYPE_CHECKING:
    from localmix.native.devices import Placement
    from localmix.worker import Channel


# llama_kv_cache: layer  12: dev = CPU
_LAYER = re.compile(r"layer +(\d+): dev = ")
# llama_kv_cache: size =  512.00 MiB (  4096 cells,  32 layers,  1/1 seqs), K (f16):  256.00 MiB, V (f16): …
_CACHE = re.compile(r"^llama_\w+: size = +([\d.]+) MiB ")
# sched_reserve:      CUDA0 compute buffer size =   204.01 MiB
_COMPUTE = re.compile(r" (\S+) compute buffer size = +([\d.]+) MiB")
# llama_context:        CPU  output buffer size =     0.12 MiB
_OUTPUT = re.compile(r"output buffer size = +([\d.]+) MiB")


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        context: positions of the KV cache, over all sequences.
        kv_type: of both halves of the cache, a ggml type's name in small letters.
        batch: tokens that are computed at once (llama.cpp's `n_ubatch`).
        sequences: texts that share the cache.
        outputs: most tokens of a batch whose logits are asked for.
    """

    context: int
    kv_type: str = "f16"
    batch: int = 512
    sequences: int = 1
    outputs: int = 1


@dataclass(frozen=True)
class Buffers:
    """Bytes of what llama.cpp allocates besides the weights.

    Attributes:
        layers: the KV cache (or the recurrent state), by layer.
        compute: by device or buffer, such as `CPU`, `CUDA0`, `CUDA_Host`.
        output: logits.
    """

    layers: dict[int, int] = field(default_factory=dict)
    compute: dict[str, int] = field(default_factory=dict)
    output: int = 0

    @property
    def kv(self) -> int:
        """All of the KV cache."""
        return sum(self.layers.values())


def simulate(channel: Channel, path: Path, settings: Sequence[Setting], placement: Placement) -> list[Buffers]:
    """The child's job: what each setting takes.

    Args:
        path: a model or a `skeleton`.

    Raises:
        InputError: llama.cpp refuses the model or a setting, or does not say what it takes.
    """
    from localmix.native import library
    from localmix.native.devices import buffer_owners
    from localmix.native.model import Context, Model

    found = []
    with Model(path, placement=placement, simulate=True) as model:
        owners = buffer_owners()
        for setting in settings:
            channel.check()
            kind = TensorType[setting.kv_type.upper()]
            with (
                library.log.capture() as lines,
                Context(
                    model,
                    context_length=setting.context,
                    batch=setting.batch,  # else the default would be the most of micro_batch
                    micro_batch=setting.batch,
                    sequences=setting.sequences,
                    outputs=max(setting.outputs, setting.sequences),  # fewer abort llama.cpp
                    type_k=kind,
                    type_v=kind,
                    threads=1,
                ),
            ):
                buffers = _parse(lines)
                compute = {owners.get(name, name): size for name, size in buffers.compute.items()}
                found.append(replace(buffers, compute=compute))
    return found


@contextmanager
def skeleton(source: Source) -> Iterator[Path]:
    """A file for `simulate`, as long as the model but with no more than its head on the disk.

    Raises:
        OSError: there is no room for it, on a file system without holes.
    """
    metadata = {key: value for key, value in source.metadata.items() if not key.startswith("tokenizer.")}
    metadata["tokenizer.ggml.model"] = text("no_vocab")
    key = f"{source.architecture}.vocab_size"
    if key not in metadata:
        metadata[key] = u32(len(source.get("tokenizer.ggml.tokens", [])))
    head = encode_header(metadata, source.tensors)
    with tempfile.TemporaryDirectory(prefix="localmix-skeleton-") as folder:
        path = Path(folder) / "skeleton.gguf"
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + layout(source.tensors)[1])
        yield path


def _parse(lines: Iterable[str]) -> Buffers:
    buffers = Buffers()
    output = 0.0
    members: list[int] = []  # layers of the cache whose size comes next
    cached = False
    for line in lines:
        if found := _LAYER.search(line):
            members.append(int(found[1]))
        elif found := _CACHE.search(line):
            cached = True
            for layer in members or [0]:
                share = int(float(found[1]) * MIB / max(1, len(members)))
                buffers.layers[layer] = buffers.layers.get(layer, 0) + share
            members = []
        elif found := _COMPUTE.search(line):
            buffers.compute[found[1]] = int(float(found[2]) * MIB)
        elif found := _OUTPUT.search(line):
            output += float(found[1])
    if not cached or not buffers.compute:
        raise InputError("llama.cpp did not say what a context takes.")
    return Buffers(buffers.layers, buffers.compute, int(output * MIB))
