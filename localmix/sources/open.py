"""From a path to a Source: a checkpoint folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localmix.errors import FileError, InputError
from localmix.sources.base import Source

if TYPE_CHECKING:
    from localmix.sources.adapter import Lora

_WANTS_CHECKPOINT = "Give the checkpoint's folder, which has config.json and safetensors files."


def open_source(path: Path, *, pre: str | None = None, loras: Sequence[Lora] = ()) -> Source:
    """Open whatever holds a model.

    Args:
        path: a Hugging Face checkpoint folder, its `config.json`, or a GGUF file (any part of a split one, or any
            piece of one that was cut).
        pre: llama.cpp's name for the way that the tokenizer splits, instead of recognising it.
        loras: adapters that are merged into a checkpoint's weights while they are read.

    Raises:
        FileError: there is nothing at the path.
        InputError: it is no model that can be read; the sentence says why.
    """
    if not path.exists():
        raise FileError(f"There is no file or folder {path}.", "`localmix ls` shows the models of the library.")
    if path.is_dir() or path.name == "config.json":
        from localmix.sources.checkpoint import open_checkpoint

        return open_checkpoint(path if path.is_dir() else path.parent, pre=pre, loras=loras)
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        raise InputError(
            f"{path} is a pickle, which can run any program when it is opened.",
            "Use the safetensors files of the same model.",
        )
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is one file of a checkpoint.", f"Give its folder: {path.parent or Path('.')}.")
    if loras:
        raise InputError(f"{path}: an adapter is merged into a checkpoint, not into a GGUF file.", _WANTS_CHECKPOINT)
    from localmix.sources.gguf import GGUFFile

    return GGUFFile(path, pre=pre)
