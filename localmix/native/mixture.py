"""Ask llama.cpp which type it would give each tensor, without weights.

`llama_model_quantize` with `dry_run` on a skeleton (the model's metadata and tensor names, hardly any rows) prints
one line for each tensor in milliseconds. So llama.cpp's mixtures are never re-implemented here, and stay right
when the pin moves; only the form of its log lines is ours to know.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from localmix.errors import FileError, InputError, UsageError
from localmix.native.library import api, log
from localmix.tensor_types import TensorType

# [  12/ 323] blk.0.attn_q.weight  - [ 4096, 4096, 1, 1], type =   bf16, size =  32.00 MiB ->  9.00 MiB (q4_K)
_TENSOR_LINE = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^\]]*\], type = +(?P<source>\w+), size = .*?(?:\((?P<target>\w+)\))?$"
)
# ... warning: blk.0.ffn_down.weight - ncols 96 not divisible by 256 (required for type q4_K) -> falling back to q5_0
_FALLBACK_LINE = re.compile(r"warning: (?P<name>\S+) +- ncols .*\(required for type +(?P<wanted>\w+)\)")

_BY_NAME = {kind.name.lower(): kind for kind in TensorType}


@dataclass(frozen=True)
class Mixture:
    """The type of every tensor, and for those whose columns did not fit a block, the type that was meant."""

    types: dict[str, TensorType]
    fallbacks: dict[str, TensorType]


def file_type(name: str) -> int:
    """llama.cpp's number of a mixture such as `Q4_K_M`, `BF16` or `F32`.

    Raises:
        UsageError: this llama.cpp has no such mixture.
    """
    bindings = api()
    for prefix in ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"):
        number = getattr(bindings, prefix + name, None)
        if number is not None:
            return int(number)
    raise UsageError(f"llama.cpp knows no file type {name}.", "`localmix quantize --list` shows the types.")


def choose_types(
    skeleton: bytes,
    mixture: str,
    rules: Sequence[tuple[str, TensorType]] = (),
    *,
    output_type: TensorType | None = None,
    embedding_type: TensorType | None = None,
    pure: bool = False,
    has_imatrix: bool = False,
) -> Mixture:
    """llama.cpp's choice of a type for each tensor.

    Args:
        skeleton: a GGUF file with the model's metadata and tensor names, its data section included.
        mixture: llama.cpp's name of the file type, `Q4_K_M`.
        rules: (regular expression, type), searched in the tensor's name, the first match wins.
        has_imatrix: an importance matrix will be there; it changes some mixtures.

    Raises:
        InputError: llama.cpp refuses the model (unknown architecture, missing hyper-parameter).
        UsageError: a rule is no regular expression that C++ understands.
    """
    bindings = api()
    parameters = bindings.llama_model_quantize_default_params()
    parameters.ftype = file_type(mixture)
    parameters.dry_run = True
    parameters.allow_requantize = True  # whether that is wanted is the caller's business
    parameters.pure = pure
    if output_type is not None:
        parameters.output_tensor_type = output_type
    if embedding_type is not None:
        parameters.token_embedding_type = embedding_type
    if rules:
        overrides = (bindings.llama_model_tensor_override * (len(rules) + 1))()  # ends with a null pattern
        for slot, (pattern, kind) in zip(overrides, rules, strict=False):
            slot.pattern, slot.type = pattern.encode("utf-8", "surrogateescape"), kind
        parameters.tt_overrides = ctypes.cast(overrides, type(parameters.tt_overrides))
    if has_imatrix:
        # one dummy entry is enough: only its presence is looked at in a dry run
        one = (ctypes.c_float * 1)(1.0)
        entries = (bindings.llama_model_imatrix_data * 2)()
        entries[0].name, entries[0].data, entries[0].size = b"-", one, 1
        parameters.imatrix = entries

    try:
        with tempfile.TemporaryDirectory(prefix="localmix-plan-") as folder:
            path = Path(folder) / "skeleton.gguf"
            path.write_bytes(skeleton)
            log.reset()
            # In a thread, because Ctrl-C raises in the main one: inside the log callback it would be lost with a line
            with log.capture() as lines, ThreadPoolExecutor(1) as pool:
                code = pool.submit(
                    bindings.llama_model_quantize, os.fsencode(path), b"unused.gguf", ctypes.byref(parameters)
                ).result()
    except OSError as error:
        raise FileError(
            f"There is no temporary folder with {len(skeleton) / 1e6:.0f} MB for planning: {error.strerror or error}.",
            "Name one with the environment variable TMPDIR.",
        ) from error
    if code != 0:
        reason = log.last_error.removeprefix("llama_model_quantize: failed to quantize: ") or f"code {code}"
        # what a C++ library says of a bad pattern differs from system to system
        if "regular expression" in reason or "regex" in reason:
            raise UsageError(
                f"A tensor rule is no regular expression: {reason.rstrip('.')}.",
                "Patterns follow ECMAScript's syntax.",
            )
        raise InputError(f"llama.cpp cannot quantize this model: {reason.rstrip('.')}.")
    return _parse(lines)


def _parse(lines: Sequence[str]) -> Mixture:
    types: dict[str, TensorType] = {}
    fallbacks: dict[str, TensorType] = {}
    for line in lines:
        if found := _TENSOR_LINE.search(line.rstrip()):
            types[found["name"]] = _BY_NAME[(found["target"] or found["source"]).lower()]
        elif found := _FALLBACK_LINE.search(line):
            fallbacks[found["name"]] = _BY_NAME[found["wanted"].lower()]
    return Mixture(types, fallbacks)
