"""The table of architectures: `model_type` of a config.json → the row that converts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localmix.architectures.base import Architecture
from localmix.architectures.bert import BERT
from localmix.architectures.deepseek import DEEPSEEK, DEEPSEEK_V2
from localmix.architectures.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from localmix.architectures.gpt_oss import GPT_OSS
from localmix.architectures.llama import LLAMA, MISTRAL, MIXTRAL
from localmix.architectures.olmo import OLMO2
from localmix.architectures.phi import PHI3
from localmix.architectures.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from localmix.errors import InputError
from localmix.sources.documents import shown

_ROWS = (
    *(LLAMA, MISTRAL, MIXTRAL),
    *(QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE),
    *(GEMMA2, GEMMA3, GEMMA3_TEXT),
    *(PHI3, OLMO2),
    *(DEEPSEEK, DEEPSEEK_V2),
    *(GPT_OSS, BERT),
)
ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in _ROWS}


def find_architecture(config: Mapping[str, Any], path: Path) -> Architecture:
    """The row for a config.json.

    Args:
        config: its content.
        path: the file, for messages.

    Raises:
        InputError: nothing here converts this model.
    """
    known = f"Known are {', '.join(ARCHITECTURES)}; `localmix convert --upstream` may convert others."
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise InputError(f"{path}: model_type {shown(model_type)} cannot be converted.", known)
    classes = config.get("architectures") or row.classes[:1]
    # The same model_type also names classifiers and reward models, which have no vocabulary to predict.
    if not isinstance(classes, list | tuple) or classes[0] not in row.classes:
        raise InputError(
            f"{path}: architectures {shown(classes)} is not a model of type {model_type} that can be converted.",
            f"Expected is {' or '.join(row.classes)}.",
        )
    return row
