"""README.zh-CN.md says what README.md says: the same commands, options, figures and links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"

PROGRAMS = ("localmix", "make", "python", "pip", "curl", "ssh")


def _code_blocks(path: Path) -> list[list[str]]:
    """Lines of each block of code, indented or fenced."""
    blocks: list[list[str]] = []
    fenced = inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        code = fenced or line.startswith("    ")
        if fence:
            fenced = not fenced
        elif code:
            if not inside:
                blocks.append([])
            blocks[-1].append(line)
        inside = code and not fence
    return blocks


def _commands(path: Path) -> list[str]:
    """Commands of all code blocks without their comments, in order."""
    lines = (re.sub(r"\s+# .*", "", line).strip().removeprefix("$ ") for block in _code_blocks(path) for line in block)
    return [line for line in lines if line.split(maxsplit=1)[:1] and line.split(maxsplit=1)[0] in PROGRAMS]


def _spans(path: Path) -> list[str]:
    """What stands between backticks in the prose, in order of the alphabet: languages order words differently."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return sorted(re.findall(r"`([^`\n]+)`", prose))


def _figures(path: Path) -> list[list[str]]:
    """The cells of each table row that hold figures."""
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|") if re.search(r"\d", cell)] for row in rows]
    return [[re.sub(r"[^\d.+±-]", "", cell) for cell in row if "`" not in cell] for row in cells if row]


def _links(path: Path) -> list[str]:
    return sorted(re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("what", [_commands, _spans, _figures])
def test_both_languages_say_the_same(what) -> None:
    assert what(ENGLISH), "nothing was found to compare"
    assert what(CHINESE) == what(ENGLISH)


def test_both_languages_have_the_same_sections() -> None:
    def levels(path: Path) -> list[str]:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        return re.findall(r"^(#+) ", prose, flags=re.MULTILINE)

    assert levels(CHINESE) == levels(ENGLISH)


def test_each_points_to_the_other_and_to_files_that_exist() -> None:
    assert "README.zh-CN.md" in _links(ENGLISH) and "README.md" in _links(CHINESE)
    for path in (ENGLISH, CHINESE):
        files = [link.partition("#")[0] for link in _links(path) if not link.startswith("https:")]
        assert [file for file in files if not (ROOT / file).exists()] == []
