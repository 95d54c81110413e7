"""Chat templates of a checkpoint: in tokenizer_config.json, in files of their own, several of them by name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType as ValueType

from localmix.errors import InputError
from localmix.sources.base import MetaValue, array, text
from localmix.sources.documents import read_optional_object
from localmix.sources.positional import read_whole
from localmix.sources.tokenizers.vocabulary import CONFIG, is_text

_TEMPLATE_LIMIT = 2**20


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, MetaValue]:
    """The chat template, and further ones by name.

    Raises:
        InputError: of a kind that is no template, too big, or not text.
    """
    path = folder / CONFIG
    found: Any = tokenizer_config.get("chat_template")
    if found is None:
        path, found = _template_beside(folder)
    if found is None:
        return {}
    choices = found if isinstance(found, list) else [{"name": "default", "template": found}]
    metadata: dict[str, MetaValue] = {}
    names: set[str] = set()
    for choice in choices:
        name = choice.get("name") if isinstance(choice, dict) else None
        template = choice.get("template") if isinstance(choice, dict) else None
        if not isinstance(name, str) or not isinstance(template, str) or not is_text(template):
            raise InputError(f"{path}: the chat template is not text.", "Download the file again.")
        name = re.sub("[^A-Za-z0-9]", "_", name)
        if name == "default":
            metadata["tokenizer.chat_template"] = text(template)
        elif name:
            names.add(name)
            metadata[f"tokenizer.chat_template.{name}"] = text(template)
    if names:
        metadata["tokenizer.chat_templates"] = array(ValueType.STRING, sorted(names))
    return metadata


def _template_beside(folder: Path) -> tuple[Path, Any]:
    """The chat template in a file of its own, and where it was found."""
    path = folder / "chat_template.jinja"
    if os.path.exists(path):
        further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if not further:
            return path, _template_text(path)
        return path, [
            {"name": name, "template": _template_text(file)}
            for name, file in [("default", path), *((file.stem, file) for file in further)]
        ]
    path = folder / "chat_template.json"
    return path, read_optional_object(path).get("chat_template")


def _template_text(path: Path) -> str:
    try:
        return read_whole(path, _TEMPLATE_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8.", "Download the file again.") from error
