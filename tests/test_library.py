"""What a name means, which file is meant, and what `rm` may delete."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from localmix import library
from localmix.downloads.pull_record import Pulled, read_record, write_record
from localmix.errors import FileError, InputError, LocalmixError, UsageError
from localmix.library import Purpose, resolve


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def put(home: Path, model: str, kind: str, size: int = 1000) -> Path:
    path = home / model / f"{model}-{kind}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tinymix-Q4_K_M.gguf", ("tinymix", "Q4_K_M")),
        ("Mixtral-8x7B-v0.1.IQ2_XXS.gguf", ("Mixtral-8x7B-v0.1", "IQ2_XXS")),
        ("model-bf16.gguf", ("model", "BF16")),
        ("model-IQ3_XXS-2024-01.gguf", ("model", "IQ3_XXS-2024-01")),
        ("model-MXFP4_MOE.gguf", ("model", "MXFP4_MOE")),
        ("ggml-model-q4_k-im.gguf", ("ggml-model", "Q4_K-IM")),
        ("model.IQ2_XS-imat.gguf", ("model", "IQ2_XS-IMAT")),
        ("tinymix-3.50bpw.gguf", ("tinymix", "3.50bpw")),
        ("Mixtral-8x7B-v0.1-12.0GiB.gguf", ("Mixtral-8x7B-v0.1", "12.0GiB")),
        ("tinymix-2799104B.gguf", ("tinymix", "2799104B")),
        ("Qwen2.5-0.5B.gguf", ("Qwen2.5-0.5B", "")),
        ("Llama-2-7B.gguf", ("Llama-2-7B", "")),
        ("model.gguf", ("model", "")),
        ("Q4_K_M.gguf", ("Q4_K_M", "")),
        ("folder", ("folder", "")),
    ],
)
def test_a_file_name_tells_model_and_type(home: Path, name: str, expected: tuple[str, str]) -> None:
    assert library.split_name(Path(name)) == expected


def test_in_the_library_the_folder_is_the_model(home: Path) -> None:
    path = put(home, "my-Q8_0-mix", "special")
    assert library.split_name(path) == ("my-Q8_0-mix", "special")
    assert resolve("my-Q8_0-mix:SPECIAL", Purpose.RUN) == path


def test_an_empty_library_says_how_to_begin(home: Path) -> None:
    for purpose in Purpose:
        with pytest.raises(UsageError, match="localmix convert"):
            resolve(None, purpose)
    assert library.models() == []


def test_each_purpose_takes_its_file(home: Path) -> None:
    full, large, small = put(home, "m", "BF16", 900), put(home, "m", "Q8_0", 500), put(home, "m", "Q2_K", 100)
    assert resolve("m", Purpose.SOURCE) == full
    assert resolve("m", Purpose.PRECISE) == full
    assert resolve("m", Purpose.MEASURE) == full
    assert resolve("m", Purpose.RUN) == large
    assert resolve("m", Purpose.RUN, fits=lambda file: file.bytes < 200) == small
    assert resolve("m", Purpose.RUN, fits=lambda file: False) == small
    full.unlink()
    assert resolve("m", Purpose.PRECISE) == large
    with pytest.raises(InputError, match="full precision"):
        resolve("m", Purpose.SOURCE)


def test_the_checkpoint_stands_in_for_a_source_that_was_deleted(home: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "m"
    checkpoint.mkdir()
    full = put(home, "m", "BF16")
    put(home, "m", "Q8_0")
    library.remember(full, source=checkpoint)
    full.unlink()
    assert resolve(None, Purpose.SOURCE) == checkpoint
    assert resolve("m", Purpose.CHECKPOINT) == checkpoint
    checkpoint.rmdir()
    with pytest.raises(InputError, match="checkpoint"):
        resolve(None, Purpose.SOURCE)


def test_what_was_used_last(home: Path) -> None:
    full, large, small = put(home, "m", "BF16", 900), put(home, "m", "Q8_0", 500), put(home, "m", "Q2_K", 100)
    put(home, "other", "Q4_0")
    with pytest.raises(UsageError, match="none was used before"):
        resolve(None, Purpose.RUN)
    library.remember(small)
    assert resolve(None, Purpose.RUN) == resolve(None, Purpose.MEASURE) == small
    assert resolve(None, Purpose.SOURCE) == resolve(None, Purpose.PRECISE) == full
    library.remember(full)
    assert resolve(None, Purpose.MEASURE) == full
    assert resolve(None, Purpose.RUN) == large
    library.remember([full, small])
    assert resolve(None, Purpose.RUN) == large
    library.remember(small)
    small.unlink()
    assert resolve(None, Purpose.RUN) == large


def test_a_file_outside_is_remembered_too(home: Path, tmp_path: Path) -> None:
    put(home, "m", "Q8_0")
    path = tmp_path / "elsewhere-Q4_0.gguf"
    path.write_bytes(b"x")
    library.remember(path)
    assert resolve(None, Purpose.RUN) == path
    path.unlink()
    assert resolve(None, Purpose.RUN).name == "m-Q8_0.gguf"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"model": 3, "checkpoints": []}',
        "\x00\x01",
        '{"file": null}',
        "[" * 200_000,
        '{"checkpoints": {"m": 5}}',
    ],
    ids=lambda content: content[:20],
)
def test_a_broken_state_file_is_as_none(home: Path, content: str) -> None:
    path = put(home, "m", "Q8_0")
    (home / "state.json").write_text(content)
    assert resolve(None, Purpose.RUN) == path
    library.remember(path)
    assert resolve(None, Purpose.RUN) == path


def test_short_types_mean_the_m_mixture(home: Path) -> None:
    path = put(home, "m", "Q4_K_M")
    assert resolve("m:Q4_K", Purpose.RUN) == resolve("m:q4_k_m", Purpose.RUN) == path
    with pytest.raises(UsageError, match=r"it has Q4_K_M.*localmix quantize Q9 m"):
        resolve("m:Q9", Purpose.RUN)


def test_a_bare_name_is_the_library_and_a_path_is_a_path(home: Path, tmp_path: Path) -> None:
    inside = put(home, "m", "BF16")
    (tmp_path / "m").mkdir()
    assert resolve("m", Purpose.SOURCE) == inside
    assert resolve("./m", Purpose.SOURCE) == Path("m")
    assert resolve(tmp_path / "m", Purpose.SOURCE) == tmp_path / "m"
    with pytest.raises(UsageError, match="localmix convert"):
        resolve("./m", Purpose.RUN)


def test_an_unknown_name_lists_what_there_is(home: Path) -> None:
    put(home, "m", "Q8_0")
    with pytest.raises(UsageError, match=r"m \(Q8_0\)"):
        resolve("n", Purpose.RUN)
    with pytest.raises(FileError, match="does not exist"):
        resolve("no/such.gguf", Purpose.RUN)


def test_names_made_from_paths_are_plain(home: Path) -> None:
    assert library.model_name(Path("/x/Mixtral 8x7B (new)")) == "Mixtral-8x7B-new"
    assert library.model_name(Path("/")) == "model"
    assert library.model_name(Path("/x/..hidden-Q8_0.gguf")) == "hidden"
    assert library.output_path(Path("/x/中文-BF16.gguf"), "Q8_0") == home / "中文" / "中文-Q8_0.gguf"


def test_an_imatrix_is_found_in_the_library_or_beside_the_file(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "m-BF16.gguf"
    assert library.find_imatrix(source) is None
    beside = tmp_path / "m.imatrix.gguf"
    beside.write_bytes(b"x")
    assert library.find_imatrix(source) == beside
    inside = put(home, "m", "Q8_0").parent / "m.imatrix.gguf"
    inside.write_bytes(b"x")
    assert library.find_imatrix(source) == inside
    assert [file.type for file in library.models()[0].files] == ["Q8_0"]
    assert library.models()[0].imatrix == inside


def test_newer_than_its_inputs(home: Path) -> None:
    source, output = put(home, "m", "BF16"), put(home, "m", "Q8_0")
    now = time.time()
    os.utime(source, (now, now))
    os.utime(output, (now - 9, now - 9))
    assert not library.is_newer(output, [source])
    os.utime(output, (now + 9, now + 9))
    assert library.is_newer(output, [source])
    assert not library.is_newer(home / "nothing", [source])


@pytest.mark.parametrize("name", ["..", ".", "../x", "/etc", "m/../..", "a/b", "", ":Q8_0", ".hidden", "nobody", "~"])
def test_rm_takes_names_of_the_library_only(home: Path, name: str) -> None:
    put(home, "m", "Q8_0")
    with pytest.raises(UsageError):
        library.plan_removal(name)


def test_rm_does_not_follow_links_out_of_the_library(home: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "m", "Q8_0")
    home.mkdir()
    (home / "m").symlink_to(tmp_path / "elsewhere" / "m")
    with pytest.raises(UsageError, match="out of the library"):
        library.plan_removal("m")

    target = tmp_path / "precious.gguf"
    target.write_bytes(b"x")
    put(home, "n", "Q8_0")
    (home / "n" / "n-Q4_0.gguf").symlink_to(target)
    library.remove(library.plan_removal("n"))
    assert target.exists()
    assert not (home / "n").exists()


def test_rm_deletes_nothing_that_a_folder_of_somebody_elses_leads_to(home: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    precious = mine / "precious.txt"
    precious.write_text("x")
    pulled = library.pulled_folder("m")
    put(home, "m", "Q8_0")
    pulled.mkdir()
    (pulled / "link").symlink_to(mine)
    (home / "m" / ".download").symlink_to(mine)
    (pulled / "config.json").write_text("{}")
    places = ("config.json", "../../../mine/precious.txt", str(precious), "link/precious.txt", "..\\x", "C:x")
    write_record(pulled, {place: Pulled("org/m", "0", "name", 1, "", "", 0) for place in places})
    assert set(read_record(pulled)) == {"config.json", "link/precious.txt"}
    library.remove(library.plan_removal("m"))
    assert precious.exists()
    assert not (pulled / "config.json").exists()


def test_rm_of_a_model_takes_leftovers_and_leaves_what_is_not_ours(home: Path) -> None:
    path = put(home, "m", "Q8_0")
    for name in ("m.imatrix.gguf", ".m-Q4_0.gguf.partial", ".m-Q4_0.gguf.journal", "m-notes.txt", "other.gguf"):
        (path.parent / name).write_bytes(b"x")
    library.remove(library.plan_removal("m"))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["m-notes.txt", "other.gguf"]


def test_completion_gives_names_and_files(home: Path) -> None:
    put(home, "m", "Q8_0")
    put(home, "mixed", "Q4_0")
    assert [name for name, _ in library.complete("m")] == ["m", "m:Q8_0", "mixed", "mixed:Q4_0"]
    assert [name for name, _ in library.complete("m:")] == ["m:Q8_0"]


def test_a_home_that_is_no_folder_is_a_file_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path / "home"))
    with pytest.raises(FileError):
        library.models()
    with pytest.raises(LocalmixError):
        library.make_room(tmp_path / "home" / "m" / "m-Q8_0.gguf")
    library.remember(tmp_path / "x.gguf")  # a convenience: no error


def test_of_several_files_elsewhere_the_first_is_used_last(home: Path, tmp_path: Path) -> None:
    files = [tmp_path / "multi" / f"x-{kind}.gguf" for kind in ("Q8_0", "Q4_0")]
    files[0].parent.mkdir()
    for path in files:
        path.write_bytes(b"x")
    library.remember(files)
    assert resolve(None, Purpose.RUN) == files[0]


def test_two_models_of_one_name_share_nothing(home: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "m", tmp_path / "b" / "m"
    file, twin = tmp_path / "a" / "m-BF16.gguf", tmp_path / "b" / "m-BF16.gguf"
    for folder in (first, second):
        folder.mkdir(parents=True)
    file.write_bytes(b"x")
    twin.write_bytes(b"y")
    inside = put(home, "m", "Q8_0")
    (inside.parent / "m.imatrix.gguf").write_bytes(b"x")
    for other in (first, second, file, twin):
        assert library.output_path(other, "Q8_0") == inside  # nobody knows where it came from

    library.remember(inside, source=first)
    assert library.output_path(first, "Q8_0") == inside
    assert library.output_path(inside, "Q4_0").parent == inside.parent
    for other in (second, file, twin):
        with pytest.raises(UsageError, match=f"made from {first}"):
            library.output_path(other, "Q8_0")
        with pytest.raises(UsageError, match="localmix rm m"):
            library.imatrix_output_path(other)
        assert library.find_imatrix(other) is None
    link = tmp_path / "m-Q8_0.gguf"
    os.link(inside, link)
    assert library.output_path(link, "Q4_0").parent == inside.parent

    library.remove(library.plan_removal("m"))
    library.remember(put(home, "m", "Q8_0"), source=file)
    assert library.output_path(file, "Q4_0").parent == inside.parent
    with pytest.raises(UsageError, match="another m"):
        library.output_path(twin, "Q4_0")


def test_only_what_lies_in_the_library_has_a_source(home: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "m", tmp_path / "b" / "m"
    for folder in (first, second):
        folder.mkdir(parents=True)
    library.remember(put(home, "m", "Q8_0"), source=first)
    library.remember(tmp_path / "m-Q8_0.gguf", source=second)
    assert resolve("m", Purpose.CHECKPOINT) == first


def test_a_path_that_is_not_utf8_is_remembered(home: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"bad\xff-Q8_0.gguf")
    try:
        path.write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    library.remember(path)
    assert resolve(None, Purpose.RUN) == path


def test_a_link_that_leads_nowhere_is_no_file(home: Path) -> None:
    put(home, "m", "Q8_0")
    (home / "m" / "m-Q4_0.gguf").symlink_to("nowhere")
    assert [file.type for file in library.models()[0].files] == ["Q8_0"]


def test_no_empty_folder_stays_of_a_failure(home: Path) -> None:
    def fail(path: Path) -> None:
        with pytest.raises(InputError), library.room_for(path):
            assert path.parent.is_dir()
            raise InputError("broken")

    fail(home / "m" / "m-Q8_0.gguf")
    assert not (home / "m").exists()
    earlier = put(home, "n", "Q8_0")
    fail(home / "n" / "n-Q4_0.gguf")
    assert earlier.exists()


def test_runs_at_the_same_time_lose_nothing_of_the_state(home: Path, tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(4)]
    jobs = [multiprocessing.get_context("spawn").Process(target=_note, args=(home, name)) for name in names]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
        assert job.exitcode == 0
    assert all(resolve(name, Purpose.CHECKPOINT) == home.parent / name for name in names)


def _note(home: Path, name: str) -> None:
    (home.parent / name).mkdir()
    for _ in range(20):
        library.remember(put(home, name, "Q8_0"), source=home.parent / name)


def test_any_piece_of_a_cut_file_means_the_whole(tmp_path: Path) -> None:
    for letter in "abc":
        (tmp_path / f"fox.Q4_K_M.gguf-split-{letter}").write_bytes(b"")
    first = tmp_path / "fox.Q4_K_M.gguf-split-a"
    assert library.resolve(tmp_path / "fox.Q4_K_M.gguf-split-c", library.Purpose.SOURCE) == first
    assert library.split_name(first) == ("fox", "Q4_K_M")
    with pytest.raises(InputError, match="is a piece of a file that was cut") as caught:
        library.resolve(first, library.Purpose.RUN)
    assert f"`localmix convert {first}`" in caught.value.hint
    first.unlink()
    last = tmp_path / "fox.Q4_K_M.gguf-split-c"
    assert library.resolve(last, library.Purpose.SOURCE) == last
    with pytest.raises(InputError, match="is a piece of a file that was cut"):
        library.resolve(last, library.Purpose.RUN)
    (tmp_path / "fox.gguf").write_bytes(b"")
    copy = tmp_path / "fox.gguf.1"  # as wget calls a second one
    copy.write_bytes(b"")
    assert library.resolve(copy, library.Purpose.RUN) == copy
