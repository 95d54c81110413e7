"""Quantizing a model while it comes, from a small hub on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from localmix import library, stream
from localmix.downloads import hub
from localmix.downloads.arrivals import WINDOW, arriving
from localmix.errors import CapacityError, InputError, NetworkError
from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.sources import remote
from localmix.sources.positional import ARRIVED
from localmix.sources.remote import find_remote
from tests.checkpoints import Shape, read_shard, write_checkpoint, write_shard
from tests.hub_server import Hub, point_to, serve

NAME = "org/fox"
SHARDS = 12
TYPES = ("Q4_K_M", "Q8_0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("hub") / "fox", Shape(hidden=256, feed_forward=256, layers=4, shards=SHARDS)
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("here")
    quantize(checkpoint, outputs(folder), threads=1)
    return digests(folder)


@pytest.fixture
def served(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as running:
        running.add(NAME, checkpoint)
        point_to(running.endpoint, monkeypatch)
        monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(hub, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(hub, "LONGEST_WAIT", 0.02)
        monkeypatch.setattr(remote, "_FIRST_BYTES", 4096)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def outputs(folder: Path, types: Sequence[str] = TYPES) -> list[tuple[object, Path]]:
    return [(load_presets().find(kind), folder / f"fox-{kind}.gguf") for kind in types]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.gguf")}


def run(folder: Path, name: str = NAME, *, keep: bool = False, **options: object) -> None:
    with arriving(find_remote(name, for_quantizing=True), folder, keep=keep) as coming:
        quantize(coming.path, outputs(folder), threads=1, arrivals=coming.arrivals, **options)


def shard_bytes(served: Hub) -> list[int]:
    return [len(content) for name, content in served.repositories[NAME].items() if name.startswith("model-")]


class Usage:
    """The most that a folder took on the disk, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.peak = 0

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            taken = 0
            for inside, _, names in os.walk(self._folder):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                        taken += os.lstat(os.path.join(inside, name)).st_blocks * 512
            self.peak = max(self.peak, taken)

    def __enter__(self) -> Usage:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_the_same_bytes_over_a_connection_that_drops(served: Hub, folder: Path, expected: dict[str, str]) -> None:
    for number in (2, 5, 9):
        served.drops[f"model-{number:05}-of-{SHARDS:05}.safetensors"] = [300_000]
    served.bytes_per_second = 20_000_000
    with Usage(folder) as usage:
        run(folder)
    assert digests(folder) == expected
    assert sorted(path.name for path in folder.iterdir()) == [f"fox-{kind}.gguf" for kind in sorted(TYPES)]
    written = sum(path.stat().st_size for path in folder.iterdir())
    shards = shard_bytes(served)
    heads = 8192 * SHARDS + 400_000  # and the tokenizer
    assert usage.peak <= written + sum(sorted(shards)[-WINDOW:]) + heads
    assert usage.peak > written + min(shards)  # it was looked at while shards were there
    assert served.bytes_of("") <= 1.02 * sum(map(len, served.repositories[NAME].values()))


class Stop(Exception):
    pass


def stopped_after(count: int, error: type[BaseException]) -> object:
    seen: list[int] = []

    def progress(done: int, total: int, label: str) -> None:
        if not label.startswith("fetching"):
            seen.append(done)
        if len(seen) == count:
            raise error

    return progress


def asked_for(served: Hub) -> set[str]:
    """Shards of which more than a head was sent."""
    return {name for name, count in served.sent.items() if name.startswith("model-") and count > 8192}


