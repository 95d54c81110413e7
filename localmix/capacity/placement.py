"""Which layers and experts of a model a GPU has room for: arithmetic over their bytes, the same for every vendor.

A device of another machine counts as a GPU here, as it does for llama.cpp.

llama.cpp places whole layers: with N layers on the GPU the output layer comes first, then the last N - 1 blocks.
Of several GPUs each takes a row of layers, in proportion to its free memory (`load_tensors` in llama-model.cpp).
In a mixture model the experts are most of the bytes and few of them work on a token, so they are what stays in
the processor's memory first, layer by layer from the first one on, while attention and the KV cache are on the GPU.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from localmix.gguf_format import tensor_bytes
from localmix.native.devices import PROCESSOR, Device, Placement
from localmix.sources.base import TensorInfo

_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps")  # as llama.cpp's --n-cpu-moe

# Of each device's free memory this much is left: for its driver, a display, and what the graph's splits add.
RESERVE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Layer:
    """Bytes of one block.

    Attributes:
        experts: weights of the experts that a router chooses among.
        rest: all other weights.
    """

    experts: int
    rest: int


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, by where they can lie.

    Attributes:
        layers: the blocks.
        output: what turns the last state into logits.
        input: the token embedding; never on a GPU.
        tensors: what the bytes were counted from.
    """

    layers: tuple[Layer, ...]
    output: int
    input: int
    tensors: tuple[TensorInfo, ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(layer.experts + layer.rest for layer in self.layers) + self.output + self.input

    @property
    def largest(self) -> int:
        """The largest tensor of the layers."""
        sizes = (tensor_bytes(tensor) for tensor in self.tensors if not tensor.name.startswith("token_embd"))
        return max(sizes, default=0)

    @property
    def is_mixture(self) -> bool:
        """Whether there are experts."""
        return any(layer.experts for layer in self.layers)


def weigh(tensors: Iterable[TensorInfo]) -> Weights:
    """Count the bytes of a model's tensors, with the types that they will have."""
    found = tuple(tensors)
    experts: dict[int, int] = {}
    rest: dict[int, int] = {}
    output = embedding = 0
    for tensor in found:
        size = tensor_bytes(tensor)
        block = _BLOCK.match(tensor.name)
        if block:
            where = experts if _EXPERTS.search(tensor.name) else rest
            where[int(block[1])] = where.get(int(block[1]), 0) + size
        elif tensor.name.startswith("output"):
            output += size
        else:
            embedding += size
    if not any(tensor.name == "output.weight" for tensor in found):
        # tied to the embedding, which a GPU then holds a second time
        output += sum(tensor_bytes(tensor) for tensor in found if tensor.name == "token_embd.weight")
        embedding -= sum(tensor_bytes(tensor) for tensor in found if tensor.name == "token_embd.weight")
    blocks = range(max((*experts, *rest), default=-1) + 1)
    layers = tuple(Layer(experts.get(block, 0), rest.get(block, 0)) for block in blocks)
    return Weights(layers, output, embedding, found)


@dataclass(frozen=True)
class Split:
    """A placement, and what it takes.

    Attributes:
        weights, kv: bytes that lie on GPUs.
        devices: bytes on each device, its compute buffer included.
        overfull: the devices of known memory that have no room for their part.
    """

    placement: Placement
    weights: int = 0
    kv: int = 0
    devices: Mapping[str, int] = field(default_factory=dict)
    overfull: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether each device has room for its part."""
        return not self.overfull


def split(
    weights: Weights,
    kv: Sequence[int],
    compute: Mapping[str, int],
    devices: Sequence[Device],
    *,
    gpu_layers: int | None = None,
    experts: str = "auto",
    named: bool = False,
) -> Split:
    """Put as much of a model on the GPUs as their free memory has room for.

    Args:
        kv: bytes of the KV cache, by layer.
        compute: bytes of the compute buffers, by device.
        devices: the GPUs to use, in llama.cpp's order.
        gpu_layers: so many layers, the output layer counted, whether they fit or not; None for as many as fit.
        experts: `cpu` keeps all of them off the GPUs, `gpu` none, `auto` as many as have to be; with devices of other
            machines `auto` keeps none.
        named: put the devices' names into the placement, so that llama.cpp uses these only; with devices of other
            machines it has to be.

    Returns:
        Of what fits, the most layers on the GPUs, and with those the most experts. Without `gpu_layers`, nothing
        on a GPU where not even the output layer fits.
    """
    names = tuple(device.name for device in devices) if named else ()
    servers = tuple(dict.fromkeys(device.server for device in devices if device.server))
    # a layer whose experts are on another machine than the rest of it goes over the network twice more
    keeping = experts == "cpu" or (experts == "auto" and not servers)
    most_kept = len(weights.layers) if weights.is_mixture and keeping else 0
    least_kept = most_kept if experts == "cpu" else 0

    def attempt(layers: int, kept: int) -> Split:
        placement = Placement(layers, kept, names, servers) if layers else PROCESSOR
        return _load(weights, kv, compute, devices, placement)

    everything = len(weights.layers) + 1
    if gpu_layers is None:
        layers = next(count for count in range(everything, -1, -1) if attempt(count, most_kept).fits)
    else:
        layers = min(gpu_layers, everything)
    attempts = (attempt(layers, kept) for kept in range(least_kept, most_kept + 1))
    return next((found for found in attempts if found.fits), attempt(layers, most_kept))


def _load(
    weights: Weights, kv: Sequence[int], compute: Mapping[str, int], devices: Sequence[Device], placement: Placement
) -> Split:
    """What a placement puts on each device."""
    count = placement.gpu_layers or 0
    if not count:
        return Split(placement)
    # another machine receives a tensor as a whole before it puts it in its place
    used = {device.name: compute.get(device.name, 0) + (weights.largest if device.server else 0) for device in devices}
    # a device that does not say counts for llama.cpp as if it had the machine's memory; equal parts come near it
    parts = [device.free or 1 for device in devices]
    if placement.servers:  # llama.cpp is told how many layers each has, so what they cannot be used for counts too
        usable = [max(0, device.free - RESERVE_BYTES - used[device.name]) for device in devices]
        parts = usable if any(usable) else parts
    shares = list(accumulate(parts))
    counts = [0] * len(devices)
    on_devices = cached = 0
    first = len(weights.layers) + 1 - count
    last = 0
    for number in range(count):
        block = first + number
        if block == len(weights.layers):
            size, cache = weights.output, 0
        else:
            layer = weights.layers[block]
            size, cache = layer.rest + (layer.experts if block >= placement.cpu_expert_layers else 0), kv[block]
        place = bisect_right(shares, number / count * shares[-1])
        if placement.servers:  # what has no room on one goes to the next
            last = max(last, place)
            while last < len(devices) - 1 and not _has_room(devices[last], used[devices[last].name] + size + cache):
                last += 1
            place = last
        used[devices[place].name] += size + cache
        counts[place] += 1
        on_devices += size
        cached += cache
    if placement.servers:
        placement = replace(placement, layer_counts=tuple(counts))
        used = {name: size if counts[place] else 0 for place, (name, size) in enumerate(used.items())}
    overfull = (device.name for device in devices if used[device.name] and not _has_room(device, used[device.name]))
    return Split(placement, on_devices, cached, used, tuple(overfull))


def _has_room(device: Device, size: int) -> bool:
    return not device.total or size + RESERVE_BYTES <= device.free
