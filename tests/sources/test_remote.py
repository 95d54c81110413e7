"""Models of a small hub on this machine, planned from the heads of their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from localmix.downloads import hub
from localmix.errors import InputError, NetworkError, UsageError
from localmix.plan import Planner
from localmix.presets import load_presets
from localmix.sources import remote
from localmix.sources.open import open_source
from localmix.sources.positional import ARRIVED, NotHere, PositionalFile, identity, note_reads, write_stand_in
from localmix.sources.remote import find_remote, heads
from tests.checkpoints import Shape, write_checkpoint
from tests.hub_server import Hub, point_to, serve

NAME = "org/fox"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "fox", Shape(shards=3))


@pytest.fixture
def served(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as running:
        running.add(NAME, checkpoint)
        point_to(running.endpoint, monkeypatch)
        monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(hub, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(remote, "_FIRST_BYTES", 1024)
        yield running


def same_plan(path: Path, other: Path) -> bool:
    with open_source(path) as one, open_source(other) as two:
        return all(
            Planner(one).plan(load_presets().find(kind)) == Planner(two).plan(load_presets().find(kind))
            for kind in ("BF16", "Q4_K_M", "Q8_0")
        )


def test_the_plan_is_that_of_the_checkpoint(served: Hub, checkpoint: Path) -> None:
    with heads(find_remote(NAME)) as found:
        assert same_plan(found.path, checkpoint)
        assert found.bytes >= sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        with open_source(found.path) as source, pytest.raises(NotHere, match=r"Only the head .* was fetched"):
            source.read(source.tensors[0], 0, 1)
        folder = found.path
    assert not folder.exists()
    # header and what was asked for before its length was known
    for shard in checkpoint.glob("*.safetensors"):
        length = int.from_bytes(shard.read_bytes()[:8], "little") + 8
        assert served.sent[shard.name] <= max(2 * length, 1024)


def test_dropped_connections_and_a_server_without_ranges(served: Hub, checkpoint: Path) -> None:
    served.drops["model-00002-of-00003.safetensors"] = [100, 200, 300]
    with heads(find_remote(NAME)) as found:
        assert same_plan(found.path, checkpoint)
    served.with_ranges = False
    with heads(find_remote(NAME)) as found:
        assert same_plan(found.path, checkpoint)


def test_a_gguf_file_is_planned_from_its_head(served: Hub, random_model: Path) -> None:
    content = random_model.read_bytes()
    served.repositories["org/cat-GGUF"] = {"cat-BF16.gguf": content, "cat-Q4_0.gguf": content}
    with heads(find_remote("org/cat-GGUF:BF16")) as found:
        assert same_plan(found.path, random_model)
    with pytest.raises(UsageError, match="several GGUF files"), heads(find_remote("org/cat-GGUF")):
        pass
    with heads(find_remote("org/cat-GGUF", for_quantizing=True)) as found:
        assert found.path.name == "cat-BF16.gguf"


def test_broken_heads_are_told_by_what_opens_them(served: Hub) -> None:
    for content in (b"\xff" * 20_000, (1 << 40).to_bytes(8, "little") + bytes(20_000), b"\x10" + bytes(9000)):
        served.repositories["org/bad"] = {**served.repositories[NAME]}
        served.repositories["org/bad"]["model-00001-of-00003.safetensors"] = content
        with (
            heads(find_remote("org/bad")) as found,
            pytest.raises(InputError, match=r"model-00001.*: the header|not credible"),
        ):
            open_source(found.path)


def test_a_name_that_is_nowhere(served: Hub) -> None:
    with (
        pytest.raises(NetworkError, match=r"There is no file or folder org/none here\. The hub has no model"),
        heads(find_remote("org/none")),
    ):
        pass


def test_a_small_file_that_is_all_head_is_checked(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_BYTES", 1 << 20)
    name = "model-00002-of-00003.safetensors"
    content = served.repositories[NAME][name]
    served.damage[name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(NetworkError, match="came with the wrong content"), heads(find_remote(NAME)):
        pass


def test_a_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = bytes(range(200))
    write_stand_in(path, 200, "x at 1", content[:50])
    file = PositionalFile(path)
    assert (file.size, identity(path)) == (200, "x at 1")
    assert file.read(10, 40) == content[10:50]
    with pytest.raises(NotHere) as caught:
        file.read(40, 20)
    assert (caught.value.path, caught.value.stop) == (path, 60)
    with note_reads() as noted:
        file.read(0, 50)
        assert noted == set()
        assert file.read(40, 20) == bytes(20)
    assert noted == {path}
    (tmp_path / ARRIVED).mkdir()
    whole = tmp_path / ARRIVED / path.name
    whole.write_bytes(content)
    assert file.read(40, 160) == content[40:]
    with pytest.raises(InputError, match="ends at byte 200"):
        file.read(40, 161)
    whole.unlink()
    with pytest.raises(NotHere):
        file.read(40, 20)
    file.check_unchanged()
    file.close()


@pytest.mark.parametrize("told", [b"", b"{", b"[1]", b'{"size": "x"}\n', b'{"size": 5}\n', b'{"size": 1}' * 500])
def test_what_only_looks_like_a_stand_in_is_an_ordinary_file(told: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"localmix stand-in\n" + told)
    file = PositionalFile(path)
    assert file.size == path.stat().st_size
    file.close()


def test_two_files_of_one_type_are_not_mixed(served: Hub) -> None:
    served.repositories["org/cat"] = {"mmproj-cat-F16.gguf": b"a", "cat-F16.gguf": b"b"}
    with pytest.raises(UsageError, match=r"several GGUF files of type F16: 'cat-F16\.gguf', 'mmproj-") as caught:
        find_remote("org/cat", for_quantizing=True)
    assert "--include 'cat-F16.gguf'" in caught.value.hint
    served.repositories["org/cat"] = {f"cat-F16-0000{number}-of-00002.gguf": b"a" for number in (1, 2)}
    assert len(find_remote("org/cat:F16").weights) == 2
