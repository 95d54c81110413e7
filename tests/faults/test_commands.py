"""Whatever goes wrong in a command: one sentence, its exit code, outputs absent or as before, inputs unchanged."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Shape, edit_json, write_checkpoint
from tests.commands import CommandLine

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。\n"
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_checkpoint(folder / "fox", Shape(hidden=256, feed_forward=256, layers=2))
    (folder / "corpus.txt").write_text(TEXT * 60, encoding="utf-8")
    CommandLine(folder / "home", folder)("convert", "fox", "-o", "fox-BF16.gguf")
    return folder


@pytest.fixture
def localmix(made_once: Path, tmp_path: Path) -> CommandLine:
    """The command line in a folder with the checkpoint `fox`, `fox-BF16.gguf` and `corpus.txt`."""
    shutil.copytree(made_once, tmp_path / "work")
    return CommandLine(tmp_path / "work" / "home", tmp_path / "work")


def snapshot(folder: Path) -> dict[str, str]:
    """The sha256 of every file, but for what the library remembers."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("state.json", "chat_history")
    }


@pytest.fixture
def unchanged(localmix: CommandLine) -> Iterator[Callable[[], None]]:
    """Call it when everything is broken as wanted: at the end of the test no file may have changed."""
    before: list[dict[str, str]] = []
    yield lambda: before.append(snapshot(localmix.folder))
    assert before, "the test did not say when to look"
    assert snapshot(localmix.folder) == before[0]


Break = Callable[[Path], object]


def truncate(name: str, size: int) -> Break:
    return lambda folder: os.truncate(folder / name, size)


