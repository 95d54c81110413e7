"""Chat templates: what the field writes into them, and what a hostile one may not do."""

from __future__ import annotations

import re
import time

import pytest

from localmix.conversation.chat_template import render
from localmix.errors import InputError

# Mixtral-8x7B-Instruct's first one: refuses a system message
MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def test_mixtral() -> None:
    prompt = render(MIXTRAL, [USER, ASSISTANT, USER], bos="<s>", eos="</s>")
    assert prompt == "<s>[INST] Hi [/INST]Hello</s>[INST] Hi [/INST]"


def test_a_refused_system_prompt_goes_into_the_first_message() -> None:
    assert render(MIXTRAL, [SYSTEM, USER], bos="<s>", eos="</s>") == "<s>[INST] Be kind.\n\nHi [/INST]"


def test_what_templates_of_the_field_use() -> None:
    template = """
    {%- for message in messages %}
        {%- if message.role == "system" %}{% continue %}{% endif %}
        {{- message | tojson }}
        {%- if loop.last and add_generation_prompt %}!{% endif %}
    {%- endfor %}
    {%- if tools is not none %}tools{% endif %}
    {{- strftime_now("%Y") }}
    {%- set ns = namespace(found=false) %}{% set ns.found = true %}{{ ns.found }}"""
    prompt = render(template, [SYSTEM, {"role": "user", "content": "<中>"}])
    assert re.fullmatch(r'\{"role": "user", "content": "<中>"\}!20\d\dTrue', prompt)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ nothing.at.all }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
    ],
)
def test_broken_and_hostile_templates_are_a_sentence(template: str) -> None:
    with pytest.raises(InputError, match=r"The chat template of model\.gguf"):
        render(template, [USER], name="The chat template of model.gguf")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**11 }}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_size_and_memory_are_limited(template: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"writes more|takes more"):
        render(template, [USER], name="The chat template of model.gguf")
    assert time.monotonic() - started < 20


def test_the_error_is_one_line() -> None:
    with pytest.raises(InputError) as caught:
        render("{{ raise_exception('a\\nb\\n') }}", [USER], name="It")
    assert caught.value.message == "It fails: a b."
