"""A real llama-server under supervision: loading, crashes, failures, and its end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from localmix.conversation.chat_events import DraftSettings
from localmix.errors import CapacityError, FileError, InputError, LocalmixError, UsageError
from localmix.rope_scaling import RopeScaling
from localmix.serving import engine as engine_module
from localmix.serving.engine import Engine, EngineEvent, GivenUp, Restarted, Restarting, explain_end
from localmix.serving.engine_options import EngineOptions
from tests.conftest import ROOT

pytestmark = [pytest.mark.upstream, pytest.mark.skipif(os.name == "nt", reason="signals")]


@pytest.fixture
def program(upstream: Path) -> Path:
    return upstream / "llama-server"


def options(model: Path, **changes: object) -> EngineOptions:
    return EngineOptions(model, "tinymix", 256, threads=1, **changes)  # type: ignore[arg-type]


def run(
    engine: Engine, use: Callable[[Engine], Awaitable[None]], report: Callable[[float], None] | None = None
) -> None:
    """Start an engine, do something with it, and stop it."""

    async def main() -> None:
        try:
            await (engine.start(report) if report else engine.start())
            await use(engine)
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


async def nothing(engine: Engine) -> None:
    assert engine.state == "ready"


async def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def test_it_loads_answers_and_leaves_nothing(program: Path, tinymix_bf16: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    lines: list[str] = []
    engine = Engine(program, options(tinymix_bf16, slots=2), tmp_path, lines.append)
    pids = []

    async def use(engine: Engine) -> None:
        assert engine.state == "ready" and engine.failure is None
        assert [path.suffix for path in tmp_path.iterdir()] == [".sock"]
        assert await engine.ask("/v1/models") == 200 and await engine.ask("/nothing") == 404
        pids.append(engine.pid)

    run(engine, use, shares.append)
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    assert any("n_slots = 2, n_ctx_slot = 256" in line for line in lines)
    assert not any("cmd_child" in line for line in lines)
    assert engine.pid is None and not psutil.pid_exists(pids[0] or 0) and not list(tmp_path.iterdir())


def test_all_settings_are_taken(program: Path, tinymix_bf16: Path, tmp_path: Path) -> None:
    """llama-server knows every argument, and says what became of it."""
    lines: list[str] = []
    more = {"further": ("--verbosity", "4")}
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'] }}")
    settings = options(
        tinymix_bf16,
        slots=2,
        kv_type="q8_0",
        repack=False,
        rope=RopeScaling("yarn", 2.0, original_context=1024),
        rope_base=20000.0,
        draft=DraftSettings(tinymix_bf16, 3),
        template=template,
        cache_bytes=64 * 2**20,
        **more,
    )
    run(Engine(program, settings, tmp_path, lines.append), nothing)
    log = "\n".join(lines)
    for said in ("2/2 seqs), K (q8_0)", "custom YaRN scaling", "implementation 'draft-simple'", "n_max=3"):
        assert said in log, said
    for name, value in (("freq_base", "20000.0"), ("freq_scale", "0.5")):
        assert re.search(rf"llama_context: {name} += {value}", log)
    assert "CPU_REPACK" not in log
    lines.clear()
    run(Engine(program, options(tinymix_bf16, draft=DraftSettings(None, 16), **more), tmp_path, lines.append), nothing)
    assert any("implementation 'ngram-simple'" in line for line in lines)


def test_a_crash_is_told_and_repaired_until_there_are_too_many(
    program: Path, tinymix_bf16: Path, tmp_path: Path
) -> None:
    told: list[EngineEvent] = []
    engine = Engine(program, options(tinymix_bf16), tmp_path, tell=told.append, pauses=(0.05, 0.1))

    def has_told(count: int) -> bool:
        return len(told) == count and engine.state == "ready"

    async def use(engine: Engine) -> None:
        for number in (1, 2):
            before = engine.pid
            os.kill(before or 0, signal.SIGKILL)
            await until(partial(has_told, 2 * number))
            assert engine.pid != before and await engine.ask("/health") == 200
        os.kill(engine.pid or 0, signal.SIGKILL)
        await asyncio.wait_for(engine.wait_failed(), 5)
        assert engine.state == "failed" and "was killed" in (engine.failure or "")
        with pytest.raises(CapacityError):
            await engine.wait_ready()

    run(engine, use)
    reason = f"{tinymix_bf16.name}: llama-server was killed, most likely because memory ran out."
    assert told == [
        Restarting("tinymix", reason, 1, 2, 0.05),
        Restarted("tinymix"),
        Restarting("tinymix", reason, 2, 2, 0.1),
        Restarted("tinymix"),
        GivenUp("tinymix", reason),
    ]


def test_what_hangs_is_ended_and_started_again(
    program: Path, tinymix_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_LOOK_SECONDS", 0.05)
    told: list[EngineEvent] = []
    engine = Engine(program, options(tinymix_bf16), tmp_path, tell=told.append, pauses=(0.05,), patience=1.0)
    many_ways = {"prompt": "a", "n_predict": 50, "grammar": "root ::= [a-z]{0,1000} a{0,1000}\na ::= [a-z]{0,1000}"}

    async def use(engine: Engine) -> None:
        await asyncio.sleep(1.5)
        assert not told, "it answers"
        _, writer = await asyncio.open_unix_connection(engine.address.socket)
        body = json.dumps(many_ways).encode()
        writer.write(b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: len(told) == 2)
        writer.close()
        assert engine.state == "ready" and await engine.ask("/health") == 200

    run(engine, use)
    reason = "tinymix: its llama-server has answered nothing for 1 seconds."
    assert told == [Restarting("tinymix", reason, 1, 1, 0.05), Restarted("tinymix")]


def test_what_does_not_start_says_why(program: Path, tinymix_bf16: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    shutil.copy(tinymix_bf16, broken)
    os.truncate(broken, 4_000_000)
    template = tmp_path / "broken.jinja"
    template.write_text("{{ one %}")
    cases: list[tuple[EngineOptions, Path, type[LocalmixError], str]] = [
        (options(broken), program, InputError, "broken.gguf: tensor '.*' data is not within the file bounds"),
        (options(tinymix_bf16, further=("--no-such",)), program, UsageError, "does not know the argument --no-such"),
        (options(tinymix_bf16, further=("--temp", "hot")), program, UsageError, 'refuses the argument "--temp"'),
        (options(tinymix_bf16, template=template), program, InputError, "chat template is not supported: {{ one %}"),
        (options(tinymix_bf16), tmp_path / "none", FileError, "none cannot be started"),
        (options(tinymix_bf16, kv_type="q4_0", further=("-fa", "off")), program, InputError, "requires flash_attn"),
    ]
    for settings, chosen, kind, words in cases:
        engine = Engine(chosen, settings, tmp_path)
        with pytest.raises(kind, match=words):
            run(engine, nothing)
        assert engine.state == "failed" and engine.pid is None
    assert not list(tmp_path.glob("*.sock"))


def test_a_bug_of_ours_is_raised_and_not_waited_for(program: Path, tinymix_bf16: Path, tmp_path: Path) -> None:
    engine = Engine(program, options(tinymix_bf16, further=("--no-such",)), tmp_path, blame=lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        run(engine, nothing)
    assert engine.pid is None


def test_without_unix_sockets_a_key_guards_the_port(
    program: Path, tinymix_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_UNIX_SOCKETS", False)

    async def use(engine: Engine) -> None:
        assert engine.address.socket is None and await engine.ask("/v1/models") == 200
        stranger = http.client.HTTPConnection("127.0.0.1", engine.address.port, timeout=10)
        stranger.request("GET", "/props")
        assert stranger.getresponse().status == 401
        stranger.close()
        assert engine.address.key not in " ".join(psutil.Process(engine.pid).cmdline())

    run(Engine(program, options(tinymix_bf16), tmp_path), use)


def test_it_ends_when_its_stdin_does(program: Path, tinymix_bf16: Path, tmp_path: Path) -> None:
    """How it ends with its parent where the kernel does not see to that."""
    told: list[EngineEvent] = []

    async def use(engine: Engine) -> None:
        assert engine._process is not None and engine._process.stdin is not None
        engine._process.stdin.close()
        await until(lambda: bool(told))

    run(Engine(program, options(tinymix_bf16), tmp_path, tell=told.append), use)


PARENT = """
import asyncio, sys
from pathlib import Path
from localmix.serving.engine import Engine
from localmix.serving.engine_options import EngineOptions

