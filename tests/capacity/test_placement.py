"""The split of a model over GPUs: arithmetic, checked against every other split that could have been chosen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from localmix.capacity.placement import RESERVE_BYTES as RESERVE
from localmix.capacity.placement import Layer, Split, Weights, split, weigh
from localmix.native.devices import PROCESSOR, Device, Placement
from localmix.sources.base import TensorInfo
from localmix.tensor_types import TensorType

GIB = 2**30


def gpu(name: str, free: int) -> Device:
    """A GPU with so much free for a model, beside what is kept."""
    return Device(name, "a GPU", "gpu", free + RESERVE, 2 * (free + RESERVE))


def dense(layers: int, size: int = 100, output: int = 50) -> Weights:
    return Weights((Layer(0, size),) * layers, output, 30, ())


def mixture(layers: int, experts: int = 90, rest: int = 10, output: int = 50) -> Weights:
    return Weights((Layer(experts, rest),) * layers, output, 30, ())


def place(weights: Weights, *free: int, kv: int = 5, compute: int = 7, **wish: object) -> Split:
    devices = [gpu(f"CUDA{number}", size) for number, size in enumerate(free)]
    buffers = {device.name: compute for device in devices}
    return split(weights, [kv] * len(weights.layers), buffers, devices, **wish)  # type: ignore[arg-type]


def test_a_model_that_fits_lies_on_the_gpu_whole() -> None:
    found = place(dense(4), 4 * 105 + 50 + 7)
    assert found == Split(Placement(5), 450, 20, {"CUDA0": 477})


def test_a_byte_less_and_a_layer_stays() -> None:
    found = place(dense(4), 4 * 105 + 50 + 6)
    assert found.placement == Placement(4)
    assert found.weights == 350 and found.kv == 15 and found.devices == {"CUDA0": 372}


def test_the_output_layer_is_the_first_to_go_there() -> None:
    assert place(dense(4), 57).placement == Placement(1)
    assert place(dense(4), 56) == Split(PROCESSOR)


def test_experts_stay_first() -> None:
    # all layers without any experts take 4 * 15 + 50 + 7 = 117; each layer's experts 90 more
    assert place(mixture(4), 117 + 4 * 90).placement == Placement(5, 0)
    assert place(mixture(4), 117 + 4 * 90 - 1).placement == Placement(5, 1)
    assert place(mixture(4), 117 + 90).placement == Placement(5, 3)
    assert place(mixture(4), 117).placement == Placement(5, 4)
    assert place(mixture(4), 116).placement == Placement(4, 4)


def test_layers_whose_experts_stay_are_the_first() -> None:
    sizes = [10, 20, 30, 40]
    weights = Weights(tuple(Layer(size, 1) for size in sizes), 0, 0, ())
    found = split(weights, [0] * 4, {}, [gpu("CUDA0", 4 + 70)])
    assert found.placement == Placement(5, 2) and found.weights == 74


def test_the_user_may_say_where_experts_lie() -> None:
    plenty = 10_000
    assert place(mixture(4), plenty, experts="cpu").placement == Placement(5, 4)
    assert place(mixture(4), 117 + 90, experts="gpu").placement == Placement(2, 0)
    assert place(dense(4), plenty, experts="cpu").placement == Placement(5, 0)


def test_the_user_may_say_how_many_layers() -> None:
    assert place(dense(4), 10_000, gpu_layers=2).placement == Placement(2)
    assert place(dense(4), 10_000, gpu_layers=99).placement == Placement(5)
    assert place(dense(4), 10_000, gpu_layers=0) == Split(PROCESSOR)
    tight = place(dense(4), 100, gpu_layers=3)
    assert tight.placement == Placement(3) and not tight.fits and tight.devices == {"CUDA0": 50 + 2 * 105 + 7}
    assert place(mixture(4), 117, gpu_layers=5).placement == Placement(5, 4)
    assert not place(mixture(4), 116, gpu_layers=5).fits


def test_memory_that_a_driver_does_not_tell_is_not_judged() -> None:
    silent = Device("Vulkan0", "", "gpu", 0, 0)
    found = split(dense(4), [5] * 4, {"Vulkan0": 7}, [silent], gpu_layers=5)
    assert found.fits and found.placement == Placement(5)


def test_chosen_devices_are_named() -> None:
    devices = [gpu("CUDA0", 1000), gpu("CUDA1", 1000)]
    found = split(dense(2), [0, 0], {}, devices, named=True)
    assert found.placement == Placement(3, 0, ("CUDA0", "CUDA1"))


def test_several_gpus_take_rows_of_layers_in_proportion_to_their_memory() -> None:
    devices = [gpu("CUDA0", 3 * GIB - RESERVE), gpu("CUDA1", GIB - RESERVE)]
    found = split(dense(7, size=1, output=100), [0] * 7, {}, devices)
    # eight layers: three quarters of them on the first, and the output at the end of the second
    assert found.devices == {"CUDA0": 6, "CUDA1": 101}


def test_each_gpu_must_hold_its_part() -> None:
    # the output layer is larger than what is free on the second of two equal GPUs
    weights = dense(3, size=10, output=500)
    assert place(weights, 400, 400) == Split(PROCESSOR)
    assert place(weights, 400, 400, gpu_layers=4).overfull == ("CUDA1",)


@pytest.mark.parametrize("seed", range(30))
def test_no_split_that_fits_is_better(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(1, 6)
    weights = Weights(
        tuple(Layer(chance.choice([0, 80, 90]), chance.randint(5, 30)) for _ in range(count)),
        chance.randint(1, 60),
        20,
        (),
    )
    kv = [chance.randint(0, 20) for _ in range(count)]
    devices = [gpu(f"CUDA{number}", chance.randint(50, 500)) for number in range(chance.randint(1, 3))]
    compute = {device.name: chance.randint(0, 20) for device in devices}
    fitting = [
        (layers, -kept)
        for layers, kept in itertools.product(range(count + 2), range(count + 1))
        if fits(weights, kv, compute, devices, layers, kept)
    ]
    layers, _ = max(fitting)
    found = split(weights, kv, compute, devices)
    assert found.fits and found.placement.gpu_layers == layers
    if layers:
        # more experts may be said to stay than have layers on a GPU: it is the same split
        least = next(number for number in range(count + 1) if (layers, -number) in fitting)
        assert found.placement.cpu_expert_layers == (least if weights.is_mixture else 0)


def fits(
    weights: Weights, kv: Sequence[int], compute: dict[str, int], devices: Sequence[Device], layers: int, kept: int
) -> bool:
    """Another way to the bytes: layer for layer from the front, as `load_tensors` goes."""
    if layers == 0:
        return True
    total = sum(device.free for device in devices)
    bounds = [bound / total for bound in itertools.accumulate(device.free for device in devices)]
    used = dict(compute)
    start = len(weights.layers) + 1 - layers
    for index in range(len(weights.layers) + 1):
        if index < start:
            continue
        place_in_row = (index - start) / layers
        device = devices[sum(bound <= place_in_row for bound in bounds)]
        if index == len(weights.layers):
            used[device.name] += weights.output
        else:
            layer = weights.layers[index]
            used[device.name] += layer.rest + kv[index] + (0 if index < kept else layer.experts)
    return all(used[device.name] + RESERVE <= device.free for device in devices)


def tensor(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, shape, TensorType.F16)


def test_tensors_are_weighed_by_where_they_can_lie() -> None:
    found = weigh(
        [
            tensor("token_embd.weight", 10, 4),
            tensor("blk.0.attn_q.weight", 4, 4),
            tensor("blk.1.attn_q.weight", 4, 4),
            tensor("blk.1.ffn_up_exps.weight", 2, 8, 4),
            tensor("blk.1.ffn_gate_inp.weight", 2, 4),
            tensor("blk.1.ffn_up_shexp.weight", 8, 4),
            tensor("output_norm.weight", 4),
            tensor("output.weight", 10, 4),
        ]
    )
    assert found.layers == (Layer(0, 32), Layer(128, 32 + 16 + 64))
    assert found.output == 88 and found.input == 80
    assert found.total == 80 + 32 + 240 + 88 and found.is_mixture


def test_a_tied_embedding_is_the_output_layer() -> None:
    found = weigh([tensor("token_embd.weight", 10, 4), tensor("blk.0.attn_q.weight", 4, 4)])
    assert found.output == 80 and found.input == 0 and found.total == 112 and not found.is_mixture


def spread(weights: Weights, *free: int, kv: int = 5, compute: int = 7, **wish: object) -> Split:
    """As `place`, on workers."""
    devices = [
        Device(f"RPC{number}", f"10.0.0.{number}:1", "remote", size + RESERVE, size + RESERVE, f"127.0.0.1:{number}")
        for number, size in enumerate(free)
    ]
    buffers = {device.name: compute for device in devices}
    return split(weights, [kv] * len(weights.layers), buffers, devices, named=True, **wish)  # type: ignore[arg-type]


def test_layers_of_other_machines_are_counted_by_what_is_left_for_them() -> None:
    found = spread(dense(9), 600 + 7, 300 + 7)
    # of 8 layers two thirds would be 6, for which the first has no room
    assert found.placement.layer_counts == (5, 3) and found.placement.gpu_layers == 8
    assert found.placement.devices == ("RPC0", "RPC1")
    assert found.placement.servers == ("127.0.0.1:0", "127.0.0.1:1")
    assert found.fits and found.devices == {"RPC0": 7 + 5 * 105, "RPC1": 7 + 2 * 105 + 50}


def test_a_worker_without_room_gets_nothing_and_is_in_nobodys_way() -> None:
    found = spread(dense(4), 0, 10000, -RESERVE)
    assert found.placement.layer_counts == (0, 5, 0) and found.fits
    assert spread(dense(4), 0, 3).placement == PROCESSOR
    assert spread(dense(4), 0, 3, gpu_layers=2).overfull


def test_the_largest_tensor_needs_room_twice_on_the_way() -> None:
    tensors = (
        TensorInfo("blk.0.ffn_down.weight", (256, 256), TensorType.F32),
        TensorInfo("blk.0.attn_q.weight", (256, 16), TensorType.F32),
        TensorInfo("output.weight", (16, 256), TensorType.F32),
        TensorInfo("token_embd.weight", (9999, 256), TensorType.F32),
    )
    weights = weigh(tensors)
    whole = 256 * 256 * 4 + 2 * 256 * 16 * 4 + 5 + 7
    assert weights.largest == 256 * 256 * 4
    assert spread(weights, whole + weights.largest).placement.layer_counts == (2,)
    assert spread(weights, whole + weights.largest - 1).placement.layer_counts == (1,)


def test_experts_are_not_parted_from_their_layer_by_a_network() -> None:
    assert spread(mixture(4), 117 + 90).placement.cpu_expert_layers == 0
    assert spread(mixture(4), 117 + 90, experts="cpu").placement.cpu_expert_layers == 4
