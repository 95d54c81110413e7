"""`localmix report` as it is typed, on a real measurement."""

from __future__ import annotations

import re
from pathlib import Path

from tests.commands import CommandLine


def test_a_page_from_what_was_measured_before(localmix: CommandLine) -> None:
    options = ("--corpus", "corpus.txt", "--ctx", "64", "--chunks", "2", "--threads", "1")
    measured = localmix("ppl", "--types", "Q8_0,Q2_K", *options, "--json", "--html", "first.html")
    result = localmix.folder / "result.json"
    result.write_text(measured.out, encoding="utf-8")
    run = localmix("report", result, "--html", "second.html", "--json")
    assert Path(run.json["html"]).name == "second.html"
    # the same page as that of the measurement itself
    assert (localmix.folder / "second.html").read_text("utf-8") == (localmix.folder / "first.html").read_text("utf-8")

    run = localmix("report", result, "--plot", "plot.svg", "--html", "third.html", "--title", "A & B")
    assert run.out.splitlines() == ["Wrote third.html", "Wrote plot.svg"]
    assert re.search("<h1>A &amp; B</h1>", (localmix.folder / "third.html").read_text("utf-8"))
    assert "Q2_K" in (localmix.folder / "plot.svg").read_text("utf-8")


def test_mistakes_have_sentences(empty: CommandLine) -> None:
    result = empty.folder / "result.json"
    result.write_text("{}", encoding="utf-8")
    assert "nothing to write" in empty("report", result, expect=2).err
    assert "PNG or an SVG" in empty("report", result, "--plot", "a.pdf", expect=2).err
    assert "neither rows nor points" in empty("report", result, "--html", "a.html", expect=3).err
    assert "would destroy it" in empty("report", result, "--html", result, expect=2).err
    assert "Cannot read" in empty("report", "none.json", "--html", "a.html", expect=5).err
    assert not (empty.folder / "a.html").exists()
