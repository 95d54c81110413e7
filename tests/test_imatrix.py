"""The importance matrix against sums that a second pass over the graph collects in numpy, and its coverage."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import FileError, InputError
from localmix.imatrix import collect, merge, partial_path
from localmix.importance import Coverage, Importance, load_importance, write_importance
from localmix.measurement.perplexity import measure
from localmix.native.model import Context, Model
from localmix.native.tensors import EvalCallback, Tensor, operations, read, weight_name
from localmix.output import OutputFile
from tests.random_model import write_random_model
from tests.texts import write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "calibration.txt", 4000)


def test_sums_and_counts_are_those_of_the_routed_rows(tmp_path: Path, random_model: Path, text: Path) -> None:
    """Each chunk alone, each token's experts one after the other, sums in float64."""
    found = collect(random_model, [text], tmp_path / "made.gguf", ctx=128, chunks=5, threads=1)
    sums: dict[str, dict[int, np.ndarray]] = {}
    counts: dict[str, dict[int, int]] = {}

    def add(name: str, expert: int, row: np.ndarray) -> None:
        sums.setdefault(name, {}).setdefault(expert, np.zeros(len(row)))
        sums[name][expert] += row.astype(np.float64) ** 2
        counts.setdefault(name, {})[expert] = counts.get(name, {}).get(expert, 0) + 1

    def wanted(tensor: Tensor) -> bool:
        products = (operations().mul_mat, operations().mul_mat_id)
        return tensor.op in products and weight_name(tensor.src[0].contents).startswith("blk.")

    def computed(tensor: Tensor) -> None:
        name = weight_name(tensor.src[0].contents)
        values = read(tensor.src[1].contents, np.float32)
        if tensor.op == operations().mul_mat:
            for row in values[0, 0]:
                add(name, 0, row)
        else:
            for token, experts in enumerate(read(tensor.src[2].contents, np.int32)[0, 0]):
                for slot, expert in enumerate(experts):
                    add(name, int(expert), values[0, token, slot % values.shape[2]])

    callback = EvalCallback(wanted, computed)
    with (
        Model(random_model) as model,
        Context(model, context_length=128, threads=1, callback=callback) as context,
    ):
        tokens = model.tokenize(text.read_bytes().removesuffix(b"\n"))
        for chunk in tokens[: 5 * 128].reshape(5, 128):
            context.clear()
            context.decode(np.r_[1, chunk[1:]], np.arange(128), 0, True)

    importance = load_importance(tmp_path / "made.gguf")
    assert set(importance.entries) == set(sums)
    assert "output.weight" not in sums and len(sums) == 2 * 8
    for name, entry in importance.entries.items():
        largest = max(row.max() for row in sums[name].values())
        for expert in range(len(entry.counts)):
            # a token on the edge between two experts may fall to the other side in another batch
            slack = 4 if len(entry.counts) > 1 else 0
            assert abs(entry.counts[expert] - counts[name].get(expert, 0)) <= slack
            expected = sums[name].get(expert, 0)
            assert np.abs(entry.sums[expert] - expected).max() < (0.02 if slack else 2e-3) * largest
    assert (importance.chunk_count, importance.chunk_size) == (5, 128)
    assert tuple(importance.datasets) == ("calibration.txt",)
    assert (found.chunks, found.tokens, found.entries) == (5, 640, 16)