def write(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def delete(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def replace(name: str, old: bytes, new: bytes) -> Break:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        assert old in data
        (folder / name).write_bytes(data.replace(old, new, 1))

    return change


def config(**values: object) -> Break:
    return lambda folder: edit_json(folder / "fox" / "config.json", lambda content: content.update(values))


SHARD = "fox/model-00001-of-00002.safetensors"
CONVERT = ("convert", "fox", "-o", "out.gguf")
QUANTIZE = ("quantize", "Q8_0", "fox-BF16.gguf", "-o", "out.gguf")
PPL = ("ppl", "fox-BF16.gguf", "--corpus", "corpus.txt", "--ctx", "64", "--chunks", "2")
IMATRIX = ("imatrix", "fox-BF16.gguf", "--corpus", "corpus.txt", "--ctx", "64", "-o", "out.gguf")
CHAT = ("chat", "fox-BF16.gguf", "-p", "Hello", "--ctx", "64", "--max-tokens", "2")


@pytest.mark.parametrize(
    ("break_it", "command", "code", "words"),
    [
        # checkpoints
        (truncate(SHARD, 5000), CONVERT, 3, "model-00001-of-00002.safetensors"),
        (delete(SHARD), CONVERT, 3, "model-00001-of-00002.safetensors"),
        (write(SHARD, b"\xff" * 64), CONVERT, 3, "model-00001-of-00002.safetensors"),
        (write("fox/config.json", b"{"), CONVERT, 3, "config.json"),
        (delete("fox/config.json"), CONVERT, 3, "config.json"),
        (config(model_type="unheard-of", architectures=["Unheard"]), CONVERT, 3, "unheard-of"),
        (config(num_attention_heads=0), CONVERT, 3, "num_attention_heads"),
        (delete("fox/tokenizer.model"), CONVERT, 3, "tokenizer"),
        (truncate(SHARD, 5000), ("quantize", "Q8_0", "./fox", "-o", "out.gguf"), 3, "model-00001"),
        (config(num_hidden_layers=3), ("info", "./fox"), 3, "fox"),
        # GGUF files
        (write("fox-BF16.gguf", b""), QUANTIZE, 3, "fox-BF16.gguf"),
        (write("fox-BF16.gguf", b"PK\x03\x04" * 99), QUANTIZE, 3, "fox-BF16.gguf"),
        (truncate("fox-BF16.gguf", 100_000), QUANTIZE, 3, "fox-BF16.gguf"),
        (truncate("fox-BF16.gguf", 1000), ("info", "fox-BF16.gguf"), 3, "fox-BF16.gguf"),
        (truncate("fox-BF16.gguf", 100_000), PPL, 3, "fox-BF16.gguf"),
        (truncate("fox-BF16.gguf", 100_000), IMATRIX, 3, "fox-BF16.gguf"),
        (truncate("fox-BF16.gguf", 100_000), CHAT, 3, "fox-BF16.gguf"),
        (replace("fox-BF16.gguf", b"llama", b"lxama"), PPL, 3, "fox-BF16.gguf"),
        (replace("fox-BF16.gguf", b"{{ bos_token }}", b"{% bos_token %}"), CHAT, 3, "template"),
        # corpora
        (write("corpus.txt", b""), PPL, 3, "corpus.txt"),
        (write("corpus.txt", b"too short"), PPL, 3, "corpus.txt"),
        (write("corpus.txt", b"\xff\xfe" * 99), PPL, 3, "corpus.txt"),
        (write("corpus.txt", b"ab\x80cd"), IMATRIX, 3, "corpus.txt"),
        (delete("corpus.txt"), PPL, 5, "corpus.txt"),
        (delete("corpus.txt"), IMATRIX, 5, "corpus.txt"),
        # quantizing
        (write("im.gguf", b"GGUF"), (*QUANTIZE, "--imatrix", "im.gguf"), 3, "im.gguf"),
        (write("x", b""), (*QUANTIZE, "--imatrix", "missing.gguf"), 5, "missing.gguf"),
        (write("x", b""), ("quantize", "IQ2_XS", "fox-BF16.gguf", "-o", "out.gguf"), 3, "localmix imatrix"),
        (write("x", b""), (*QUANTIZE, "--tensor-type", "attn_v"), 2, "PATTERN=TYPE"),
        (write("x", b""), (*QUANTIZE, "--tensor-type", "([=Q8_0"), 2, "regular expression"),
        # outputs
        (write("x", b""), (*QUANTIZE[:3], "-o", "missing/out.gguf"), 5, "missing"),
        (write("x", b""), (*QUANTIZE[:3], "-o", "corpus.txt/out.gguf"), 5, "corpus.txt"),
        (write("x", b""), (*QUANTIZE[:3], "-o", "fox-BF16.gguf"), 2, "destroy"),
        (write("x", b""), (*IMATRIX[:-1], "missing/out.gguf"), 5, "missing"),
        (write("x", b""), (*IMATRIX[:-1], "corpus.txt"), 2, "corpus.txt"),
        (write("home", b"a file"), ("convert", "fox"), 5, "home"),
        # memory
        (write("x", b""), ("chat", "fox-BF16.gguf", "-p", "x", "--ctx", "16000000"), 4, "--force"),
        (write("x", b""), (*CHAT[:4], "--ctx", "2000000000", "--force"), 4, "--ctx"),
        (write("x", b""), (*CHAT[:4], "--ctx", "4294967312", "--force"), 2, "4294967312"),
        (write("x", b""), (*CHAT, "--temperature", "nan"), 2, "finite"),
        (write("x", b""), (*CHAT, "--temperature", "inf"), 2, "finite"),
        (write("x", b""), (*CHAT, "--top-p", "nan"), 2, "finite"),
        (write("x", b""), (*CHAT, "--repeat-penalty", "nan"), 2, "finite"),
        (write("x", b""), (*CHAT, "--top-k", "2147483648"), 2, "--top-k"),
        (write("x", b""), (*CHAT, "--seed", "-1"), 2, "--seed"),
        (write("x", b""), (*CHAT, "--threads", "513"), 2, "--threads"),
        (write("x", b""), (*CHAT, "--system", os.fsdecode(b"\xff")), 2, "UTF-8"),
        (write("x", b""), (*CHAT[:3], os.fsdecode(b"\xff")), 2, "UTF-8"),
        (write("x", b""), ("chat", "./fox", "-p", "x"), 2, "localmix convert"),
    ],
    ids=lambda value: "-".join(map(str, value))[:60] if isinstance(value, tuple) else "",
)
def test_one_sentence_and_nothing_changed(
    localmix: CommandLine,
    unchanged: Callable[[], None],
    break_it: Break,
    command: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    if (localmix.folder / "home").exists():
        shutil.rmtree(localmix.folder / "home")
    break_it(localmix.folder)
    unchanged()
    run = localmix(*command, expect=code)
    assert run.out == ""
    assert words in run.err
    assert sum(line.startswith("Error: ") for line in run.err.splitlines()) == 1


@posix
def test_links_to_the_source_are_seen_through(localmix: CommandLine, unchanged: Callable[[], None]) -> None:
    os.link(localmix.folder / "fox-BF16.gguf", localmix.folder / "hard.gguf")
    (localmix.folder / "soft.gguf").symlink_to("fox-BF16.gguf")
    unchanged()
    for name in ("hard.gguf", "soft.gguf"):
        assert "destroy" in localmix.fails(*QUANTIZE[:3], "-o", name, expect=2)


def test_an_earlier_output_survives_a_failure(localmix: CommandLine, unchanged: Callable[[], None]) -> None:
    localmix(*QUANTIZE)
    os.truncate(localmix.folder / "fox-BF16.gguf", 200_000)
    unchanged()
    localmix.fails(*QUANTIZE, expect=3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes; needs root on Linux."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")

    def mount(size: int, options: str = "") -> Path:
        run = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", folder], capture_output=True, check=False
        )
        if run.returncode:
            pytest.skip(f"mounting is not allowed here: {run.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_disk_that_is_too_small(localmix: CommandLine, small_disk: Callable[[int], Path], share: float) -> None:
    localmix(*QUANTIZE)
    needed = (localmix.folder / "out.gguf").stat().st_size
    disk = small_disk(int(needed * share))
    run = localmix.fails(*QUANTIZE[:3], "-o", disk / "out.gguf", expect=4)
    assert "free" in run.lower()
    assert list(disk.iterdir()) == []


def test_a_read_only_disk(localmix: CommandLine, small_disk: Callable[..., Path]) -> None:
    disk = small_disk(2**26, ",ro")
    assert str(disk) in localmix.fails(*QUANTIZE[:3], "-o", disk / "out.gguf", expect=5)
    library = CommandLine(disk / "home", localmix.folder)
    assert str(disk) in library.fails("convert", "fox", expect=5)


@posix
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_limit_on_file_sizes(localmix: CommandLine, unchanged: Callable[[], None], share: float) -> None:
    import resource

    localmix(*QUANTIZE)
    limit = int((localmix.folder / "out.gguf").stat().st_size * share)
    unchanged()
    run = localmix(*QUANTIZE, expect=4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert "larger than its file system allows" in run.err


@pytest.fixture
def slow(localmix: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """With `big-BF16.gguf`, which takes seconds to quantize with ggml's own kernels."""
    monkeypatch.setenv("LOCALMIX_KERNELS", "ggml")
    write_checkpoint(localmix.folder / "big", Shape(hidden=512, feed_forward=1024, layers=4))
    localmix("convert", "big", "-o", "big-BF16.gguf")
    return localmix


def start_and_hold_in_the_middle(localmix: CommandLine) -> subprocess.Popen[str]:
    """A run that is stopped, like with Ctrl-Z, as soon as it has its partial file: SIGCONT lets it go on."""
    process = localmix.popen("quantize", "Q4_K", "big-BF16.gguf", "-o", "out.gguf", "--threads", "1")
    until = time.monotonic() + 30
    partial = localmix.folder / ".out.gguf.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    return process


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_a_quantization_leaves_nothing(
    slow: CommandLine, unchanged: Callable[[], None], number: signal.Signals
) -> None:
    (slow.folder / "out.gguf").write_bytes(b"the earlier file")
    unchanged()
    process = start_and_hold_in_the_middle(slow)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "Stopped.\n")


@posix
def test_a_killed_quantization_is_swept_by_the_next(slow: CommandLine) -> None:
    (slow.folder / "out.gguf").write_bytes(b"the earlier file")
    process = start_and_hold_in_the_middle(slow)
    process.kill()
    process.communicate()
    assert (slow.folder / "out.gguf").read_bytes() == b"the earlier file"
    slow("quantize", "Q4_K", "big-BF16.gguf", "-o", "out.gguf")
    assert not list(slow.folder.glob(".*.partial"))
    slow("quantize", "Q4_K", "big-BF16.gguf", "-o", "quiet.gguf")
    assert (slow.folder / "out.gguf").read_bytes() == (slow.folder / "quiet.gguf").read_bytes()


@posix
def test_two_runs_for_one_output(slow: CommandLine) -> None:
    first = start_and_hold_in_the_middle(slow)
    try:
        words = slow.fails("quantize", "Q8_0", "big-BF16.gguf", "-o", "out.gguf", expect=5)
        assert "Another run" in words
    finally:
        first.kill()
        first.communicate()


def test_a_question_that_is_no_text(localmix: CommandLine) -> None:
    process = localmix.popen(*CHAT[:2], stdin=subprocess.PIPE, text=False, encoding=None)
    _, err = process.communicate(b"\xff\xfe\x00", timeout=60)
    assert process.returncode == 3
    assert b"not UTF-8" in err
    assert "empty" in localmix.fails(*CHAT[:2], stdin="  \n", expect=2)
    assert "MiB" in localmix.fails(*CHAT[:2], stdin="y\n" * 2**22, expect=3)


def test_any_part_of_a_split_file_is_the_whole(localmix: CommandLine) -> None:
    localmix("quantize", "Q8_0", "fox-BF16.gguf", "--split-max-size", "1MB", "-o", "sp.gguf", "--threads", "1")
    last = max(localmix.folder.glob("sp-*.gguf"))
    assert "-00001-of" not in last.name
    localmix("chat", last.name, *CHAT[2:], "--threads", "1")


@posix
def test_little_memory_is_a_sentence(localmix: CommandLine) -> None:
    """A context that the formula allows and the system then does not give."""
    import resource

    limit = 3 * 2**30
    run = localmix(
        *CHAT[:4],
        "--ctx",
        "4000000",
        "--force",
        expect=4,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert "failed to allocate" in run.err
