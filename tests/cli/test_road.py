"""The commands as typed after one `convert`, their results as JSON, and what they remember."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.commands import CommandLine


def test_convert_files_the_model_and_reports_it(localmix: CommandLine) -> None:
    result = localmix("convert", "fox", "--json").json
    path = localmix.home / "fox" / "fox-BF16.gguf"
    assert result["path"] == str(path)
    assert result["bytes"] == path.stat().st_size
    assert (result["architecture"], result["type"]) == ("llama", "BF16")
    assert result["parameters"] > 3_000_000


def test_convert_to_a_file_and_to_a_folder(localmix: CommandLine) -> None:
    localmix("convert", "fox", "-o", "here.gguf", "--type", "f16")
    assert (localmix.folder / "here.gguf").is_file()
    localmix("convert", "fox", "-o", ".", "--type", "f32")
    assert (localmix.folder / "fox-F32.gguf").is_file()


def test_convert_keeps_two_models_of_one_name_apart(localmix: CommandLine) -> None:
    (localmix.folder / "other").mkdir()
    (localmix.folder / "fox").rename(localmix.folder / "other" / "fox")
    localmix("convert", "other/fox", "--type", "f32", "-o", "out.gguf")
    assert "localmix rm fox" in localmix.fails("convert", "other/fox", expect=2)


def test_quantize_without_a_model_takes_the_last(localmix: CommandLine) -> None:
    result = localmix("quantize", "Q4_K", "--json").json
    (output,) = result["outputs"]
    assert output["type"] == "Q4_K_M"
    assert output["path"] == str(localmix.home / "fox" / "fox-Q4_K_M.gguf")
    assert output["bytes"] == Path(output["path"]).stat().st_size
    assert 4 < output["bpw"] < 6
    assert output["fallbacks"] == []
    assert result["seconds"] > 0


def test_quantize_takes_model_and_type_in_either_order(localmix: CommandLine) -> None:
    localmix("quantize", "Q4_K", "fox", "-o", "one.gguf")
    localmix("quantize", "./fox", "Q4_K", "-o", "two.gguf")
    assert (localmix.folder / "one.gguf").read_bytes() == (localmix.folder / "two.gguf").read_bytes()
    assert "-o names the output" in localmix.fails("quantize", "fox", "out.gguf", "Q4_K", expect=2)
    assert "Such as Q4_K,q8_0." in localmix.fails("quantize", "fox", "Q4_K", "q8_0", expect=2)
    assert "No type was named" in localmix.fails("quantize", "fox", expect=2)
    assert "no quantization type 'Q44'" in localmix.fails("quantize", "fox", "Q44", expect=2)


def test_quantize_several_into_a_folder(localmix: CommandLine) -> None:
    localmix("quantize", "Q8_0,q4_0", "fox", "-o", ".")
    assert {path.name for path in localmix.folder.glob("*.gguf")} == {"fox-Q8_0.gguf", "fox-Q4_0.gguf"}
    assert "not a folder" in localmix.fails("quantize", "Q8_0,Q4_0", "-o", "one.gguf", expect=2)


def test_quantize_straight_from_the_checkpoint_gives_the_same_bytes(localmix: CommandLine) -> None:
    localmix("quantize", "Q4_K,Q6_K", "./fox", "-o", ".")
    localmix("quantize", "Q4_K,Q6_K", "fox")
    for kind in ("Q4_K_M", "Q6_K"):
        name = f"fox-{kind}.gguf"
        assert (localmix.folder / name).read_bytes() == (localmix.home / "fox" / name).read_bytes()


def test_a_dry_run_writes_nothing(localmix: CommandLine) -> None:
    before = sorted(localmix.home.rglob("*"))
    result = localmix("quantize", "chinese-mixtral", "--no-imatrix", "--dry-run", expect=3)
    assert "needs an importance matrix" in result.err
    result = localmix("quantize", "Q8_0,Q2_K", "--dry-run", "--json").json
    assert [output["type"] for output in result["outputs"]] == ["Q8_0", "Q2_K"]
    assert sorted(localmix.home.rglob("*")) == before


def test_imatrix_is_found_and_used_and_said(localmix: CommandLine) -> None:
    result = localmix("imatrix", "--corpus", "corpus.txt", "--ctx", "64", "--chunks", "12", "--json").json
    assert result["path"] == str(localmix.home / "fox" / "fox.imatrix.gguf")
    assert (result["chunks"], result["tokens"]) == (12, 768)
    assert result["perplexity"] > 1
    assert set(result["coverage"]["experts"]) == {"0", "1"}

    run = localmix("quantize", "IQ2_XS")
    assert "fox.imatrix.gguf" in run.err
    with_imatrix = (localmix.home / "fox" / "fox-IQ2_XS.gguf").read_bytes()
    assert b"quantize.imatrix.file" in with_imatrix
    assert "needs an importance matrix" in localmix.fails("quantize", "IQ2_XS", "--no-imatrix", expect=3)
    assert (localmix.home / "fox" / "fox-IQ2_XS.gguf").read_bytes() == with_imatrix


def test_plan_prints_what_quantize_writes(localmix: CommandLine) -> None:
    result = localmix("plan", "Q8_0", "fox", "Q4_K", "--ctx", "512", "--json").json
    assert [entry["type"] for entry in result["types"]] == ["Q8_0", "Q4_K_M"]
    for entry in result["types"]:
        localmix("quantize", entry["type"])
        path = localmix.home / "fox" / f"fox-{entry['type']}.gguf"
        assert entry["bytes"] == path.stat().st_size
        need = entry["need"]
        assert need["total"] == need["weights"] + need["kv"] + need["compute"] + need["other"]
        # 2 layers, 2 KV heads of 64, keys and values, two bytes each
        assert need["kv"] == 512 * 2 * 2 * 64 * 2 * 2
        assert entry["fits"] is True
        assert sum(tensor["bytes"] for tensor in entry["tensors"]) < entry["bytes"]


def test_plan_against_other_machines(localmix: CommandLine) -> None:
    huge = localmix("plan", "Q8_0", "--ctx", "100000000", "--ram", "16", "--json").json
    assert huge["types"][0]["fits"] is False
    assert "| Q8_0" in localmix("plan", "Q8_0", "--ram", "16", "--markdown").out


def test_ppl_without_a_model_and_as_a_table(localmix: CommandLine) -> None:
    options = ("--corpus", "corpus.txt", "--ctx", "64", "--chunks", "4", "--no-speed", "--json")
    result = localmix("ppl", *options).json
    assert [row["type"] for row in result["rows"]] == ["BF16"]
    assert [text["name"] for text in result["corpora"]] == ["corpus.txt"]

    run = localmix("ppl", "--types", "Q8_0,Q2_K", *options)
    assert "Quantizing Q8_0, Q2_K" in run.err
    rows = run.json["rows"]
    assert [row["type"] for row in rows] == ["BF16", "Q8_0", "Q2_K"]
    assert rows[0]["ppl"] == result["rows"][0]["ppl"]
    assert all(row["ppl"] > 1 and row["error"] > 0 and row["tokens"] == 4 * 31 for row in rows)
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)

    again = localmix("ppl", "--types", "Q8_0,Q2_K", *options)
    assert "Quantizing" not in again.err
    assert [row["ppl"] for row in again.json["rows"]] == [row["ppl"] for row in rows]


def test_ppl_draws_the_table_with_what_was_measured(localmix: CommandLine) -> None:
    run = localmix("ppl", "fox:BF16", "--corpus", "corpus.txt", "--ctx", "64", "--chunks", "2", "--markdown")
    header, _, row, _, caption = run.out.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "Type",
        "Size MiB",
        "BPW",
        "PPL",
        "±",
        "Prompt ms/token",
        "Prompt tokens/s",
        "ms/token",
        "tokens/s",
        "Memory MiB",
    ]
    assert row.startswith("| BF16")
    assert "sha256" in caption
    assert "2 chunks of 64" in caption


def test_a_model_that_fails_is_a_row_and_the_others_stay(localmix: CommandLine) -> None:
    localmix("quantize", "Q8_0")
    broken = localmix.folder / "broken-Q8_0.gguf"
    data = bytearray((localmix.home / "fox" / "fox-Q8_0.gguf").read_bytes())
    # llama.cpp cannot load a model of an unknown kind
    broken.write_bytes(data.replace(b"llama.block_count", b"llama.block_cXunt"))
    options = ("--corpus", "corpus.txt", "--ctx", "64", "--chunks", "2", "--no-speed", "--json")
    run = localmix("ppl", broken, "fox:Q8_0", *options, expect=3)
    first, second = run.json["rows"]
    assert first["ppl"] is None and "broken-Q8_0.gguf" in first["failure"]
    assert second["ppl"] > 1


def test_chat_answers_one_question(localmix: CommandLine) -> None:
    options = ("--max-tokens", "8", "--temperature", "0", "--json")
    result = localmix("chat", "-p", "What does the fox do?", *options).json
    assert result["completion_tokens"] <= 8
    assert result["finish_reason"] in ("length", "stop")
    assert result["prompt_tokens"] > 3
    piped = localmix("chat", *options, stdin="What does the fox do?\n").json
    assert piped["text"] == result["text"]
    plain = localmix("chat", "-p", "-", *options[:-1], stdin="What does the fox do?").out
    assert plain.strip() == result["text"].strip()


def test_chat_uses_the_quantization_used_last(localmix: CommandLine) -> None:
    localmix("quantize", "Q8_0")
    localmix("quantize", "Q4_0")
    ask = ("chat", "-p", "x", "--max-tokens", "1", "--json")
    assert localmix(*ask).json["model"].endswith("fox-Q4_0.gguf")
    localmix("chat", "fox:Q8_0", *ask[1:])
    assert localmix(*ask).json["model"].endswith("fox-Q8_0.gguf")


def test_info_of_a_file_and_of_a_checkpoint(localmix: CommandLine) -> None:
    file = localmix("info", "--sha256", "--json").json
    folder = localmix("info", "./fox", "--json").json
    assert file["parameters"] == folder["parameters"]
    assert len(file["tensors"]) == len(folder["tensors"])
    assert file["metadata"]["llama.expert_count"] == folder["metadata"]["llama.expert_count"] == 8
    assert len(file["files"][0]["sha256"]) == 64
    assert folder["files"][0]["sha256"] is None
    assert file["chat_template"] == folder["chat_template"] is not None
    shown = localmix("info", "fox", "--tensors", "--template").out
    assert "blk.1.ffn_down_exps.weight" in shown
    assert file["chat_template"].splitlines()[0] in shown


def test_ls_and_rm(localmix: CommandLine) -> None:
    localmix("quantize", "Q8_0,Q4_0")
    listed = localmix("ls", "--json").json["models"]
    assert [file["type"] for file in listed[0]["files"]] == ["BF16", "Q8_0", "Q4_0"]
    assert "fox:Q8_0" in localmix("ls").out

    assert "--yes" in localmix.fails("rm", "fox:Q8_0", expect=2)
    removed = localmix("rm", "fox:Q8_0", "--yes", "--json").json
    assert removed["bytes"] == listed[0]["files"][1]["bytes"]
    assert not (localmix.home / "fox" / "fox-Q8_0.gguf").exists()

    (localmix.home / "fox" / "notes.txt").write_text("mine")
    localmix("rm", "fox", "-y")
    assert [path.name for path in (localmix.home / "fox").iterdir()] == ["notes.txt"]
    assert localmix("ls", "--json").json["models"] == []
    assert (localmix.folder / "fox" / "config.json").exists()


def test_doctor(localmix: CommandLine) -> None:
    result = localmix("doctor", "--json").json
    assert result["packages"]["llama-cpp-python"]
    assert any(device["name"] == "CPU" for device in result["devices"])
    assert result["problems"] == []
    assert result["library"] == str(localmix.home)
    assert result["server"] is None or Path(result["server"]["path"]).is_file()
    shown = localmix("doctor").out
    assert ", 1 model," in shown and "\nllama-server " in shown
    assert "--sdist needs --build-server" in localmix("doctor", "--sdist", "x", expect=2).err
    missing = localmix("doctor", "--build-server", "--sdist", "none.tar.gz", expect=3)
    assert "llama-server cannot be built: none.tar.gz: there is no such file." in missing.err


def test_after_several_files_elsewhere_chat_takes_the_first(localmix: CommandLine) -> None:
    (localmix.folder / "multi").mkdir()
    localmix("quantize", "Q8_0,Q4_0", "-o", "multi", "--threads", "1")
    run = localmix("chat", "-p", "x", "--max-tokens", "1", "--threads", "1", "--json")
    assert run.json["model"].endswith("fox-Q8_0.gguf")


def test_ppl_of_a_file_whose_name_tells_no_type(localmix: CommandLine) -> None:
    shutil.copy(localmix.home / "fox" / "fox-BF16.gguf", localmix.folder / "plain.gguf")
    measure = ("--corpus", "corpus.txt", "--ctx", "64", "--chunks", "2", "--threads", "1", "--no-speed", "--json")
    assert localmix("ppl", "plain.gguf", *measure).json["rows"][0]["type"] == "BF16"


def test_two_models_of_one_name_share_no_files(localmix: CommandLine) -> None:
    localmix("quantize", "Q4_0", "./fox", "--threads", "1")
    shutil.copytree(localmix.folder / "fox", localmix.folder / "alt" / "fox")
    shutil.copy(localmix.home / "fox" / "fox-BF16.gguf", localmix.folder / "alt" / "fox-BF16.gguf")
    before = (localmix.home / "fox" / "fox-Q4_0.gguf").stat()
    for source in ("alt/fox", "alt/fox-BF16.gguf"):
        assert "another fox" in localmix.fails("quantize", "Q4_0", source, expect=2)
        assert "another fox" in localmix.fails("ppl", source, "--types", "Q4_0", "--corpus", "corpus.txt", expect=2)
        localmix("quantize", "Q4_0", source, "-o", "alt.gguf", "--threads", "1")
    assert (localmix.home / "fox" / "fox-Q4_0.gguf").stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_elsewhere_does_not_change_what_a_model_was_made_from(localmix: CommandLine) -> None:
    shutil.copytree(localmix.folder / "fox", localmix.folder / "alt" / "fox")
    localmix("convert", "alt/fox", "-o", "fox-BF16.gguf", "--threads", "1")
    localmix("convert", "fox", "--threads", "1")


def test_a_failure_leaves_no_empty_folder(empty: CommandLine) -> None:
    (empty.folder / "broken.gguf").write_bytes(b"GGUF")
    empty.fails("quantize", "Q8_0", "broken.gguf", expect=3)
    (empty.folder / "fox").mkdir()
    empty.fails("convert", "fox", expect=3)
    assert not any(empty.home.glob("*/"))


@pytest.mark.skipif(os.name == "nt", reason="a POSIX pipe")
def test_a_corpus_from_a_pipe_is_read_once(localmix: CommandLine) -> None:
    measure = ("--ctx", "64", "--chunks", "2", "--threads", "1", "--no-speed", "--json")
    text = (localmix.folder / "corpus.txt").read_text(encoding="utf-8")
    piped = localmix("ppl", "fox", "--corpus", "/dev/stdin", *measure, stdin=text).json
    file = localmix("ppl", "fox", "--corpus", "corpus.txt", *measure).json
    assert piped["rows"][0]["ppl"] == file["rows"][0]["ppl"]
