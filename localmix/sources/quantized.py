"""What config.json says of weights that are quantized already: FP8 is widened, everything else is named and refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmix.errors import InputError, LocalmixError
from localmix.sources.documents import shown
from localmix.sources.positional import read_whole

README = "README.md"
_README_LIMIT = 4 * 2**20

# quant_method → what people call it.
_NAMES: Mapping[str, str] = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "quanto": "Quanto",
    "torchao": "torchao",
    "mxfp4": "MXFP4",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "bitnet": "BitNet",
}

_FP8_METHODS = ("fp8", "fbgemm_fp8")

_BASE_MODEL = re.compile(r"^base_model:[ \t]*(?:\r?\n[ \t]*-[ \t]*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Fp8Scheme:
    """FP8 weights; `block` is the rows and columns that share a scale, when config.json says so."""

    block: tuple[int, int] | None


def read_scheme(config: Mapping[str, Any], path: Path, accepted: str = "") -> Fp8Scheme | None:
    """How the weights of a checkpoint are quantized, if in a way that is widened; None for plain weights.

    Args:
        config: of config.json.
        path: of config.json.
        accepted: a quant_method that the architecture's row widens itself.

    Raises:
        InputError: they are quantized in another way, which is named.
    """
    block = config.get("quantization_config")
    if not block:
        return None
    method = block.get("quant_method") if isinstance(block, dict) else None
    if method == accepted != "":
        return None
    if isinstance(block, dict):
        scheme = _fp8_scheme(method, block)
        if scheme is not None:
            return scheme
    raise InputError(
        f"{path}: the checkpoint is already quantized ({_name(method, block)}).", unquantized_hint(path.parent)
    )


def unquantized_hint(folder: Path) -> str:
    """What to take instead of a quantized checkpoint: the model that its README names as its base, if it does."""
    general = "Take the original checkpoint in bf16, f16 or f32; localmix quantizes it itself"
    try:
        text = read_whole(folder / README, _README_LIMIT).decode("utf-8", "replace")
    except LocalmixError:  # it need not be there, nor be a file; this is a hint
        return f"{general}."
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    base = _BASE_MODEL.search(head)
    return f"{general}: {README} names {base[1]}." if base else f"{general}."


def _fp8_scheme(method: Any, block: Mapping[str, Any]) -> Fp8Scheme | None:
    if method in _FP8_METHODS:
        return Fp8Scheme(_pair(block.get("weight_block_size")))
    if method == "modelopt" and block.get("quant_algo") == "FP8":
        return Fp8Scheme(None)
    if method in ("compressed-tensors", "modelopt"):
        groups = _weights_of_groups(block)
        if groups and all(group.get("num_bits") == 8 and group.get("type") == "float" for group in groups):
            blocks = {_pair(group.get("block_structure")) for group in groups}
            return Fp8Scheme(blocks.pop() if len(blocks) == 1 else None)
    return None


def _weights_of_groups(block: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = block.get("config_groups")
    if not isinstance(groups, dict):
        return []
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    return [of if isinstance(of, dict) else {} for of in weights]


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None


def _name(method: Any, block: Any) -> str:
    """The quantization as people call it."""
    if not isinstance(method, str):
        return "quantization_config"
    if method == "bitsandbytes":
        return "bitsandbytes 4 bit" if block.get("load_in_4bit") else "bitsandbytes 8 bit"
    if method in ("compressed-tensors", "modelopt"):
        kinds = sorted({f"{of.get('type')}{of.get('num_bits')}" for of in _weights_of_groups(block)})
        told = str(block.get("quant_algo") or ", ".join(kinds))
        return f"{method} {shown(told)[1:-1]}".strip()
    return _NAMES.get(method, shown(method))
