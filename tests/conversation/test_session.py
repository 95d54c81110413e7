"""Conversations on the disk: whole or not at all, under safe names, and apart from what is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmix.conversation import session
from localmix.conversation.session import Keeper, Session
from localmix.errors import InputError, LocalmixError, UsageError

TURNS = ({"role": "user", "content": "你好\x1b[31m"}, {"role": "assistant", "content": "Hello 👩‍🚀"})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path))
    yield tmp_path


def test_what_is_written_comes_back() -> None:
    whole = Session("a b", "/m.gguf", "Be nice.", TURNS, 2, {"temperature": 0.5, "seed": None}, 40)
    written = session.write(whole)
    assert session.read("a b") == written
    assert written.created == written.updated != ""
    again = session.write(written)
    assert again.created == written.created


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_conversations_are_private() -> None:
    session.write(Session("x", turns=TURNS))
    assert session.folder().stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/x",
        ".x",
        "con",
        "NUL.txt",
        "a.",
        "a ",
        "a\0b",
        "a\nb",
        "C:x",
        "x" * 101,
        "名" * 67,
    ],
)
def test_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        session.path_of(name)


@given(st.text(max_size=20))
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    try:
        path = session.path_of(name)
    except UsageError:
        return
    assert path.parent == session.folder()
    assert Path(os.path.abspath(path)) == path
    assert session.state_path(name).parent == session.folder()


def damaged(**changes: object) -> bytes:
    document = {"format": session.FORMAT, "version": 1, "model": "", "turns": list(TURNS), **changes}
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        damaged(format="other"),
        damaged(version="1"),
        damaged(version=0),
        damaged(turns=None),
        damaged(turns=[{"role": "system", "content": ""}]),
        damaged(turns=list(TURNS[:1])),
        damaged(turns=list(TURNS[::-1])),
        damaged(turns=[{"role": "user", "content": 1}, TURNS[1]]),
        damaged(turns=[{"role": "user", "content": "\ud800"}, TURNS[1]]),
        damaged(model=["x"]),
        damaged(sampling=3),
    ],
)
def test_a_damaged_session_is_named_and_passed_over(data: bytes) -> None:
    session.write(Session("good", turns=TURNS))
    (session.folder() / "bad.json").write_bytes(data)
    with pytest.raises(InputError, match=r"bad\.json is damaged"):
        session.read("bad")
    told: list[LocalmixError] = []
    assert [one.name for one in session.find(told.append)] == ["good"]
    assert len(told) == 1 and "bad.json" in told[0].message


def test_odd_values_fall_back() -> None:
    session.folder().mkdir()
    data = damaged(limit=True, dropped=99, sampling={"temperature": "hot", "top_k": 3, "x": float("nan")})
    session.path_of("odd").write_bytes(data)
    found = session.read("odd")
    assert (found.limit, found.dropped, found.sampling) == (None, 2, {"top_k": 3})


def test_a_newer_version_is_refused_and_stays() -> None:
    session.folder().mkdir()
    session.path_of("new").write_bytes(damaged(version=2, turns={"a": 1}))
    with pytest.raises(InputError, match="newer localmix"):
        session.read("new")
    with Keeper() as keeper, pytest.raises(InputError, match="newer localmix"):
        keeper.open("new")
    assert json.loads(session.path_of("new").read_bytes())["version"] == 2


def test_an_unknown_session_names_those_there_are() -> None:
    session.write(Session("work"))
    with pytest.raises(UsageError, match="There are work"):
        session.read("play")


def test_the_latest_comes_first() -> None:
    for name, updated in (("old", "2020-01-01"), ("new", "2030-01-01"), ("mid", "2025-01-01")):
        session.write(Session(name))
        path = session.path_of(name)
        path.write_text(path.read_text().replace(session.read(name).updated, updated))
    assert [one.name for one in session.find()] == ["new", "mid", "old"]


def test_a_session_belongs_to_one_chat() -> None:
    with Keeper() as first, Keeper() as second:
        first.save(Session("", turns=TURNS))
        with pytest.raises(UsageError, match="open in another chat"):
            second.open(first.name)
        name = first.name
        first.start_again()
        assert second.open(name) is not None
        first.save(Session("", turns=TURNS))
        assert first.name != name
    assert not list(session.folder().glob(".*"))  # locks leave with their chats


def test_renaming_takes_the_state_along() -> None:
    with Keeper() as keeper:
        keeper.save(Session("", turns=TURNS))
        before = keeper.name
        session.state_path(before).write_bytes(b"state")
        keeper.save_as("mine", Session("", turns=TURNS))
        assert session.names() == ["mine"]
        assert session.state_path("mine").read_bytes() == b"state"
        assert not session.state_path(before).exists()
        session.write(Session("taken"))
        with pytest.raises(UsageError, match="already"):
            keeper.save_as("taken", Session(""))
        assert keeper.name == "mine"


def test_nothing_is_kept_unless_asked_for() -> None:
    with Keeper(saving=False) as keeper:
        keeper.save(Session("", turns=TURNS))
        with pytest.raises(UsageError):
            keeper.save_as("../x", Session("", turns=TURNS))
        keeper.save(Session("", turns=TURNS))
        assert not session.folder().exists()
        keeper.save_as("after all", Session("", turns=TURNS))
        assert session.names() == ["after all"]


def test_the_oldest_states_go_first_and_texts_stay() -> None:
    for age, name in enumerate(("a", "b", "c")):
        session.write(Session(name, turns=TURNS))
        session.state_path(name).write_bytes(bytes(100))
        os.utime(session.state_path(name), (1000 + age, 1000 + age))
    interrupted = session.folder() / ".d.kv.partial"  # of a chat that was killed
    interrupted.write_bytes(bytes(100))
    os.utime(interrupted, (999, 999))
    assert session.limit_states(keep="a", limit=300) == [interrupted]
    assert session.limit_states(keep="a", limit=200) == [session.state_path("b")]
    assert session.limit_states(keep="a", limit=100) == [session.state_path("c")]
    assert session.limit_states(keep="a", limit=10) == [session.state_path("a")]
    assert session.names() == ["a", "b", "c"]


WRITER = """
from localmix.conversation.session import Session, write
number = 0
while True:
    number += 1
    turns = [{"role": role, "content": f"{number} " * 2000} for role in ("user", "assistant")] * 20
    write(Session("x", turns=tuple(turns)))
    print(number, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_kill_costs_no_saved_turn(home: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for pause in (0.0, 0.003, 0.011, 0.02):
        with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(pause)
            os.kill(process.pid, signal.SIGKILL)
            said = process.stdout.read().split()
        saved = int(session.read("x").turns[0]["content"].split()[0])
        assert saved >= int(said[-1] if said else 1)


def test_exports() -> None:
    whole = Session("x", "/tinymix-Q4_K_M.gguf", "Be nice.", TURNS)
    text = session.as_markdown(whole)
    assert text.index("## System") < text.index("## You") < text.index("## Model")
    messages = json.loads(session.as_json(whole))["messages"]
    assert messages == [{"role": "system", "content": "Be nice."}, *TURNS]
