"""Files as older programs wrote them, made from those of today by gguf-py or byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np

Change = Callable[[str, int, np.ndarray], "np.ndarray | None"]


def write_with_single_experts(
    model: Path, path: Path, *, drop: tuple[str, ...] = (), kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None
) -> Path:
    """Write a model as before April 2024: a tensor for each expert, and no name of a pre-tokenizer.

    Args:
        model: a file of today; not split.
        drop: tensors to leave out, by their old names.
        kinds: tensors to write in another type, by their old names; gguf-py quantizes them.
    """
    reader = gguf.GGUFReader(model)
    field = reader.get_field("general.architecture")
    assert field is not None
    writer = gguf.GGUFWriter(path, field.contents())
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "tokenizer.ggml.pre"):
            continue
        kind = entry.types[0]
        item = entry.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, entry.contents(), kind, item)
    for tensor in reader.tensors:
        stacked = "_exps" in tensor.name
        for number, data in enumerate(tensor.data if stacked else [tensor.data]):
            name = tensor.name.replace("_exps", f".{number}") if stacked else tensor.name
            if name in drop:
                continue
            kind = (kinds or {}).get(name)
            if kind is None:
                writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
            else:
                wide = gguf.quants.dequantize(data, tensor.tensor_type)
                writer.add_tensor(name, gguf.quants.quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_version_1(model: Path, path: Path) -> Path:
    """Write a GGUF file with the head of version 1, whose counts and lengths have 32 bits."""
    data = model.read_bytes()
    place = 4
    head = bytearray(b"GGUF")

    def take(code: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + code, data, place)
        place += struct.calcsize("<" + code)
        return int(value)

    def narrow() -> int:
        value = take("Q")
        head.extend(struct.pack("<I", value))
        return value

    def keep(count: int) -> None:
        nonlocal place
        head.extend(data[place : place + count])
        place += count

    def value(kind: int) -> None:
        if kind == gguf.GGUFValueType.STRING:
            keep(narrow())
        elif kind == gguf.GGUFValueType.ARRAY:
            item = take("I")
            head.extend(struct.pack("<I", item))
            for _ in range(narrow()):
                value(item)
        else:
            keep({0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4))

    assert take("I") == 3
    head.extend(struct.pack("<I", 1))
    tensors, entries = narrow(), narrow()
    for _ in range(entries):
        keep(narrow())
        kind = take("I")
        head.extend(struct.pack("<I", kind))
        value(kind)
    for _ in range(tensors):
        keep(narrow())
        dimensions = take("I")
        head.extend(struct.pack("<I", dimensions))
        for _ in range(dimensions):
            narrow()
        keep(4 + 8)
    weights = data[-(-place // 32) * 32 :]
    path.write_bytes(bytes(head) + bytes(-len(head) % 32) + weights)
    return path


def cut(path: Path, names: list[str], folder: Path | None = None) -> list[Path]:
    """Cut a file into pieces of about one size, as `split` does, under these names."""
    data = path.read_bytes()
    step = -(-len(data) // len(names))
    pieces = [(folder or path.parent) / name for name in names]
    for number, piece in enumerate(pieces):
        piece.write_bytes(data[number * step : (number + 1) * step])
    return pieces
