"""`localmix ppl` with a reference, several texts and contexts, published rows; and `localmix compare`."""

from __future__ import annotations

import csv
import io

import pytest

from tests.commands import CommandLine

MEASURE = ("--corpus", "corpus.txt", "--ctx", "64", "--chunks", "2", "--threads", "1", "--no-speed")


@pytest.fixture
def fox(localmix: CommandLine) -> CommandLine:
    """The library's model `fox` in two types, and a cache of its own."""
    localmix.variables["XDG_CACHE_HOME"] = str(localmix.folder / "cache")
    localmix("quantize", "Q8_0,Q2_K")
    return localmix


def test_a_table_with_a_reference(fox: CommandLine) -> None:
    run = fox("ppl", "fox:Q8_0", "fox:Q2_K", "--kld", "fox:BF16", *MEASURE, "--json")
    reference, first, second = run.json["rows"]
    assert (reference["type"], reference["is_reference"]) == ("BF16", True)
    assert 0 < first["divergence"]["mean"] < second["divergence"]["mean"]
    assert first["delta_error"] > 0
    assert run.json["reference"] == "fox-BF16.gguf"
    assert run.json["engine"].startswith("llama.cpp ") and run.json["threads"] == 1
    assert run.json["corpora"][0] | {"sha256": ""} == {
        "name": "corpus.txt",
        "bytes": (fox.folder / "corpus.txt").stat().st_size,
        "sha256": "",
        "tokens": 62,
        "chunks": 2,
    }
    kept = list((fox.folder / "cache" / "localmix" / "references").glob("*.logits"))
    assert len(kept) == 1
    streamed = fox("ppl", "fox:Q8_0", "fox:Q2_K", "--kld", "fox:BF16", "--no-cache", *MEASURE, "--json").json["rows"]
    assert [row["divergence"] for row in streamed] == [None, first["divergence"], second["divergence"]]

    written = ("--html", "table.html", "--plot", "table.svg")
    run = fox(
        "ppl",
        "--types",
        "Q8_0",
        "--kld",
        "fox:BF16",
        *MEASURE,
        *written,
        "--markdown",
        "--published",
        "chinese-mixtral",
    )
    assert "KLD 99 %" in run.out and "against fox-BF16.gguf" in run.out
    assert "Chinese-Mixtral (published)" in run.out and "Published figures: https://" in run.out
    assert "fox" in (fox.folder / "table.html").read_text() and (fox.folder / "table.svg").stat().st_size > 1000


def test_where_and_in_what_cache_it_is_computed(fox: CommandLine) -> None:
    plain = fox("ppl", "fox:Q8_0", *MEASURE, "--json").json
    coarse = fox(
        "ppl", "fox:Q8_0", "--kv-type", "q4_0", "--device", "cpu", "--gpu-layers", "0", *MEASURE, "--json"
    ).json
    assert (plain["kv_type"], coarse["kv_type"]) == ("f16", "q4_0")
    assert plain["rows"][0]["ppl"] != coarse["rows"][0]["ppl"]
    curve = fox("ppl", "fox:Q8_0", "--kv-type", "q4_0", *MEASURE, "--ctx", "32,64", "--json").json
    assert curve["points"][1]["ppl"] == coarse["rows"][0]["ppl"]
    pair = fox("compare", "fox:Q8_0", "fox:Q2_K", "--kv-type", "q4_0", *MEASURE, "--json").json
    assert pair["rows"][0]["ppl"] == coarse["rows"][0]["ppl"]
    for command in (("ppl", "fox:Q8_0"), ("compare", "fox:Q8_0", "fox:Q2_K")):
        assert "no device npu" in fox.fails(*command, "--device", "npu", *MEASURE, expect=2)


def test_several_texts_have_an_average(fox: CommandLine) -> None:
    (fox.folder / "other.txt").write_text("A dog sleeps under a tree, and a fox looks at it. " * 40)
    run = fox("ppl", "fox:Q8_0", "--corpus", "other.txt", *MEASURE, "--csv")
    rows = list(csv.DictReader(io.StringIO(run.out)))
    assert [row["corpus"] for row in rows] == ["other.txt", "corpus.txt", "average of 2"]
    low, high = sorted(float(row["ppl"]) for row in rows[:2])
    assert low < float(rows[2]["ppl"]) < high


