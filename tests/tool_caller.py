"""TinyMix with a chat template that knows tools, and with the one token more that begins a call."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import edit_json, read_shard, write_shard
from tests.conftest import TINYMIX

MARK = "<tool_call>"
MARK_TOKEN = 2048
END_TOKEN = 2

TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
    {{- ' [INST] Functions:' -}}
    {%- for tool in tools -%}{{- ' ' + (tool | tojson) -}}{%- endfor -%}
    {{- ' [/INST]' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if message.content -%}{{- ' ' + message.content -}}{%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- (call.function.arguments | tojson) + '}</tool_call>' -}}
        {%- endfor -%}
        {{- eos_token -}}
    {%- else -%}
        {{- ' [INST] ' + message.content + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""


def write_tool_caller(folder: Path) -> Path:
    """Write the checkpoint. It was never taught to call: a request has to favour the token `MARK_TOKEN`, and
    llama-server's grammar leads from there."""
    shutil.copytree(TINYMIX, folder, ignore=shutil.ignore_patterns("*.txt", "*.py", "*.jsonl", "__pycache__"))

    def add_mark(settings: Any) -> None:
        settings["added_tokens_decoder"][str(MARK_TOKEN)] = {"content": MARK, "special": False}
        settings["chat_template"] = TEMPLATE

    edit_json(folder / "tokenizer_config.json", add_mark)
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=MARK_TOKEN + 1))
    for shard in folder.glob("*.safetensors"):
        tensors = read_shard(shard)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                dtype, values = tensors[name]
                tensors[name] = dtype, np.vstack((values, np.zeros_like(values[:1])))
        write_shard(shard, tensors)
    return folder
