"""Plots as files, and what is refused before anything is measured."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from localmix.errors import FileError, InputError, UsageError
from localmix.presentation.plots import check, write_plot
from localmix.presentation.published import find
from localmix.presentation.report import Report

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: pip install 'localmix[report]'"
)


def published(title: str = "As published") -> Report:
    table = find("chinese-mixtral")
    return Report(title, {"Corpus": "a text"}, table.rows, table.points, table.notes)


@needs_matplotlib
def test_svg_has_the_panels_and_their_words(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    write_plot(path, published("Cost: $5 <b> & 中文"))
    words = " ".join(element.text or "" for element in ElementTree.parse(path).iter() if element.tag.endswith("text"))
    for wanted in ("Cost: $5 <b> & 中文", "Perplexity over size", "16 GiB", "IQ2_XXS", "(published)", "128K", "Corpus"):
        assert wanted in words
    content = path.read_text("utf-8")
    again = tmp_path / "again.svg"
    write_plot(again, published("Cost: $5 <b> & 中文"))
    assert again.read_text("utf-8") == content


@needs_matplotlib
def test_png_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "plot.PNG"
    write_plot(path, published())
    import matplotlib.image

    pixels = matplotlib.image.imread(path, format="png")
    assert pixels.shape[0] > 1000 and pixels.shape[1] > 2000
    assert 0.5 < pixels[..., :3].mean() < 0.999  # drawn on, and mostly paper


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "plot.png.txt"])
def test_another_suffix_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="PNG or an SVG"):
        write_plot(tmp_path / name, published())
    assert not (tmp_path / name).exists()


@needs_matplotlib
def test_nothing_to_plot_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to plot"):
        write_plot(tmp_path / "plot.png", Report("Empty", {}, []))
    assert list(tmp_path.iterdir()) == []


@needs_matplotlib
def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        write_plot(tmp_path / "none" / "plot.svg", published())


def test_without_matplotlib_the_command_to_install_it_is_told() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from localmix.errors import UsageError\n"
        "from localmix.presentation.plots import check\n"
        "try: check(Path('plot.png'))\n"
        "except UsageError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'localmix[report]'" in run.stdout


@needs_matplotlib
def test_importing_plots_does_not_import_matplotlib() -> None:
    code = "import sys, localmix.presentation.plots; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@needs_matplotlib
def test_check_accepts_both_suffixes() -> None:
    check(Path("a.png"))
    check(Path("a.SVG"))
