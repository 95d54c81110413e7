"""The progress line of `localmix.cli.console`, at terminals of several widths."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.terminal import Terminal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="tmux")

WORK = """
import time
from localmix.cli.console import WEIGHTS, Console
with Console().progress(WEIGHTS) as progress:
    for done in range(1000):
        progress(done * 10**6, 2 * 10**9, "blk.12.ffn_gate_exps.weight")
        time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("width", "kept"),
    [(40, "blk.12.ffn"), (60, "blk.12.ffn_gate"), (80, "M weights/s"), (100, "blk.12.ffn_gate_exps.weight   ")],
)
def test_times_stay_in_a_narrow_terminal(tmp_path: Path, width: int, kept: str) -> None:
    (tmp_path / "work.py").write_text(WORK)
    with Terminal(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)}) as terminal:
        terminal.resize(width, 10)
        terminal.type(f"exec env -u COLUMNS {sys.executable} work.py")
        screen = terminal.wait(" 0:03:")  # 2000 reports of 0.1 s take 3:20
    line = next(line for line in screen.splitlines() if "%" in line)
    assert kept in line
    assert re.search(r"% .*0:00:\d\d 0:03:\d\d", line)
