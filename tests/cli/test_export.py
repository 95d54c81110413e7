"""`localmix export` as a user runs it."""

from __future__ import annotations

from tests.commands import CommandLine
from tests.modelfiles import parse_modelfile


def test_a_modelfile_for_the_model_used_last(localmix: CommandLine) -> None:
    run = localmix("export", "ollama", "fox")
    path = localmix.folder / "Modelfile"
    assert "ollama create fox -f Modelfile" in run.out
    parsed = parse_modelfile(path.read_text(encoding="utf-8"))
    assert parsed.model == str(localmix.home.resolve() / "fox" / "fox-BF16.gguf")
    before = path.read_bytes()
    assert "already" in localmix.fails("export", "ollama", "fox", expect=2)
    assert path.read_bytes() == before
    arguments = ("-o", "Modelfile", "--system", "Short.", "--ctx", "99", "--json")
    document = localmix("export", "ollama", "fox", *arguments).json
    assert {"name": "num_ctx", "value": "99"} in document["parameters"]
    assert parse_modelfile(path.read_text(encoding="utf-8")).system == "Short."


def test_what_is_refused(localmix: CommandLine) -> None:
    assert "ollama" in localmix.fails("export", "lmstudio", "fox", expect=2)
    assert "does not exist" in localmix.fails("export", "ollama", "absent.gguf", expect=5)
    assert "no/such" in localmix.fails("export", "ollama", "fox", "-o", "no/such/Modelfile", expect=5)
