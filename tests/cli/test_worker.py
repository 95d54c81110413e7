"""`localmix worker`, and `--rpc` of the commands that use workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.commands import ROOT, CommandLine
from tests.workers import require_rpc_server, running_worker


def test_an_open_address_needs_a_word_about_it(empty: CommandLine) -> None:
    said = empty.fails("worker", "--host", "0.0.0.0", "--port", "0", expect=2)
    assert "no password" in said and "--insecure-network" in said and "SSH" in said


def test_with_that_word_it_warns_and_listens(tmp_path: Path) -> None:
    require_rpc_server()
    command = CommandLine(tmp_path, tmp_path)
    process = command.popen("worker", "--host", "0.0.0.0", "--port", "0", "--insecure-network", "--mem", "1GiB")
    assert process.stderr is not None
    warning = process.stderr.readline()
    assert "can be reached by other machines" in warning and "no password" in warning
    ready = process.stderr.readline()
    assert ready.startswith("Listening at 0.0.0.0:") and "CPU" in ready
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "Stopped.\n")


def test_ctrl_c_and_sigterm_leave_nothing_behind(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with running_worker(tmp_path) as (_, process):
            assert process.stdout is not None
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
            process.send_signal(number)
            assert json.loads(process.stdout.readline()) == {"event": "stopped"}
            assert process.wait(20) == 0
            assert children.stdout.split()
            for child in children.stdout.split():
                with pytest.raises(OSError):
                    os.kill(int(child), 0)


def test_what_happens_as_json(tmp_path: Path, localmix: CommandLine) -> None:
    with running_worker(tmp_path) as (address, process):
        localmix("chat", "fox", "-p", "hello", "--max-tokens", "3", "--threads", "1", "--rpc", address)
        assert process.stdout is not None
        came, left = (json.loads(process.stdout.readline()) for _ in range(2))
    assert came == {"event": "came", "client": "127.0.0.1"}
    assert left["event"] == "left" and left["received"] > 2**20 and left["reason"] == ""


def test_a_measurement_says_where_it_was_made(tmp_path: Path, localmix: CommandLine) -> None:
    (localmix.folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    with running_worker(tmp_path) as (address, _):
        words = ("--corpus", "text.txt", "--ctx", "64", "--chunks", "2", "--no-speed", "--threads", "1")
        said = localmix("ppl", "fox", *words, "--rpc", address).out
    assert f"1 thread, layers on {address}." in " ".join(said.split())
    assert "layers on" not in localmix("ppl", "fox", *words, "--device", "cpu").out


def test_a_taken_port(empty: CommandLine) -> None:
    require_rpc_server()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = empty.fails("worker", "--port", str(taken.getsockname()[1]), expect=5)
    assert "taken by another program" in said and "--port" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mem", "much"], "no size"),
        (["--device", "CUDA7"], "no device CUDA7"),
        (["--host", "nowhere.invalid", "--insecure-network"], "no address"),
    ],
)
def test_wrong_options(empty: CommandLine, options: list[str], words: str) -> None:
    require_rpc_server()
    assert words in empty("worker", "--port", "0", *options, expect=2).err


def test_errors_as_json(empty: CommandLine) -> None:
    run = empty("worker", "--host", "0.0.0.0", "--json", expect=2)
    assert json.loads(run.out)["event"] == "error" and json.loads(run.out)["exit_code"] == 2


def test_weights_come_once_with_a_cache(tmp_path: Path) -> None:
    from tests.random_model import write_random_model

    model = write_random_model(
        tmp_path / "wide.gguf", layers=1, hidden=512, feed_forward=1024
    )  # 16 MiB an expert stack
    build = require_rpc_server().parents[2]
    if build.name != "llama.cpp":
        pytest.skip("ggml-rpc-server was not built by `make vendor`")
    kept = tmp_path / "cache" / "localmix"
    kept.mkdir(parents=True)
    (kept / "llama.cpp").symlink_to(build)
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = CommandLine(tmp_path / "home", tmp_path)
    received = []
    with running_worker(tmp_path, "--cache", variables=variables) as (address, process):
        assert process.stdout is not None
        for _ in range(2):
            command("chat", model, "-p", "a", "--max-tokens", "1", "--threads", "1", "--rpc", address)
            assert json.loads(process.stdout.readline())["event"] == "came"
            received.append(json.loads(process.stdout.readline())["received"])
    assert received[0] > 3 * 16 * 2**20 and received[1] < received[0] / 4
    assert sum(file.stat().st_size for file in (kept / "rpc").rglob("*")) == 3 * 2**24


def test_without_the_program_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from localmix.distribution import rpc_server
    from localmix.errors import InputError

    monkeypatch.setattr(rpc_server, "built_tools", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"ggml-rpc-server of llama\.cpp is not here.*doctor --build-server"):
        rpc_server.find_rpc_server()
    program = tmp_path / "rpc-server"
    shutil.copy("/bin/true", program)
    assert rpc_server.find_rpc_server() == program


def test_what_chat_says_of_the_machines(tmp_path: Path, localmix: CommandLine) -> None:
    with (
        running_worker(tmp_path, "--mem", "2GiB") as (first, _),
        running_worker(tmp_path, "--mem", "2GiB") as (second, _),
    ):
        both = f"{first},{second}"
        question = ("chat", "fox", "-p", "hello", "--max-tokens", "4", "--threads", "1", "--temperature", "0", "--json")
        alone = localmix(*question)
        spread = localmix(*question, "--rpc", both)
        assert spread.json["text"] == alone.json["text"]
        assert f"Of 3 layers 2 on {first}, 1 on {second}, and none here." in spread.err
        part = localmix(*question, "--rpc", both, "--gpu-layers", "2")
        assert part.json["text"] == alone.json["text"]
        assert f"1 on {first}, 1 on {second}, and 1 here." in part.err
        drafted = localmix(*question, "--rpc", both, "--draft", "fox")
        assert drafted.json["text"] == alone.json["text"] and drafted.json["drafted"]


def test_a_worker_without_room_is_left_alone(tmp_path: Path, localmix: CommandLine) -> None:
    with (
        running_worker(tmp_path, "--mem", "100MiB") as (small, _),
        running_worker(tmp_path, "--mem", "2GiB") as (large, _),
    ):
        options = ("-p", "hello", "--max-tokens", "2", "--threads", "1")
        run = localmix("chat", "fox", *options, "--rpc", f"{small},{large}")
        assert f"Of 3 layers 3 on {large}, and none here." in run.err
        run = localmix("chat", "fox", *options, "--rpc", small)
        assert "No machine given with --rpc has room for a layer" in run.err
        said = localmix("chat", "fox", *options, "--rpc", small, "--gpu-layers", "3", expect=4)
        assert f"on {small}, which has 100.00 MiB free" in said.err
        assert f"free on {small}" in said.err


def test_ppl_over_two_workers_is_that_of_one_machine(tmp_path: Path, localmix: CommandLine) -> None:
    with running_worker(tmp_path) as (first, _), running_worker(tmp_path) as (second, _):
        question = ("ppl", "fox", "--corpus", "corpus.txt", "--ctx", "64", "--chunks", "4", "--threads", "1", "--json")
        alone = localmix(*question, "--no-speed").json["rows"][0]["ppl"]
        # BF16 is not reordered for this processor, so that nothing differs
        assert localmix(*question, "--no-speed", "--rpc", f"{first},{second}").json["rows"][0]["ppl"] == alone


@pytest.mark.parametrize("command", [("chat", "fox", "-p", "a"), ("ppl", "fox", "--corpus", "corpus.txt")])
def test_a_worker_that_is_not_there(localmix: CommandLine, command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    said = localmix(*command, "--rpc", f"127.0.0.1:{port}", expect=6)
    assert f"No worker listens at 127.0.0.1:{port}." in said.err and f"localmix worker --port {port}" in said.err
    assert "is no address of a worker" in localmix(*command, "--rpc", "a:b:c", expect=2).err


def test_an_engine_that_was_built_without_it(localmix: CommandLine, tmp_path: Path) -> None:
    # as the package is without our build options
    library = tmp_path / "plain" / "llama_cpp" / "lib"
    library.mkdir(parents=True)
    (library.parent / "__init__.py").touch()
    for name in ("libggml-base.so", "libggml-cpu.so", "libllama.so"):
        (library / name).touch()
    plain = CommandLine(localmix.home, localmix.folder, {"PYTHONPATH": f"{tmp_path / 'plain'}:{ROOT}"})
    said = plain.fails("chat", "fox", "-p", "a", "--rpc", "127.0.0.1:1", expect=3)
    assert "without its RPC back end" in said and "make setup" in said and "-DGGML_RPC=on" in said