def test_perplexity_and_coverage_come_with_it(tmp_path: Path, random_model: Path, text: Path) -> None:
    output = tmp_path / "made.gguf"
    steps: list[tuple[int, int, str]] = []
    found = collect(random_model, [text], output, 128, threads=1, progress=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == found.chunks
    assert found.perplexity == pytest.approx(measure(random_model, text, 128, threads=1).ppl, rel=1e-4)
    assert sorted(found.coverage.tokens) == [0, 1]
    for layer, counts in found.coverage.tokens.items():
        assert sum(counts) == 2 * found.tokens  # two experts for each token
        importance = load_importance(output)
        assert importance.entries[f"blk.{layer}.ffn_up_exps.weight"].counts.tolist() == list(counts)
    layer, expert, tokens = found.coverage.least or (0, 0, 0)
    assert tokens == min(min(counts) for counts in found.coverage.tokens.values())
    assert found.coverage.tokens[layer][expert] == tokens


def test_several_corpora(tmp_path: Path, random_model: Path, text: Path) -> None:
    other = write_text(tmp_path / "other.txt", 1000, seed=2)
    found = collect(random_model, [text, other], tmp_path / "made.gguf", 128, threads=1)
    assert found.datasets == ("calibration.txt", "other.txt")
    alone = collect(random_model, [text], tmp_path / "alone.gguf", 128, threads=1)
    assert found.chunks > alone.chunks


def equal(one: Path, other: Path) -> bool:
    left, right = load_importance(one), load_importance(other)
    same = all(
        np.array_equal(entry.sums, right.entries[name].sums)
        and np.array_equal(entry.counts, right.entries[name].counts)
        for name, entry in left.entries.items()
    )
    return same and left.chunk_count == right.chunk_count and set(left.entries) == set(right.entries)


def test_going_on_ends_with_the_same_bits(tmp_path: Path, random_model: Path, text: Path) -> None:
    whole, part, rest = (tmp_path / name for name in ("whole.gguf", "part.gguf", "rest.gguf"))
    all_chunks = collect(random_model, [text], whole, 512, threads=1).chunks
    assert all_chunks > 4
    collect(random_model, [text], part, 512, chunks=4, threads=1)
    found = collect(random_model, [text], rest, 512, threads=1, resume=part)
    assert (found.chunks, found.tokens) == (all_chunks, all_chunks * 512)
    assert equal(whole, rest)
    again = collect(random_model, [text], tmp_path / "again.gguf", 512, threads=1, resume=rest)
    assert again.perplexity is None and equal(whole, tmp_path / "again.gguf")


def test_what_does_not_fit_is_not_gone_on_with(tmp_path: Path, random_model: Path, text: Path) -> None:
    made = tmp_path / "made.gguf"
    collect(random_model, [text], made, 128, chunks=2, threads=1)
    other_model = write_random_model(tmp_path / "other.gguf", seed=9)
    other_model.write_bytes(other_model.read_bytes() + bytes(32))
    other_text = write_text(tmp_path / "other.txt", 3000, seed=9)
    for model, corpus, ctx, reason in (
        (other_model, text, 128, "another model"),
        (random_model, other_text, 128, "another text"),
        (random_model, text, 256, "chunks of 128 tokens"),
    ):
        with pytest.raises(InputError, match=reason):
            collect(model, [corpus], tmp_path / "out.gguf", ctx, threads=1, resume=made)
    foreign = tmp_path / "foreign.gguf"
    write_importance(foreign, Importance(load_importance(made).entries, ["x"], 2, 128))
    with pytest.raises(InputError, match="does not say which model"):
        collect(random_model, [text], tmp_path / "out.gguf", 128, threads=1, resume=foreign)
    assert not (tmp_path / "out.gguf").exists()


def test_a_killed_run_left_what_it_had(tmp_path: Path, random_model: Path) -> None:
    """Kill -9 of the whole program once it has saved something; the rest is made and the bits are the same."""
    text = write_text(tmp_path / "long.txt", 60_000)
    output = tmp_path / "made.gguf"
    code = (
        "import sys; from pathlib import Path; from localmix.imatrix import collect; "
        "collect(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), 512, threads=1, save_seconds=0)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(random_model), str(text), str(output)])
    while not partial_path(output).exists() and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert not output.exists()
    kept = tmp_path / "kept.gguf"
    partial_path(output).rename(kept)
    collect(random_model, [text], output, 512, threads=1, resume=kept)
    collect(random_model, [text], tmp_path / "whole.gguf", 512, threads=1)
    assert equal(output, tmp_path / "whole.gguf")
    assert not partial_path(output).exists()


def test_merging_adds_up(tmp_path: Path, random_model: Path, text: Path) -> None:
    other = write_text(tmp_path / "other.txt", 3000, seed=9)
    one, two, both = (tmp_path / name for name in ("one.gguf", "two.gguf", "both.gguf"))
    collect(random_model, [text], one, 128, threads=1)
    collect(random_model, [other], two, 128, threads=1)
    merged = merge([one, two], both)
    assert merged.datasets == ("calibration.txt", "other.txt")
    left, right, sums = (load_importance(path) for path in (one, two, both))
    assert sums.chunk_count == left.chunk_count + right.chunk_count
    for name, entry in sums.entries.items():
        np.testing.assert_allclose(entry.sums, left.entries[name].sums + right.entries[name].sums)
        np.testing.assert_array_equal(entry.counts, left.entries[name].counts + right.entries[name].counts)
    small = write_random_model(tmp_path / "small.gguf", hidden=64, feed_forward=64)
    collect(small, [text], tmp_path / "small-imatrix.gguf", 128, threads=1)
    with pytest.raises(InputError, match="different models"):
        merge([one, tmp_path / "small-imatrix.gguf"], both)


def test_the_output_weight_on_request(tmp_path: Path, random_model: Path, text: Path) -> None:
    output = tmp_path / "made.gguf"
    collect(random_model, [text], output, 128, chunks=2, threads=1)
    assert "output.weight" not in load_importance(output).entries
    collect(random_model, [text], output, 128, chunks=2, threads=1, output_weight=True)
    entry = load_importance(output).entries["output.weight"]
    assert entry.counts.tolist() == [256] and entry.sums.shape == (1, 256)


def test_experts_without_a_token_are_named() -> None:
    coverage = Coverage({0: (4, 0, 7), 3: (0, 1, 1)})
    assert coverage.unreached == ((0, 1), (3, 0))
    assert coverage.least == (0, 1, 0)
    assert Coverage().least is None and Coverage().unreached == ()


def test_nan_names_the_weight_and_leaves_no_file(tmp_path: Path, text: Path) -> None:
    path = write_random_model(tmp_path / "broken.gguf", poison="blk.1.attn_v.weight")
    with pytest.raises(InputError, match=r"blk\.1\.attn_output\.weight is not finite"):
        collect(path, [text], tmp_path / "made.gguf", 128, threads=1)
    assert [file.name for file in tmp_path.iterdir()] == ["broken.gguf"]


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, random_model: Path, text: Path
) -> None:
    steps: list[tuple[int, int, str]] = []

    def run(output: Path) -> None:
        collect(random_model, [text], output, 128, chunks=2, threads=1, progress=lambda *step: steps.append(step))

    with pytest.raises(FileError):
        run(tmp_path / "none" / "made.gguf")
    output = tmp_path / "made.gguf"
    with OutputFile(output, 0), pytest.raises(FileError, match="Another run is writing"):
        run(output)
    assert not steps
    run(output)
    assert steps and load_importance(output).chunk_count == 2
