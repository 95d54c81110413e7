"""Models from a small hub on this machine into a library."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmix import library
from localmix.downloads import download, hub
from localmix.downloads.pull import PulledModel, pull
from localmix.errors import CapacityError, FileError, InputError, NetworkError, UsageError
from localmix.sources.open import open_source
from tests.checkpoints import Shape, write_checkpoint
from tests.hub_server import Hub, Refusal, point_to, serve

NAME = "org/fox"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "fox"
    write_checkpoint(folder, Shape(shards=3))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "consolidated.safetensors").write_bytes(b"a second copy")
    return folder


@pytest.fixture
def served(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as running:
        running.add(NAME, checkpoint)
        point_to(running.endpoint, monkeypatch)
        monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(hub, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(hub, "LONGEST_WAIT", 0.02)
        yield running


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check(pulled: PulledModel, served: Hub) -> None:
    for file in pulled.files:
        content = served.repositories[pulled.repository][file.name]
        assert file.path.read_bytes() == content
        assert (file.bytes, file.sha256) == (len(content), digest(content))
    leftovers = [path.name for path in library.home().rglob("*") if ".part" in path.name]
    assert leftovers == []


def test_a_checkpoint_comes_into_the_library(served: Hub) -> None:
    seen: list[tuple[int, int, str]] = []
    pulled = pull(NAME, progress=lambda *step: seen.append(step))
    check(pulled, served)
    assert pulled.path == library.home() / "fox" / "fox"
    names = {file.name for file in pulled.files}
    assert {SHARD, "config.json", "tokenizer.model"} <= names
    assert not names & {"pytorch_model.bin", ".gitattributes", "consolidated.safetensors"}
    assert seen[-1][:2] == (pulled.bytes, pulled.bytes)
    assert library.resolve("fox", library.Purpose.SOURCE) == pulled.path
    assert library.resolve(NAME, library.Purpose.SOURCE) == pulled.path
    assert library.resolve(None, library.Purpose.SOURCE) == pulled.path
    with open_source(pulled.path) as source:
        assert source.get("general.name") == "fox"


def test_again_nothing_is_fetched(served: Hub) -> None:
    pull(NAME)
    served.asked.clear()
    again = pull(NAME)
    assert not any(file.fetched for file in again.files)
    assert served.paths("resolve") == []
    # without the record the files are hashed instead
    (again.path / ".hub.json").unlink()
    assert not any(file.fetched for file in pull(NAME).files)
    assert served.paths("resolve") == []


def test_what_was_changed_here_or_there_is_fetched_again(served: Hub) -> None:
    pulled = pull(NAME)
    shard = pulled.path / SHARD
    shard.write_bytes(bytes(len(shard.read_bytes())))
    served.repositories[NAME]["config.json"] = served.repositories[NAME]["config.json"] + b"\n"
    again = pull(NAME)
    check(again, served)
    assert {file.name for file in again.files if file.fetched} == {SHARD, "config.json"}


def test_what_the_repository_no_longer_has_goes(served: Hub) -> None:
    served.repositories[NAME]["chat_template.jinja"] = b"{{ messages }}"
    served.repositories[NAME]["vocab.txt"] = b"a word"
    pulled = pull(NAME)
    (pulled.path / "vocab.txt").write_text("mine now")
    mine = pulled.path / "notes.txt"
    mine.write_text("mine")
    del served.repositories[NAME]["chat_template.jinja"], served.repositories[NAME]["vocab.txt"]
    pull(NAME)
    assert not (pulled.path / "chat_template.jinja").exists()
    assert mine.exists()
    assert (pulled.path / "vocab.txt").exists()


def test_dropped_connections_lose_nothing(served: Hub) -> None:
    size = len(served.repositories[NAME][SHARD])
    served.drops[SHARD] = [size // 4, size // 4, size // 3]
    check(pull(NAME), served)
    assert served.sent[SHARD] == size
    assert [wanted for _, path, wanted in served.asked if path.endswith(SHARD) and wanted]


def test_without_ranges_a_file_begins_again(served: Hub) -> None:
    served.with_ranges = False
    served.drops[SHARD] = [5000]
    check(pull(NAME), served)


def stopped_at(served: Hub, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends when `count` bytes of a shard have come."""
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    served.drops[SHARD] = [count]
    with pytest.raises(NetworkError, match="does not come, after 1 tries") as caught:
        pull(NAME)
    assert "goes on" in caught.value.hint
    monkeypatch.setattr(hub, "ATTEMPTS", 8)
    served.sent.clear()


