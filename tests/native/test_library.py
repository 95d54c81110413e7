"""Loading llama.cpp's functions."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from localmix.native.library import PINNED_VERSION, api
functions = api()
assert not {"jinja2", "diskcache", "llama_cpp.llama"} & sys.modules.keys()
import llama_cpp
assert llama_cpp.Llama and llama_cpp.__version__ == PINNED_VERSION
assert llama_cpp.llama_cpp is functions is api()
from localmix.native.library import log
with log.capture() as lines:  # which the package took away
    functions.llama_model_load_from_file(b"nowhere.gguf", functions.llama_model_default_params())
assert any("nowhere.gguf" in line for line in lines), lines
"""


def test_the_functions_come_alone_and_the_package_stays_whole() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
