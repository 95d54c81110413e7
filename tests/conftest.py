"""Models and tools that several tests share, each made once in a session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.random_model import write_random_model

ROOT = Path(__file__).parent.parent
TINYMIX = ROOT / "examples" / "tinymix"


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral of random weights: 2 layers, 8 experts, 277 tokens, trained context 2048."""
    return write_random_model(tmp_path_factory.mktemp("models") / "random.gguf")


@pytest.fixture(scope="session")
def upstream() -> Path:
    """The folder of llama.cpp's own tools at the pinned commit, the independent reference."""
    build = [sys.executable, str(ROOT / "vendor/llama.cpp/build.py"), "--print-dir"]
    folder = Path(subprocess.run(build, capture_output=True, text=True, check=True).stdout.strip())
    if not folder.is_dir():
        pytest.skip("llama.cpp's tools are not built; `make vendor` builds them")
    return folder


@pytest.fixture(scope="session")
def tinymix_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/tinymix as one BF16 GGUF file, made by localmix."""
    from localmix.convert import convert

    path = tmp_path_factory.mktemp("tinymix") / "tinymix-BF16.gguf"
    convert(TINYMIX, path)
    return path
