"""A Modelfile gives the prompts that the model's own chat template gives."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from localmix.conversation.chat_template import render
from localmix.errors import InputError, UsageError
from localmix.export import Message, find_turns, go_template, go_text, ollama, stops
from tests.modelfiles import parse_modelfile, run_template
from tests.old_files import write_with_single_experts
from tests.random_model import write_random_model

CHATML = """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

WITH_DEFAULT = (
    """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif -%}"""
    + CHATML
)

LLAMA_2 = """
{%- if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}{% if message.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"""

# refuses a system message, which is then put in front of the user's first one
MIXTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{%- if message.role == 'user' %}{{ ' [INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""

LLAMA_3 = """{{ bos_token }}{% for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif -%}
{%- for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}{% endfor -%}
{{ '<start_of_turn>model\\n' }}"""

ALPACA = """{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' }}
{%- else %}{{ message.content + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"""

# what a Go template or a Modelfile could stumble over
AWKWARD = """{% for message in messages %}{% if message.role == 'system' %}{{ '{{sys}} "' + message.content + '\"""' }}
{%- elif message.role == 'user' %}{{ '\u3000{' + message.content + '`\\t}}{' }}
{%- else %}{{ message.content + '｜{{ end }}｜' }}{% endif %}{% endfor %}"""

THINKING = CHATML.replace("assistant\\\\n' }}", "assistant\\\\n<think>\\\\n' }}")

TEMPLATES = {
    "chatml": (CHATML, ["<|im_end|>", "<|im_start|>user"]),
    "chatml with a default": (WITH_DEFAULT, ["<|im_end|>", "<|im_start|>user"]),
    "llama-2": (LLAMA_2, ["</s>", "[INST]"]),
    "mixtral": (MIXTRAL, ["</s>", "[INST]"]),
    "llama-3": (LLAMA_3, ["<|eot_id|>", "<|start_header_id|>user<|end_header_id|>"]),
    "gemma": (GEMMA, ["<end_of_turn>", "<start_of_turn>user"]),
    "alpaca": (ALPACA, ["</s>", "### Instruction:"]),
    "thinking": (THINKING, ["<|im_end|>", "<|im_start|>user"]),
    "awkward": (AWKWARD, ["｜{{ end }}｜\u3000{"]),
}
SPECIAL = [
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|im_start|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|im_end|>",
    "</s>",
    "<s>",
]


def prompt_of(template: str, messages: Sequence[Message]) -> str:
    return render(template, messages, bos="<s>", eos="</s>").removeprefix("<s>")


def conversations() -> list[list[Message]]:
    system = {"role": "system", "content": "Be {{ brief }}.\n\n「はい」"}
    users = [{"role": "user", "content": text} for text in ("Hello", "And\nnow?", 'Say "{{ no }}"')]
    answers = [{"role": "assistant", "content": text} for text in ("Yes.", "Now.")]
    turns = [users[:1], [users[0], answers[0], users[1]], [users[0], answers[0], users[1], answers[1], users[2]]]
    return [[*start, *turn] for start, turn in itertools.product(([], [system]), turns)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_the_same(name: str) -> None:
    template, expected_stops = TEMPLATES[name]
    turns = find_turns(lambda messages: prompt_of(template, messages))
    assert turns is not None
    for conversation in conversations():
        assert run_template(go_template(turns), conversation) == prompt_of(template, conversation)
    assert stops(turns, SPECIAL) == expected_stops


def test_an_answer_that_is_gone_on_with_stays_open() -> None:
    turns = find_turns(lambda messages: prompt_of(CHATML, messages))
    assert turns is not None
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "We"}]
    assert run_template(go_template(turns), begun) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWe"


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}[{{ loop.index }}] {{ message.content }}{% endfor %}",  # numbers the turns
        "{{ messages[-1].content }}",  # forgets the rest
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{% for message in messages %}{{ message.content | length }} {{ message.content }}\n{% endfor %}",
        "{% for message in messages %}{{ message.content }}{{ message.content }}{% endfor %}",
        "nothing",
    ],
)
def test_templates_that_do_more_are_not_guessed(template: str) -> None:
    assert find_turns(lambda messages: prompt_of(template, messages)) is None


