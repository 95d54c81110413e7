"""Record what llama.cpp's converter makes of checkpoints, as the fixtures that test_convert.py compares with.

It needs what localmix does not: torch and transformers, and llama.cpp's source (`make vendor` unpacks it).
Run it in an environment of its own, from the root of the repository:

    python -m venv upstream
    upstream/bin/pip install torch transformers sentencepiece gguf pyyaml
    upstream/bin/python tests/conformance/record_convert.py LLAMA_CPP [FOLDER…]

LLAMA_CPP is the folder with convert_hf_to_gguf.py. Without a FOLDER all shapes of tests/checkpoints.py and all models
of tests/model_families.py are recorded; with folders those checkpoints are (`examples/tinymix` →
`fixtures/tinymix.json`); a name of a fixture (`mixtral`, `model-qwen2`) stands for its checkpoint.
Recorded with torch 2.13, transformers 5.23, and llama.cpp's source of the pin.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.checkpoints import SHAPES, write_checkpoint
from tests.model_families import CONFIGS, write_model

FIXTURES = Path(__file__).parent / "fixtures"
TYPES = ("bf16", "f16", "f32")

# Arrays longer than this are kept as length and digest.
_LONGEST = 16


def fixture_name(model: str) -> str:
    """The name of a fixture for a model of `CONFIGS`; that of a shape is its own."""
    return "model-" + model.replace(" ", "-")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def describe_value(kind: str, value: Any) -> dict[str, Any]:
    """A metadata value in a form that JSON keeps exactly; arrays by `digest` of their JSON when they are long."""
    if isinstance(value, list) and len(value) > _LONGEST:
        return {"type": kind, "length": len(value), "sha256": digest(json.dumps(value).encode())}
    return {"type": kind, "value": value}


def describe_file(path: Path) -> dict[str, Any]:
    """All key-values and tensors of a GGUF file, read by gguf-py."""
    from gguf import GGUFReader, GGUFValueType

    reader = GGUFReader(path)
    metadata: dict[str, Any] = {}
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        kind = "/".join(item.name for item in field.types)
        # As float32 the digits of a number depend on who prints them; its bits do not.
        value = field.contents()
        if field.types[-1] is GGUFValueType.FLOAT32:
            value = [float(item) for item in value] if isinstance(value, list) else float(value)
        metadata[key] = describe_value(kind, value)
    tensors = {
        tensor.name: {
            "shape": [int(length) for length in reversed(tensor.shape)],
            "type": tensor.tensor_type.name,
            "sha256": digest(tensor.data.tobytes()),
        }
        for tensor in reader.tensors
    }
    return {"metadata": metadata, "tensors": tensors}


# llama.cpp tells ways to split by the tokens of one text, so it knows no tokenizer of 384 tokens; and transformers
# adds tokens of the real models to some.
_CONVERTER = """
import runpy, sys
llama_cpp, pre = sys.argv.pop(1), sys.argv.pop(1)
sys.path[:0] = [llama_cpp, llama_cpp + "/gguf-py"]
import transformers
from conversion.base import TextModel
transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(llama_cpp + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(llama_cpp: Path, folder: Path, kind: str, output: Path) -> None:
    words = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "bert"
    pre = "default" if words else "qwen2"
    subprocess.run(
        [sys.executable, "-c", _CONVERTER, llama_cpp, pre, "--outtype", kind, "--outfile", output, folder],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def record(llama_cpp: Path, folder: Path, name: str) -> None:
    """Write `fixtures/NAME.json`: the metadata once, the tensors for each type."""
    found: dict[str, Any] = {"metadata": None, "tensors": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in TYPES:
            output = Path(scratch) / f"{kind}.gguf"
            convert(llama_cpp, folder, kind, output)
            described = describe_file(output)
            del described["metadata"]["general.file_type"]
            if found["metadata"] not in (None, described["metadata"]):
                raise SystemExit(f"{name}: the metadata depends on the type")
            found["metadata"] = described["metadata"]
            found["tensors"][kind] = described["tensors"]
    FIXTURES.mkdir(exist_ok=True)
    lines = json.dumps(found, indent=1, ensure_ascii=False)
    (FIXTURES / f"{name}.json").write_text(lines + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    llama_cpp = Path(arguments[0])
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    with tempfile.TemporaryDirectory() as scratch:
        models = {fixture_name(model): model for model in CONFIGS}
        for name in arguments[1:] or [*SHAPES, *models]:
            if name in SHAPES:
                record(llama_cpp, write_checkpoint(Path(scratch) / name, name), name)
            elif name in models:
                record(llama_cpp, write_model(Path(scratch) / name, models[name]), name)
            else:
                record(llama_cpp, Path(name), Path(name).resolve().name)


if __name__ == "__main__":
    main(sys.argv[1:])
