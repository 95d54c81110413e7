"""`localmix fit`, and the memory check of what loads a model: what is said, what is refused, and a real cgroup."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from localmix.capacity import memory
from localmix.capacity.fit import Examiner, Wish
from localmix.capacity.memory import Available
from localmix.capacity.simulation import skeleton
from localmix.cli.console import Console
from localmix.cli.memory_check import MemoryCheck, _draw_need, _sentence
from localmix.errors import CapacityError
from localmix.native.devices import PROCESSOR, Device
from localmix.sizes import GIB
from tests.commands import CommandLine
from tests.memory_jobs import hollow, write_config


def test_fit_prints_types_by_contexts(localmix: CommandLine) -> None:
    write_config(localmix.folder / "mixtral")
    run = localmix("fit", "mixtral", "Q4_K", "IQ2_S", "--ram", "16")
    assert [line.split()[0] for line in run.out.splitlines()[2:4]] == ["Q4_K_M", "IQ2_S"]
    assert run.out.splitlines()[0].split() == ["Type", "2K", "4K", "8K", "16K", "32K"]
    assert "loads 27.1" in run.out and "well 13.7" in run.out
    assert "14.3 GiB: a machine with 16 GB" in run.out
    markdown = localmix("fit", "mixtral", "IQ2_S", "--ram", "16", "--ctx", "5000", "--markdown").out
    assert markdown.startswith("| Type") and "5000" in markdown


def test_fit_as_json(localmix: CommandLine) -> None:
    found = localmix("fit", "--kv-type", "q8_0", "--json").json  # the model used last
    assert found["simulated"] is True and found["kv_type"] == "q8_0"
    names = {entry["type"]: entry for entry in found["types"]}
    assert names["BF16"]["in_library"] is True and names["Q4_K_M"]["in_library"] is False
    cells = names["Q8_0"]["cells"]
    assert [cell["ctx"] for cell in cells] == found["contexts"] == sorted(found["contexts"])
    assert all(0 < cell["anonymous"] < cell["total"] for cell in cells)
    assert {cell["verdict"] for cell in cells} == {"runs well"}


def test_fit_says_what_is_wrong(localmix: CommandLine) -> None:
    assert "nothing" in localmix.fails("fit", "nothing", expect=2)
    assert "Q9" in localmix.fails("fit", "fox", "Q9_K", expect=2)
    assert "no size" in localmix.fails("fit", "--ram", "much", expect=2)
    (localmix.folder / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    localmix.fails("fit", "broken.gguf", expect=3)


def test_plan_tells_loading_from_running_well(localmix: CommandLine) -> None:
    write_config(localmix.folder / "mixtral")
    arguments = ("plan", "mixtral", "Q4_K", "IQ2_S", "--ram", "16")
    run = localmix(*arguments)
    rows = {line.split()[0]: line for line in run.out.splitlines()}
    assert rows["Q4_K_M"].endswith("loads") and rows["IQ2_S"].endswith("runs well")
    large, small = localmix(*arguments, "--json").json["types"]
    assert (large["verdict"], large["fits"]) == ("loads", False)
    assert (small["verdict_16gb"], small["fits_16gb"]) == ("runs well", True)
    assert large["need"]["total"] == sum(large["need"][part] for part in ("weights", "kv", "compute", "other"))
    smaller = localmix(*arguments, "--json", "--kv-type", "q8_0").json["types"][0]["need"]
    assert smaller["kv"] == large["need"]["kv"] * 34 // 64


@pytest.fixture
def mixtral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mixtral-8x7B in Q4_K_M, whose weights are a hole."""
    monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path / "home"))
    target = tmp_path / "mixtral-Q4_K_M.gguf"
    with skeleton(hollow(write_config(tmp_path / "config"), "Q4_K_M")) as path:
        os.replace(path, target)
    return target


