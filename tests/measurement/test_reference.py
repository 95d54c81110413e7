"""Kept logits: what is written comes back, limits hold, and a damaged file shows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import CapacityError, FileError, InputError
from localmix.measurement.corpus import Corpus, CorpusFile, read_corpus
from localmix.measurement.divergence import open_reference
from localmix.measurement.perplexity import Conditions, Part, Tally
from localmix.measurement.reference import MARGIN, Cache, Recorder, Shape, StoredReference
from localmix.rope_scaling import RopeScaling
from tests.texts import write_text

CORPUS = Corpus((CorpusFile("a.txt", 1, "0" * 64),), b"a")
CHUNKS = np.arange(48, dtype=np.int32).reshape(3, 16) % 5
SHAPE = Shape.of(CHUNKS, 5)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", limit=3000)


def record(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write random logits in parts of uneven size; the logits `[chunks, scored, vocabulary]` and the likelihoods."""
    logits = np.random.default_rng(1).standard_normal((3, 8, 5), np.float32)
    with Recorder(path, SHAPE) as recorder, Tally(CHUNKS, 1) as tally:
        for first, count in ((0, 2), (2, 1)):
            for start, length in ((0, 5), (5, 7), (12, 4)):
                scored = max(start, 8)
                part = Part(
                    first, count, start, length, scored, logits[first : first + count, scored - 8 : start + length - 8]
                )
                tally.add(part)
                recorder.add(part, tally)
        recorder.finish(tally.nll, 64, 1000)
        return logits, tally.nll


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "one.logits"
    logits, nll = record(path)
    assert (SHAPE.chunks, SHAPE.scored, SHAPE.vocabulary) == (3, 7, 5)
    assert path.stat().st_size == SHAPE.bytes
    with StoredReference(path) as file:
        assert (file.shape, file.trained_context, file.memory_bytes) == (SHAPE, 64, 1000)
        assert (file.nll == nll).all()
        for chunk in range(3):
            assert (file.rows(chunk, 0, 7) == logits[chunk, :7]).all()
            assert (file.rows(chunk, 2, 5) == logits[chunk, 2:5]).all()
        file.check(nll)


def test_a_damaged_file_is_deleted_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "one.logits"
    _, nll = record(path)
    with StoredReference(path) as file, pytest.raises(InputError, match="were damaged; they have been deleted"):
        file.check(nll + 0.001)
    assert not path.exists()
    for content in (b"", b"{}", b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(InputError, match="were damaged"):
            StoredReference(path)
        assert not path.exists()
    record(path)
    os.truncate(path, SHAPE.bytes - 1)
    with pytest.raises(InputError, match="were damaged"):
        StoredReference(path)


def test_damaged_logits_show_when_they_are_used(random_model: Path, tmp_path: Path) -> None:
    corpus, conditions = read_corpus([write_text(tmp_path / "text.txt", 1500)]), Conditions(64, 2, threads=1)
    reference = open_reference(random_model, corpus, conditions, Cache(tmp_path / "cache"))
    assert reference.stored is not None
    with reference.stored.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x00" * 400)
    with pytest.raises(InputError, match="were damaged; they have been deleted"):
        reference.measure(random_model)
    again = open_reference(random_model, corpus, conditions, Cache(tmp_path / "cache"))
    assert again.measure(random_model).delta_ppl == 0


def test_what_changes_the_numbers_changes_the_name(cache: Cache, tmp_path: Path) -> None:
    model, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    model.write_bytes(b"one")
    other.write_bytes(b"two")
    plain = Conditions(512)
    names = {
        cache.path_for([model], CORPUS, plain),
        cache.path_for([other], CORPUS, plain),
        cache.path_for([model, other], CORPUS, plain),
        cache.path_for([model], Corpus((CorpusFile("a.txt", 1, "1" * 64),), b"b"), plain),
        *(
            cache.path_for([model], CORPUS, changed)
            for changed in (Conditions(1024), Conditions(512, 3), Conditions(512, rope=RopeScaling("linear", 2.0)))
        ),
        cache.path_for([model], CORPUS, Conditions(512, kv_type="q8_0")),
    }
    assert len(names) == 8
    assert cache.path_for([model], CORPUS, Conditions(512, threads=3)) in names
    copy = tmp_path / "copy.gguf"
    shutil.copy(model, copy)
    assert cache.path_for([copy], CORPUS, plain) == cache.path_for([model], CORPUS, plain)


def test_a_checksum_is_computed_once(cache: Cache, tmp_path: Path) -> None:
    model = tmp_path / "a.gguf"
    model.write_bytes(b"one")
    steps: list[tuple[int, int, str]] = []

    def name() -> Path:
        return cache.path_for([model], CORPUS, Conditions(), progress=lambda *step: steps.append(step))

    first = name()
    assert steps == [(3, 3, "checksum of a.gguf")]
    assert name() == first and len(steps) == 1
    model.write_bytes(b"two")
    os.utime(model, ns=(1, 1))
    assert name() != first and len(steps) == 2
    (cache.folder / "digests.json").write_text("[]")
    assert name() != first and len(steps) == 3
    with pytest.raises(FileError, match=r"none\.gguf cannot be read"):
        cache.path_for([tmp_path / "none.gguf"], CORPUS, Conditions())


def test_those_not_used_for_longest_go_first(cache: Cache) -> None:
    cache.folder.mkdir()
    for age, name in enumerate(("new", "middle", "old")):
        path = cache.folder / f"{name}.logits"
        path.write_bytes(b"x" * 1000)
        os.utime(path, (10**9 - age, 10**9 - age))
    cache.make_room(0)
    assert len(list(cache.folder.iterdir())) == 3
    cache.make_room(1500)
    assert [path.name for path in cache.folder.iterdir()] == ["new.logits"]
    with pytest.raises(CapacityError, match=r"take 2\.9 KiB, and the cache's limit is 2\.\d KiB\."):
        cache.make_room(3001)
    assert [path.name for path in cache.folder.iterdir()] == ["new.logits"]


def test_the_disk_keeps_a_rest_for_others(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CapacityError, match=r"free, and the reference's logits take .*; 1\.00 GiB are left for others"):
        Cache(tmp_path / "cache", limit=free * 2).make_room(free - MARGIN // 2)


def test_what_a_killed_run_left_is_swept(cache: Cache) -> None:
    cache.folder.mkdir()
    (cache.folder / ".dead.logits.partial").write_bytes(b"x" * 2000)
    alive = cache.folder / "alive.logits"
    with Recorder(alive, SHAPE):
        cache.make_room(0)
        assert [path.name for path in cache.folder.iterdir()] == [".alive.logits.partial"]
    assert list(cache.folder.iterdir()) == []


def test_where_it_does_not_fit_both_run_side_by_side(random_model: Path, tmp_path: Path) -> None:
    corpus, conditions = read_corpus([write_text(tmp_path / "text.txt", 1500)]), Conditions(64, 2, threads=1)
    reference = open_reference(random_model, corpus, conditions, Cache(tmp_path / "cache", limit=1000))
    assert reference.stored is None and reference.perplexity is None
    assert "the cache's limit is" in reference.notes[0] and "runs beside each model" in reference.notes[0]
    assert reference.measure(random_model).delta_ppl == 0
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert "Cannot write" in open_reference(random_model, corpus, conditions, Cache(blocked)).notes[0]