def test_a_stopped_run_goes_on_at_the_shard_it_was_in(served: Hub, folder: Path, expected: dict[str, str]) -> None:
    served.bytes_per_second = 20_000_000
    with pytest.raises(KeyboardInterrupt):
        run(folder, progress=stopped_after(60, KeyboardInterrupt))
    assert digests(folder) == {}
    first = asked_for(served)
    left = {path.name.strip(".").removesuffix(".part") for path in folder.rglob(f"*/{ARRIVED}/*safetensors*")}
    assert 0 < len(first) < SHARDS
    served.sent.clear()
    run(folder)
    assert digests(folder) == expected
    again = first & asked_for(served)
    assert again <= left
    assert len(again) <= WINDOW
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_lost_network_is_gone_on_from(
    served: Hub, folder: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    served.drops[f"model-00007-of-{SHARDS:05}.safetensors"] = [100_000]
    with pytest.raises(NetworkError, match="model-00007"):
        run(folder)
    first = asked_for(served)
    served.sent.clear()
    run(folder)
    assert digests(folder) == expected
    assert len(first & asked_for(served)) <= WINDOW


def test_a_commit_in_between_begins_again(served: Hub, folder: Path, checkpoint: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, progress=stopped_after(60, KeyboardInterrupt))
    name = f"model-00001-of-{SHARDS:05}.safetensors"
    content = bytearray(served.repositories[NAME][name])
    content[-1] ^= 1
    served.repositories[NAME][name] = bytes(content)
    served.repositories[NAME]["generation_config.json"] = b'{"temperature": 0.5}'
    served.repositories[NAME].pop("special_tokens_map.json", None)
    served.commit = "f" * 40
    run(folder)
    other = folder / "other" / "fox"
    other.mkdir(parents=True)
    for name, data in served.repositories[NAME].items():
        (other / name).write_bytes(data)
    quantize(other, outputs(folder / "other"), threads=1)
    assert digests(folder) == digests(folder / "other")


def test_a_damaged_shard_is_never_used(served: Hub, folder: Path) -> None:
    name = f"model-00004-of-{SHARDS:05}.safetensors"
    right = served.repositories[NAME][name]
    served.damage[name] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(NetworkError, match="wrong content"):
        run(folder)
    assert digests(folder) == {}


def test_a_bad_weight_leaves_nothing(served: Hub, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    name = f"model-00006-of-{SHARDS:05}.safetensors"
    shard = tmp_path / name
    shard.write_bytes(served.repositories[NAME][name])
    tensors = read_shard(shard)
    first = next(iter(tensors))
    dtype, values = tensors[first]
    values = values.copy()
    values.reshape(-1)[0] = 0x7F80
    tensors[first] = dtype, values
    write_shard(shard, tensors)
    served.repositories["org/bad"] = {**served.repositories[NAME], name: shard.read_bytes()}
    with pytest.raises(InputError, match="holds inf"):
        run(folder, "org/bad")
    assert list(folder.iterdir()) == []


def test_kept_shards_are_a_pulled_model(served: Hub, folder: Path, expected: dict[str, str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, keep=True, progress=stopped_after(60, KeyboardInterrupt))
    first = asked_for(served)
    served.sent.clear()
    run(folder, keep=True)
    assert digests(folder) == expected
    assert len(first & asked_for(served)) <= WINDOW
    checkpoint = library.resolve(NAME, library.Purpose.CHECKPOINT)
    assert checkpoint == library.pulled_folder("fox")
    for name, content in served.repositories[NAME].items():
        assert (checkpoint / name).read_bytes() == content
    served.asked.clear()
    quantize(checkpoint, outputs(folder), threads=1)
    assert digests(folder) == expected


def test_a_gguf_file_comes_too(served: Hub, folder: Path, random_model: Path) -> None:
    served.repositories["org/cat-GGUF"] = {"cat-BF16.gguf": random_model.read_bytes(), "cat-Q2_K.gguf": b"x" * 5000}
    run(folder, "org/cat-GGUF")
    found = digests(folder)
    quantize(random_model, outputs(folder), threads=1)
    assert digests(folder) == found


def test_room_for_two_shards_is_checked_first(served: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with arriving(find_remote(NAME), folder) as coming:
        ((_, two),) = coming.arrivals.staged
        assert two == sum(sorted(shard_bytes(served))[-WINDOW:])
    needed = 0

    def usage(path: object) -> object:
        return type("Usage", (), {"free": needed})()

    monkeypatch.setattr(shutil, "disk_usage", usage)
    needed = two
    with pytest.raises(CapacityError, match="with the shards on their way"):
        run(folder)
    assert list(folder.iterdir()) == []
    assert asked_for(served) == set()


def test_weights_from_three_files_at_once(served: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice that needs more files than the window has room for gets them all the same."""
    files_of = stream._files_of

    def wider(source: stream.Source, part: stream._Slice) -> frozenset[Path]:
        own = files_of(source, part)
        return own | frozenset(source.files()[:3]) if part.number % 50 == 0 else own

    monkeypatch.setattr(stream, "_files_of", wider)
    run(folder)
    assert set(digests(folder)) == {f"fox-{kind}.gguf" for kind in TYPES}