def give(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(memory, "available", lambda: Available(int(gigabytes * GIB), "what a test leaves"))


def test_what_loads_goes_on_with_a_warning(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, 14)
    choice = MemoryCheck(Console(), None, device="cpu").check(mixtral, force=False)
    assert choice.context == 4096 and choice.placement == PROCESSOR and not choice.repack
    said = capsys.readouterr().err
    assert "needs 27.31 GiB of memory, but 14.00 GiB is available: what a test leaves." in said
    assert "13.31 GiB of its weights are read from the disk again and again" in said
    assert "`--kv-type q8_0` saves 0.23 GiB." in said


def test_what_does_not_load_is_refused(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, 2)
    check = MemoryCheck(Console(), 32768, device="cpu")
    with pytest.raises(CapacityError) as caught:
        check.check(mixtral, force=False)
    assert "needs 4.35 GiB of memory besides its weights, but 2.00 GiB is available" in caught.value.message
    for remedy in ("--ctx ", "--kv-type q8_0", "--force"):
        assert remedy in caught.value.hint
    assert "KV cache of 32768 positions in f16" in capsys.readouterr().err
    assert check.check(mixtral, force=True).context == 32768


def test_a_command_with_options_of_its_own_names_them(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, 1)
    check = MemoryCheck(Console(), 32768, kv_type="q5_1", device="cpu")
    with pytest.raises(CapacityError) as caught:
        check.admit(mixtral, False, "Ask for less.")
    assert caught.value.hint == "Ask for less. Or go on anyway with --force."
    assert "KV cache of 32768 positions in q5_1" in capsys.readouterr().err
    check.admit(mixtral, True, "Ask for less.")
    assert "but 1.00 GiB is available: what a test leaves. Ask for less." in " ".join(capsys.readouterr().err.split())
    with pytest.raises(CapacityError) as caught:
        MemoryCheck(Console(), 1 << 25, device="cpu").admit(mixtral, True, "Ask for less.")
    assert caught.value.hint == "Ask for less."
    give(monkeypatch, 14)
    MemoryCheck(Console(), None, device="cpu").admit(mixtral, False, "Ask for less.")
    said = capsys.readouterr().err
    assert "read from the disk again and again" in said and "Ask for less" not in said


def test_what_is_computed_at_once_counts(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 2)
    MemoryCheck(Console(), 4096, device="cpu").admit(mixtral, False, "Ask for less.")
    with pytest.raises(CapacityError):
        MemoryCheck(Console(), 4096, device="cpu", batch=4096).admit(mixtral, False, "Ask for less.")


def test_a_command_that_measures_is_only_warned(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, 2)
    check = MemoryCheck(Console(), 32768, gpu_layers=5)
    choice = check.advise(mixtral)
    assert choice.placement == PROCESSOR and not choice.repack
    said = capsys.readouterr().err
    assert "needs 4.35 GiB of memory besides its weights, but 2.00 GiB is available" in said
    assert "--gpu-layers 5 does nothing" in said
    check.advise(mixtral)
    assert "--gpu-layers" not in capsys.readouterr().err


def test_of_several_numbers_of_slots_the_first_that_fits_is_taken(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, 28.2)
    check = MemoryCheck(Console(), None, device="cpu", slots=(4, 2, 1))
    choice = check.check(mixtral, force=False)
    assert choice.slots == 2 and choice.context == 4096
    check.reserve(mixtral)
    with pytest.raises(CapacityError):
        check.check(mixtral, force=False)


def test_a_gpu_that_is_too_small_is_named(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = Device("CUDA0", "a card", "gpu", 12 * GIB, 12 * GIB)
    room = memory.machine(64)
    full = Examiner(Wish(gpu_layers=33, experts="gpu"), room, [card]).examine(mixtral)
    assert "puts 27." in _sentence(full) and "on CUDA0, which has 12.00 GiB free" in _sentence(full)
    part = Examiner(Wish(), room, [card]).examine(mixtral)
    _draw_need(Console(), part)
    said = capsys.readouterr().err
    kept = part.placement.cpu_expert_layers
    assert f"33 layers on CUDA0; the experts of the first {kept} layers stay in the processor's memory." in said
    assert "free on CUDA0" in said


@contextmanager
def own_cgroup(limit: int) -> Iterator[tuple[Path, str]]:
    """A memory cgroup below this process's own: its folder, and its name as the kernel tells it."""
    root, path = Path("/sys/fs/cgroup"), ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            parent, file = root / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
            break
        if not controllers and (root / "cgroup.controllers").exists():
            parent, file = root / path.lstrip("/"), "memory.max"
            break
    else:
        pytest.skip("no memory cgroups here")
    name = f"localmix-{uuid.uuid4().hex[:8]}"
    folder = parent / name
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"a cgroup cannot be made here: {error}")
    try:
        try:
            (folder / file).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"a cgroup's memory cannot be limited here: {error}")
        yield folder, f"{path.rstrip('/')}/{name}"
    finally:
        folder.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_the_limit_of_a_real_cgroup_is_found_and_named(localmix: CommandLine) -> None:
    with own_cgroup(GIB) as (folder, name):
        enter = f"import os, sys; open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()));"

        def inside(*arguments: str) -> subprocess.CompletedProcess[str]:
            program = f"{enter} os.execv(sys.executable, [sys.executable, '-m', 'localmix', *{list(arguments)!r}])"
            return subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True,
                text=True,
                check=False,
                cwd=localmix.folder,
                env=localmix.environment,
                timeout=120,
            )

        planned = inside("plan", "fox", "Q8_0")
        assert planned.returncode == 0, planned.stderr
        assert f"the 1.00 GiB limit of cgroup {name}" in planned.stdout
        refused = inside("chat", "fox", "-p", "x", "--ctx", "1000000")
        assert refused.returncode == 4, refused.stdout + refused.stderr
        assert f"the 1.00 GiB limit of cgroup {name}" in refused.stderr