def test_another_run_goes_on(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(served, 60_000, monkeypatch)
    assert not (library.home() / "fox" / "fox" / SHARD).exists()
    check(pull(NAME), served)
    assert served.sent[SHARD] == len(served.repositories[NAME][SHARD]) - 60_000


def test_a_file_that_changed_between_two_runs_begins_again(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(served, 60_000, monkeypatch)
    content = bytearray(served.repositories[NAME][SHARD])
    content[-1] ^= 1
    served.repositories[NAME][SHARD] = bytes(content)
    check(pull(NAME), served)
    assert served.sent[SHARD] == len(content)


def test_another_etag_of_the_same_file_begins_again(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(served, 60_000, monkeypatch)
    served.etags[SHARD] = '"another"'
    check(pull(NAME), served)
    assert served.sent[SHARD] == len(served.repositories[NAME][SHARD])


def test_damage_in_what_was_left_is_mended(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(served, 60_000, monkeypatch)
    partial = library.home() / "fox" / "fox" / f".{SHARD}.part"
    with partial.open("r+b") as file:
        file.write(b"damage")
    check(pull(NAME), served)


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_wrong_bytes_of_the_right_size_are_deleted_and_said(served: Hub, name: str) -> None:
    right = served.repositories[NAME][name]
    served.damage[name] = right[:-2] + bytes([right[-2] ^ 1, right[-1]])
    with pytest.raises(NetworkError, match=f"{name} of org/fox came with the right size and the wrong content") as told:
        pull(NAME)
    assert told.value.exit_code == 6
    folder = library.home() / "fox" / "fox"
    assert not [path for path in folder.iterdir() if path.name.startswith((name, f".{name}"))]
    served.damage.clear()
    check(pull(NAME), served)


def test_more_bytes_than_said(served: Hub) -> None:
    served.damage[SHARD] = served.repositories[NAME][SHARD] + b"more"
    with pytest.raises(NetworkError, match="More comes of"):
        pull(NAME)


def test_a_busy_hub_is_waited_for(served: Hub) -> None:
    served.refusals += [
        Refusal("/api/models/org/fox", 429, {"Retry-After": "1"}),
        Refusal(f"/resolve/{served.commit}/{SHARD}", 429, {"Retry-After": "1"}),
        Refusal(f"/storage/org/fox/{SHARD}", 503),
        Refusal(f"/storage/org/fox/{SHARD}", 500),
    ]
    started = time.monotonic()
    check(pull(NAME), served)
    assert 2 <= time.monotonic() - started < 10


def test_a_silent_server_is_asked_again(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    served.silent.append(SHARD)
    check(pull(NAME), served)
    assert len([path for path in served.paths("/storage/") if path.endswith(SHARD)]) == 2


def test_a_long_wait_is_said_instead(served: Hub) -> None:
    served.refusals.append(Refusal("/api/models/org/fox", 429, {"Retry-After": "7200"}))
    with pytest.raises(NetworkError, match="asks to wait 120 minutes"):
        pull(NAME)


def test_a_hub_that_stays_busy(served: Hub) -> None:
    served.refusals += [Refusal("/api/models/org/fox", 429)] * 8
    with pytest.raises(NetworkError, match=r"after 8 tries: the hub asks for fewer requests \(429\)"):
        pull(NAME)
    assert list(library.home().rglob("*")) == []


@pytest.mark.parametrize("location", ["?again", "ftp://localhost/file"])
def test_redirects_that_lead_nowhere_are_said_at_once(served: Hub, location: str) -> None:
    served.refusals += [Refusal(SHARD, 302, {"Location": location})] * 100
    with pytest.raises(NetworkError, match=f"leads nowhere for {SHARD}: .*[a-z.]$"):
        pull(NAME)
    assert len(served.paths(SHARD)) < 30


def test_a_gated_model_says_what_to_do(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    served.token = "hf_secret"
    with pytest.raises(NetworkError, match="org/fox is gated") as caught:
        pull(NAME)
    assert f"Accept it at {served.endpoint}/org/fox" in caught.value.hint
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(NetworkError) as caught:
        pull(NAME)
    assert "The token in use does not do" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check(pull(NAME), served)
    assert served.leaks == []


def test_a_token_that_may_see_the_list_but_not_the_files(served: Hub) -> None:
    served.refusals.append(Refusal(f"/resolve/{served.commit}/{SHARD}", 403, {"X-Error-Code": "GatedRepo"}))
    with pytest.raises(NetworkError, match="org/fox is gated"):
        pull(NAME)


@pytest.mark.parametrize(
    "odd",
    [
        b"<html>",
        b"\xff",
        [],
        "text",
        {"sha": 5},
        {"siblings": [5]},
        *(
            {"siblings": [{"rfilename": "config.json", "size": 2, "blobId": "a" * 40, **entry}]}
            for entry in ({"size": "x"}, {"size": True}, {"blobId": 5}, {"blobId": "x"}, {"lfs": 5}, {"rfilename": 5})
        ),
        {"siblings": [{"rfilename": "a", "lfs": {"size": 5, "sha256": 5, "pointerSize": 1}}]},
    ],
)
def test_an_answer_that_is_none(served: Hub, odd: object) -> None:
    if isinstance(odd, dict):
        odd = {"id": NAME, "sha": served.commit, "siblings": [], **odd}
    served.information = odd if isinstance(odd, bytes) else json.dumps(odd).encode()
    with pytest.raises(NetworkError, match=r"cannot be understood|does not say (what|which)"):
        pull(NAME)
    assert served.paths("resolve") == served.paths("agent") == []


def test_an_unknown_model_and_its_neighbours(served: Hub) -> None:
    with pytest.raises(NetworkError, match="The hub has no model org/foxx") as caught:
        pull("org/foxx")
    assert "Did you mean org/fox?" in caught.value.hint
    with pytest.raises(NetworkError, match="org/fox has no revision v9"):
        pull(NAME, revision="v9")
    for name in ("fox", "org/fox--x", "org/..", "org/fox/x", "https://hub/org/fox"):
        with pytest.raises(UsageError, match="no name of a repository"):
            pull(name)
    with pytest.raises(NetworkError, match=r"does not give model-00002.* it answers 404"):
        served.refusals.append(Refusal(f"/resolve/{served.commit}/{SHARD}", 404))
        pull(NAME)


def test_without_a_network(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{taken.getsockname()[1]}", monkeypatch)
        with pytest.raises(NetworkError, match="cannot be reached for org/fox") as caught:
            pull(NAME)
    assert "HF_ENDPOINT" in caught.value.hint
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        pull(NAME)
    assert time.monotonic() - started < 5


def test_a_full_disk_is_found_before_anything_is_fetched(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs("/")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CapacityError, match=r"has 1.0 KiB free, and .* MiB are to come"):
        pull(NAME)
    assert free.f_bsize and served.paths("resolve") == []


def test_files_land_inside_the_folder_whatever_they_are_called(served: Hub, tmp_path: Path) -> None:
    leading_out = ("../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "C:evil.json", "x\n.json")
    no_file = ("a\0evil.json", "evil" * 60, "é" * 120, "NUL.json", "a/con", "evil.json ", "evil.", "config.json/evil")
    for name in leading_out + no_file:
        served.repositories["org/evil"] = {"config.json": b"{}", name: b"{}", "model.safetensors": b"x" * 20}
        with pytest.raises(InputError, match="no name that a file may have"):
            pull("org/evil", include=["*"])
        assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "home" / "evil").exists()


def test_a_link_in_the_library_leads_nothing_outside(served: Hub, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = library.home() / "fox" / "fox"
    folder.mkdir(parents=True)
    (folder / "additional_chat_templates").symlink_to(outside)
    served.repositories[NAME]["additional_chat_templates/x.jinja"] = b"{}"
    with pytest.raises(UsageError, match="leads out of"):
        pull(NAME)
    (folder / "additional_chat_templates").unlink()
    victim = outside / "victim"
    victim.write_text("mine")
    (folder / f".{SHARD}.part").symlink_to(victim)
    with pytest.raises(FileError, match="Cannot write"):
        pull(NAME)
    assert victim.read_text() == "mine"


def test_include_and_pickles(served: Hub) -> None:
    pulled = pull(NAME, include=["config.json", "tokenizer*"])
    assert {file.name.partition(".")[0] for file in pulled.files} >= {"config", "tokenizer"}
    assert not any(file.name.endswith(".safetensors") for file in pulled.files)
    with pytest.raises(UsageError, match=r"No file of org/fox matches \*\.gguf"):
        pull(NAME, include=["*.gguf"])
    served.repositories["org/old"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(InputError, match="reading pickled files"):
        pull("org/old")


def test_gguf_files_become_types_of_a_model(served: Hub, random_model: Path) -> None:
    content = random_model.read_bytes()
    served.repositories["org/cat-GGUF"] = {
        "cat.Q4_K_M.gguf": content,
        "cat.Q8_0.gguf": content,
        "BF16/cat-BF16-00001-of-00002.gguf": content,
        "BF16/cat-BF16-00002-of-00002.gguf": content,
        "README.md": b"cat",
    }
    with pytest.raises(UsageError, match="has several GGUF files") as caught:
        pull("org/cat-GGUF")
    assert "org/cat-GGUF:Q4_K_M" in caught.value.hint
    assert "Q8_0 (" in caught.value.hint
    with pytest.raises(UsageError, match="no GGUF file of type Q2_K"):
        pull("org/cat-GGUF:Q2_K")
    pulled = pull("org/cat-GGUF:q4_k")
    assert pulled.path == library.home() / "cat" / "cat-Q4_K_M.gguf"
    assert library.resolve("cat:Q4_K", library.Purpose.RUN) == pulled.path
    parts = pull("org/cat-GGUF:BF16")
    assert [file.path.name for file in parts.files] == ["cat-BF16-00001-of-00002.gguf", "cat-BF16-00002-of-00002.gguf"]
    model = library.find("cat")
    assert model is not None
    assert [(file.type, file.bytes, file.parts) for file in model.files] == [
        ("BF16", 2 * len(content), 2),
        ("Q4_K_M", len(content), 1),
    ]
    removal = library.plan_removal("cat:BF16")
    assert len(removal.files) == 2
    library.remove(removal)
    library.remove(library.plan_removal("cat"))
    assert not (library.home() / "cat").exists()


def test_gguf_files_that_name_no_model_are_called_after_their_repository(served: Hub) -> None:
    served.repositories["org/cat-GGUF"] = {"ggml-model-q4_k.gguf": b"a", "ggml-model-q4_k-im.gguf": b"b"}
    served.repositories["org/dog-gguf"] = {"ggml-model-q4_k.gguf": b"c", "odd-fp16.gguf": b"d"}
    with pytest.raises(UsageError) as caught:
        pull("org/dog-gguf")
    assert "org/dog-gguf:Q4_K. It has Q4_K (" in caught.value.hint
    assert " odd-fp16 (" in caught.value.hint
    found = [pull(f"org/{name}").path for name in ("cat-GGUF:Q4_K", "cat-GGUF:q4_k-im", "dog-gguf:Q4_K")]
    found.append(pull("org/dog-gguf:odd-fp16").path)
    assert [path.name for path in found] == ["cat-Q4_K.gguf", "cat-Q4_K-IM.gguf", "dog-Q4_K.gguf", "dog-odd-fp16.gguf"]
    assert [path.read_bytes() for path in found] == [b"a", b"b", b"c", b"d"]


def test_a_gguf_file_that_is_not_there_as_a_whole(served: Hub) -> None:
    served.repositories["org/cat"] = {f"q8/cat-Q8_0-0000{number}-of-00012.gguf": b"a" for number in (1, 2, 4)}
    with pytest.raises(InputError, match=r"only a part of q8/cat-Q8_0.gguf; it lacks .*-00003-of-.* and 4 more"):
        pull("org/cat")
    assert served.paths("resolve") == []
    assert len(pull("org/cat", include=["*-00001-of-*"]).files) == 1
    served.repositories["org/dog"] = {"dog-Q8_0.gguf.part1of2": b"a", "dog-Q8_0.gguf.part2of3": b"b"}
    with pytest.raises(InputError, match=r"it lacks 'dog-Q8_0.gguf.part2of2'\."):
        pull("org/dog:Q8_0")


def test_names_that_fold_to_one(served: Hub) -> None:
    served.repositories["org/cat"] = {"a/cat-Q8_0.gguf": b"a", "b/Cat-Q8_0.gguf": b"b"}
    with pytest.raises(UsageError, match=r"Two files of org/cat would become Cat-Q8_0\.gguf"):
        pull("org/cat")
    pull("org/cat", include=["a/*"])


def test_a_type_that_cannot_be_typed_is_not_proposed(served: Hub) -> None:
    served.repositories["org/cat"] = {"an odd one.gguf": b"a", "a second one.gguf": b"b"}
    with pytest.raises(UsageError) as caught:
        pull("org/cat")
    assert caught.value.hint.startswith("Choose one with --include. It has an odd one (")
    served.repositories["org/cat"]["third.gguf"] = b"c"
    with pytest.raises(UsageError) as caught:
        pull("org/cat")
    assert caught.value.hint.startswith("Name one, such as org/cat:third. It has an odd one (")


def test_a_file_of_another_repository_is_not_replaced(served: Hub) -> None:
    served.repositories["one/cat"] = {"cat-Q8_0.gguf": b"one"}
    served.repositories["two/cat"] = {"cat-Q8_0.gguf": b"two"}
    served.repositories["three/cat"] = {"cat-Q8_0.gguf": b"one"}
    path = pull("one/cat").path
    with pytest.raises(UsageError, match="came from one/cat") as caught:
        pull("two/cat")
    assert "`localmix rm cat:Q8_0`" in caught.value.hint
    served.repositories["one/cat"] = {"odd.gguf": b"one"}
    pull("one/cat")
    served.repositories["two/cat"] = {"odd.gguf": b"two"}
    with pytest.raises(UsageError) as caught:
        pull("two/cat")
    assert "`localmix rm cat:odd`" in caught.value.hint
    assert not pull("three/cat").files[0].fetched
    assert path.read_bytes() == b"one"


def test_another_model_of_the_same_name_is_not_touched(served: Hub, checkpoint: Path) -> None:
    pull(NAME)
    served.repositories["other/fox"] = served.repositories[NAME]
    with pytest.raises(UsageError, match="The library has another fox, made from org/fox"):
        pull("other/fox")
    mine = library.home() / "cat" / "cat-Q8_0.gguf"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    served.repositories["org/cat"] = {"cat-Q8_0.gguf": b"theirs"}
    with pytest.raises(UsageError, match="did not come from the hub"):
        pull("org/cat")
    assert mine.read_bytes() == b"mine"
    with pytest.raises(UsageError, match="The library has another fox, made from org/fox"):
        library.check_name_is_free(checkpoint)


def test_removing_it_leaves_nothing_but_foreign_files(served: Hub) -> None:
    pulled = pull(NAME)
    mine = pulled.path / "notes.txt"
    mine.write_text("mine")
    model = library.find("fox")
    assert model is not None
    assert model.pulled_bytes >= pulled.bytes
    library.remove(library.plan_removal("fox"))
    assert [path for path in library.home().rglob("*") if path.is_file() and path.name != "state.json"] == [mine]


def test_two_runs_do_not_meet(served: Hub) -> None:
    served.bytes_per_second = 100_000
    errors: list[BaseException] = []

    def run() -> None:
        try:
            pull(NAME)
        except FileError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert "Another run is writing" in str(errors[0])


def test_several_connections_pay(served: Hub) -> None:
    size = sum(len(content) for name, content in served.repositories[NAME].items() if name.startswith("model-"))
    served.bytes_per_second = size // 3
    started = time.monotonic()
    check(pull(NAME), served)
    assert time.monotonic() - started < 2.5  # one after the other it takes three seconds


def test_a_broken_record_or_note_is_passed_over(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(served, 60_000, monkeypatch)
    folder = library.home() / "fox" / "fox"
    for text in ("", "[]", "{", json.dumps({"checksum": 1}), '{"a": {"b": 1}}'):
        (folder / f".{SHARD}.part.json").write_text(text)
        (folder / ".hub.json").write_text(text)
        check(pull(NAME), served)
        (folder / SHARD).unlink()