def test_a_template_that_drops_the_system_prompt(tmp_path: Path) -> None:
    template = MIXTRAL.replace("for message in messages", "for message in messages if message.role != 'system'")
    turns = find_turns(lambda messages: prompt_of(template, messages))
    assert turns is not None and turns.system is None
    path = with_template(tmp_path, template)
    assert any("leaves a system prompt out" in note for note in ollama(path, system="Be kind.").notes)


@pytest.mark.parametrize(
    "text", ["{{", "{", "a{{b}}c", "{{{", '"""', "\u3000\u00a0\t", "🦊`", "\x1b[0m", "line\nline "]
)
def test_text_in_go(text: str) -> None:
    assert run_template(go_text(text), []) == text
    assert '"""' not in go_text(text) and "`" not in go_text(text)
    assert all(character.isprintable() or character == "\n" for character in go_text(text))


def with_template(folder: Path, template: str, **own: str | int | float) -> Path:
    return write_random_model(folder / "fox-F32.gguf", layers=1, own={**own}, chat_template=template)


def test_the_whole_file(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    path = with_template(folder, CHATML, **{"general.sampling.temp": 0.75, "general.sampling.top_k": 20})
    system = 'You are "Fox".\n  Say 你好。 '
    modelfile = ollama(path, system=system, context=1234)
    parsed = parse_modelfile(modelfile.text)
    assert parsed.model == str(path)
    assert parsed.system == system
    assert run_template(parsed.template, conversations()[-1]) == prompt_of(CHATML, conversations()[-1])
    assert parsed.parameters == list(modelfile.parameters)
    settings = dict(parsed.parameters)
    assert (settings["num_ctx"], settings["temperature"], settings["top_k"]) == ("1234", "0.75", "20")
    assert (settings["top_p"], settings["repeat_penalty"], settings["repeat_last_n"]) == ("0.9", "1.1", "64")
    # the vocabulary has no such token: the whole line is the text to stop at
    assert [value for name, value in parsed.parameters if name == "stop"] == ["<|im_end|>"]


def test_the_awkward_file_comes_back_too(tmp_path: Path) -> None:
    parsed = parse_modelfile(ollama(with_template(tmp_path, AWKWARD)).text)
    for conversation in conversations():
        assert run_template(parsed.template, conversation) == prompt_of(AWKWARD, conversation)


def test_without_a_template_and_with_one_that_cannot_be_carried_over(tmp_path: Path) -> None:
    for template, words in (
        ("", "has no chat template"),
        ("{{ messages[-1].content }}", "does more"),
        ("{% broken", "fails"),
    ):
        modelfile = ollama(with_template(tmp_path, template))
        assert not modelfile.template and not parse_modelfile(modelfile.text).template
        assert any(words in note for note in modelfile.notes)


def test_a_template_that_is_no_utf8(tmp_path: Path) -> None:
    path = with_template(tmp_path, CHATML)
    path.write_bytes(path.read_bytes().replace(b"<|im_end|>", b"<|im\xffend|>"))
    modelfile = ollama(path)
    assert not modelfile.template and "not UTF-8" in modelfile.notes[0]
    modelfile.text.encode("utf-8")


def test_a_template_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmix.export.TEMPLATE_SECONDS", 0.5)
    path = with_template(tmp_path, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    started = time.monotonic()
    modelfile = ollama(path)
    assert time.monotonic() - started < 15
    assert any("takes longer than 0.5 seconds" in note for note in modelfile.notes)


def test_what_ollama_cannot_take(tmp_path: Path, random_model: Path) -> None:
    old = write_with_single_experts(random_model, tmp_path / "old.gguf")
    with pytest.raises(InputError, match="nor does Ollama") as refused:
        ollama(old)
    assert "localmix convert" in refused.value.hint
    with pytest.raises(UsageError, match="three quotes"):
        ollama(random_model, system='"""')


def test_the_context_is_what_the_model_was_trained_for(random_model: Path) -> None:
    assert dict(ollama(random_model).parameters)["num_ctx"] == "2048"