def test_a_curve(fox: CommandLine) -> None:
    options = ("--corpus", "corpus.txt", "--chunks", "2", "--threads", "1")
    document = fox("ppl", "fox:Q8_0", *options, "--ctx", "128,32,64", "--paired", "--json").json
    assert [(point["context"], point["tokens"]) for point in document["points"]] == [(32, 126), (64, 126), (128, 126)]
    assert document["contexts"] == [32, 64, 128]
    run = fox("ppl", "fox:Q8_0", *options, "--ctx", "32,64")
    assert "Each context scores" in run.out and "corpus.txt (sha256" in run.out
    (fox.folder / "short.txt").write_text("short")
    run = fox("ppl", "fox:Q8_0", "--corpus", "short.txt", *options, "--ctx", "32,64", "--json", expect=3)
    assert len(run.json["points"]) == 2 and "short.txt is too short" in run.err


def test_refusals(empty: CommandLine) -> None:
    """Before a text or a model is looked for."""
    corpus = ("--corpus", "corpus.txt")
    assert "--paired needs several contexts" in empty.fails("ppl", "--paired", *corpus, expect=2)
    assert "--kld takes one context" in empty.fails("ppl", "--kld", "none", "--ctx", "32,64", *corpus, expect=2)
    assert "'many' is no number of tokens" in empty("ppl", "--ctx", "many", *corpus, expect=2).err
    assert "4 tokens are too few" in empty("ppl", "--ctx", "4", *corpus, expect=2).err
    assert "'none' is no size" in empty.fails("ppl", "--cache-limit", "none", *corpus, expect=2)
    assert "no published table 'x'" in empty.fails("ppl", "--published", "x", *corpus, expect=2)
    assert "neither" in empty.fails("ppl", "--plot", "a.gif", *corpus, expect=2)
    assert "nowhere does not exist" in empty.fails("ppl", "--html", "nowhere/a.html", *corpus, expect=5)


def test_compare(fox: CommandLine) -> None:
    document = fox("compare", "fox:Q8_0", "fox:Q2_K", *MEASURE, "--json").json
    first, second = document["rows"]
    assert first["is_reference"] and second["divergence"]["mean"] > 0
    verdict = document["verdict"]
    assert verdict["ppl_ratio"] == pytest.approx(second["ppl"] / first["ppl"])
    assert verdict["kld_difference"] is None
    document = fox("compare", "fox:Q2_K", "fox:Q8_0", "--kld", "fox:BF16", *MEASURE, "--json").json
    reference, first, second = document["rows"]
    assert reference["is_reference"] and reference["type"] == "BF16"
    verdict = document["verdict"]
    assert verdict["kld_difference"] == pytest.approx(second["divergence"]["mean"] - first["divergence"]["mean"])
    assert verdict["better"] == "fox-Q8_0.gguf"
    run = fox("compare", "fox:Q2_K", "fox:Q8_0", "--kld", "fox:BF16", *MEASURE)
    assert "against fox-BF16.gguf" in run.out
    assert run.out.splitlines()[-1] == verdict["sentence"]
    assert verdict["sentence"].startswith("Q8_0 is better than Q2_K: its KLD is ")
    assert verdict["sentence"].endswith(" % larger.")


def test_compare_refuses(fox: CommandLine) -> None:
    corpus = ("--corpus", "corpus.txt")
    assert "same file" in fox.fails("compare", "fox:Q8_0", "fox:Q8_0", *corpus, expect=2)
    assert "no file of type Q4_0" in fox.fails("compare", "fox:Q8_0", "fox:Q4_0", *corpus, expect=2)
    assert "nothing.txt" in fox.fails("compare", "fox:Q8_0", "fox:Q2_K", "--corpus", "nothing.txt", expect=5)
    assert "Missing argument" in fox("compare", "fox:Q8_0", *corpus, expect=2).err
    assert "Missing option '--corpus'" in fox("compare", "fox:Q8_0", "fox:Q2_K", expect=2).err
    broken = fox.folder / "broken.gguf"
    broken.write_bytes((fox.home / "fox" / "fox-Q2_K.gguf").read_bytes()[:3000])
    assert "broken.gguf" in fox.fails("compare", "fox:Q8_0", broken, *corpus, expect=3)
