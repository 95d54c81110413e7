"""The frame around every command: help, versions, exit codes, errors as sentences and as JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localmix import __version__
from localmix.cli.main import COMMANDS
from tests.commands import CommandLine


def test_help_lists_every_command_and_is_quick(empty: CommandLine) -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run = empty("--help")
        seconds.append(time.perf_counter() - started)
    assert all(name in run.out for name in COMMANDS)
    assert min(seconds) < 0.3


def test_help_imports_nothing_heavy(empty: CommandLine) -> None:
    program = (
        "import sys\nfrom localmix.__main__ import main\nmain(['--help'])\n"
        "heavy = {'numpy', 'gguf', 'rich', 'llama_cpp', 'yaml', 'jinja2', 'prompt_toolkit', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], env=empty.environment, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_examples_and_json(empty: CommandLine, name: str) -> None:
    run = empty(name, "--help")
    assert "Examples:" in run.out
    assert "--json" in run.out
    assert len(max(run.out.splitlines(), key=len)) < 110


def test_version(empty: CommandLine) -> None:
    assert empty("--version").out.strip() == f"localmix {__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convrt"], "Did you mean `convert`?"),
        (["--colour"], "--colour"),
        (["plan", "--ctx", "many"], "many"),
        (["imatrix"], "--corpus"),
        (["completion", "tcsh"], "tcsh"),
        (["quantize", "Q4K"], "Q4_K"),
        (["quantize", ","], "No type"),
        (["quantize", "nope"], "Sets: chinese-mixtral"),
        (["quantize", "chinese-mixtrl"], "Did you mean chinese-mixtral"),
        (["plan", "--set", "german-mixtral"], "chinese-mixtral"),
        (["plan", "--ram", "much"], "16"),
        (["ls", "extra"], "extra"),
    ],
)
def test_wrong_usage_is_a_sentence_and_2(empty: CommandLine, arguments: list[str], words: str) -> None:
    assert words in empty.fails(*arguments, expect=2)


def test_nothing_at_all_shows_the_help(empty: CommandLine) -> None:
    assert "Commands:" in empty(expect=2).err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["chat", "nobody", "-p", "x"], 2), (["info", "no.gguf"], 5), (["quantize", "Q9", "x"], 2), (["nonsense"], 2)],
)
def test_with_json_an_error_is_a_document_too(empty: CommandLine, arguments: list[str], code: int) -> None:
    run = empty(*arguments, "--json", expect=code)
    assert set(run.json) == {"error"}
    assert run.json["error"]["exit_code"] == code
    assert run.json["error"]["message"] in run.err.replace("\n", " ")


def test_a_bug_keeps_its_traceback_and_is_70(empty: CommandLine) -> None:
    program = (
        "import sys, localmix.library\nfrom localmix.__main__ import main\n"
        "localmix.library.models = lambda: 1 / 0\nsys.exit(main(['ls']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], env=empty.environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 70
    assert "ZeroDivisionError" in run.stderr
    assert "bug" in run.stderr


def test_a_file_system_error_that_nobody_caught_names_the_file(empty: CommandLine) -> None:
    program = (
        "import sys, localmix.library\nfrom localmix.__main__ import main\n"
        "localmix.library.models = lambda: open('/nowhere/file')\nsys.exit(main(['ls']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], env=empty.environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 5
    assert run.stderr == "Error: /nowhere/file: no such file or directory.\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE and no head")
def test_a_reader_that_leaves_is_no_error(localmix: CommandLine) -> None:
    process = localmix.popen("info", "fox", "--json")
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 0
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full: Linux has one")
@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["info", "fox", "--json"]])
def test_output_that_has_no_room_is_one_sentence(localmix: CommandLine, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = localmix.popen(*words, stdout=full)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.splitlines()[0]) == (4, "Error: The disk is full: there is no room.")
    assert len(err.splitlines()) == 2


def _wait_for_main(process: subprocess.Popen[str]) -> None:
    """Until SIGTERM is caught: before, on a busy machine for long, signals are Python's own affair."""
    status = Path(f"/proc/{process.pid}/status")
    while status.exists():
        caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.MULTILINE)
        if process.poll() is not None or (caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1):
            break
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_130(localmix: CommandLine, number: signal.Signals) -> None:
    text = (localmix.folder / "corpus.txt").read_text("utf-8")
    (localmix.folder / "long.txt").write_text(text * 200, "utf-8")  # seconds of work, wherever the signal comes
    process = localmix.popen("ppl", "--corpus", "long.txt", "--ctx", "64")
    _wait_for_main(process)
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert (out, err) == ("", "Stopped.\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_more_signals_do_not_disturb_the_end(localmix: CommandLine, number: signal.Signals) -> None:
    process = localmix.popen("chat", "-p", "x", "--threads", "1", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)  # the reply has begun
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        process.send_signal(number)
    assert process.communicate(timeout=1)[1].strip() == "Stopped."
    assert process.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_while_the_program_still_starts(empty: CommandLine) -> None:
    program = (
        "import sys, os, signal\nfrom localmix.__main__ import main\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
        "assert not {'click', 'contextlib', 'inspect'} & set(sys.modules) - before\n"
        "sys.meta_path.insert(0, Stop())\nsys.exit(main(['ls']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\nbefore = set(sys.modules)\n{program}"],
        env=empty.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (130, "Stopped.\n")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize(
    ("arguments", "closed", "code"),
    [
        ("chat fox", "<&-", 2),
        ("ls", ">&-", 0),
        ("info fox", ">&-", 0),
        ("info /nope.gguf", "2>&-", 5),
        ("quantize Q8_0 fox -o out.gguf --threads 1", "<&- >&- 2>&-", 0),
    ],
)
def test_closed_streams_are_no_error(localmix: CommandLine, arguments: str, closed: str, code: int) -> None:
    command = f"exec {sys.executable} -m localmix {arguments} {closed}"
    run = subprocess.run(["sh", "-c", command], env=localmix.environment, cwd=localmix.folder, check=False)
    assert run.returncode == code
    if "out.gguf" in arguments:
        assert localmix("info", "out.gguf", "--json").json["types"]


def test_colours_only_on_a_terminal(localmix: CommandLine) -> None:
    for arguments in (["ls"], ["plan", "Q4_K"], ["info"]):
        run = localmix(*arguments)
        assert "\x1b" not in run.out + run.err


def test_completion_scripts_complete_types_models_and_commands(localmix: CommandLine) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_LOCALMIX_COMPLETE" in localmix("completion", shell).out
    assert json.loads(localmix("completion", "fish", "--json").out)["shell"] == "fish"

    def complete(line: str) -> list[str]:
        variables = {
            "_LOCALMIX_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        run = CommandLine(localmix.home, localmix.folder, variables)()
        return [entry.partition(",")[2] for entry in run.out.splitlines()]

    assert complete("localmix qu") == ["quantize"]
    assert complete("localmix quantize Q4_K") == ["Q4_K_M", "Q4_K_S", "Q4_K"]
    assert complete("localmix quantize Q8_0,iq1_m") == ["Q8_0,IQ1_M"]
    assert complete("localmix chat f") == ["fox", "fox:BF16"]
    assert complete("localmix plan --set chinese-m")[0] == "chinese-mixtral"


def test_completion_with_a_broken_library_is_silent(empty: CommandLine) -> None:
    empty.home.write_text("a file")
    variables = {"_LOCALMIX_COMPLETE": "bash_complete", "COMP_WORDS": "localmix chat f", "COMP_CWORD": "2"}
    run = CommandLine(empty.home, empty.folder, variables)()
    assert (run.out, run.err) == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_bash_completes_behind_a_colon(localmix: CommandLine) -> None:
    program = localmix.folder / "localmix"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m localmix "$@"\n')
    program.chmod(0o755)
    script = f"""
{localmix("completion", "bash").out}
COMP_LINE="localmix chat fox:B" COMP_POINT=19 COMP_WORDS=(localmix chat fox : B) COMP_CWORD=4
_localmix_completion ./localmix
echo "${{COMPREPLY[@]}}"
"""
    run = subprocess.run(
        ["bash", "-c", script],
        env=localmix.environment,
        cwd=localmix.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "BF16"