async def main():
    engine = Engine(Path(sys.argv[1]), EngineOptions(Path(sys.argv[2]), "tinymix", 256, threads=1), Path(sys.argv[3]))
    starting = asyncio.ensure_future(engine.start())
    while engine.pid is None:
        await asyncio.sleep(0)
    if sys.argv[4] == "ready":
        await starting
    print(engine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part")
@pytest.mark.parametrize("moment", ["starting", "ready"])
def test_no_orphan_stays_behind_a_killed_parent(program: Path, tinymix_bf16: Path, tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-c", PARENT, str(program), str(tinymix_bf16), str(tmp_path), moment]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([server], timeout=5)[1]


LOADING = "0.00.023.133 E llama_model_load: error loading model: unknown model architecture: 'odd'"


@pytest.mark.parametrize(
    ("status", "lines", "kind", "words"),
    [
        (-9, [], CapacityError, "m.gguf: llama-server was killed, most likely because memory ran out."),
        (-15, [], InputError, "m.gguf: somebody stopped its llama-server."),
        (-11, ["0.01 I srv listening"], InputError, "m.gguf makes llama.cpp crash (SIGSEGV)."),
        (
            -6,
            ["0.01 E srv x: earlier", "/src/ggml/src/ggml.c:1: GGML_ASSERT(a) failed"],
            InputError,
            "m.gguf makes llama.cpp abort: ggml.c:1: GGML_ASSERT(a) failed.",
        ),
        (-7, [], InputError, "m.gguf could not be read to its end: it is truncated, or its disk failed."),
        (
            1,
            ["0.01 I a", LOADING, "0.02 E srv load_model: failed"],
            InputError,
            "llama-server ended with m.gguf: unknown model architecture: 'odd'.",
        ),
        (
            1,
            ["0.01 E ggml_backend_cpu: failed to allocate buffer of size 5"],
            CapacityError,
            "m.gguf does not fit into memory: failed to allocate buffer of size 5.",
        ),
        (1, [], InputError, "llama-server ended with m.gguf, status 1."),
        (
            127,
            ["error while loading shared libraries: libcuda.so.1: cannot open shared object file"],
            InputError,
            "llama-server ended with m.gguf, status 127: error while loading shared libraries: libcuda.so.1: cannot"
            " open shared object file.",
        ),
    ],
)
def test_ends_as_sentences(status: int, lines: list[str], kind: type[LocalmixError], words: str) -> None:
    error = explain_end(status, lines, Path("m.gguf"))
    assert type(error) is kind and error.message == words


def test_a_crash_over_a_request_blames_no_file() -> None:
    lines = ["0.00.1 E parse: unsupported grammar", "sampling.cpp:99: GGML_ASSERT(false) failed"]
    error = explain_end(-signal.SIGABRT, lines, Path("m.gguf"), answered=True)
    assert "while it answered (SIGABRT: " in error.message and "GGML_ASSERT(false) failed" in error.message
    assert "unsupported" not in error.message
    assert explain_end(-signal.SIGSEGV, [], Path("m.gguf"), answered=True).message == (
        "m.gguf: its llama-server crashed while it answered (SIGSEGV)."
    )
    assert "memory ran out" in explain_end(-signal.SIGKILL, [], Path("m.gguf"), answered=True).message
    assert "(status 3)" in explain_end(3, [], Path("m.gguf"), answered=True).message
