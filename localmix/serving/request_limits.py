"""How much one request may ask for: more than this ends a llama-server, or keeps it from everybody else.

It parses grammars and follows references of schemas by recursion, gives each text of a list a place in its queue,
looks a key up by comparing it with all others, and fetches pictures from wherever their addresses point to. What can
hang it in spite of these bounds (a grammar that may be read in too many ways) ends with `Engine`'s patience.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from localmix.serving.api_errors import ApiError

# Lists of texts that are worked on one by one; OpenAI's API takes as many.
TEXTS = 2048
# What a client has no use for above this, and every token pays for.
LARGEST_NUMBER = {
    "repeat_last_n": 65536,
    "dry_penalty_last_n": 65536,
    "n_probs": 100,
    "logprobs": 100,
    "top_logprobs": 100,
}
LONGEST_LIST = {
    "input": TEXTS,
    "documents": TEXTS,
    "texts": TEXTS,
    "prompt": TEXTS,
    "content": TEXTS,
    "tools": 512,
    "stop": 64,
    "stop_sequences": 64,
    "samplers": 64,
    "dry_sequence_breakers": 64,
    "response_fields": 64,
    "lora": 64,
}
KEYS = 20_000  # of one object; enough for `logit_bias`
GRAMMAR_LETTERS, GRAMMAR_GROUPS, GRAMMAR_RULES = 256 << 10, 5000, 10_000
# OpenAI's API takes as many properties
SCHEMA_ENTRIES, PATTERN_LETTERS = 5000, 5000
# Of these llama.cpp counts down from the larger to the smaller past zero, until memory ends.
LEAST_AND_MOST = (("minLength", "maxLength"), ("minItems", "maxItems"))
# What a grammar says literally (texts, letters, tokens), and its comments
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|<[^>]*>?|#[^\r\n]*', re.DOTALL)
_IN_GRAMMAR = re.compile(r"\{\s*([0-9]+)\s*,\s*([0-9]+)\s*\}")
_IN_PATTERN = re.compile(r"\\.|\{([^{}]*)\}", re.DOTALL)  # an escaped brace is none
_REPETITION = re.compile(r"([0-9]*)(?:,([0-9]*))?")
_DIGITS = 9
SCHEMAS = ("json_schema", "response_format", "text")  # and each of `tools`
# How llama-server tells itself what came out of a template. It trusts them: a wrong one ends it.
INTERNAL = frozenset(
    {
        "chat_format",
        "chat_parser",
        "generation_prompt",
        "grammar_lazy",
        "grammar_triggers",
        "grammar_type",
        "message_delimiters",
        "preserved_tokens",
    }
)
CONVERSATIONS = ("messages", "input")
MEDIA = frozenset({"image", "image_url", "input_audio", "input_file", "input_image", "input_video", "video_url"})


def check_limits(asked: Mapping[str, Any]) -> None:
    """Refuse a request that asks for more than one client may have.

    Args:
        asked: the body, nested no deeper than recursion goes.

    Raises:
        ApiError: with the field that asks for it.
    """
    for name in INTERNAL & asked.keys():
        raise _refusal(name, "is for llama-server alone")
    for name, largest in LARGEST_NUMBER.items():
        value = asked.get(name)
        if isinstance(value, int | float) and value > largest:
            raise _refusal(name, f"may be {largest:,} at most")
    for name, longest in LONGEST_LIST.items():
        if _length(asked.get(name)) > longest:
            raise _refusal(name, f"may have {longest:,} entries at most")
    samplers = asked.get("samplers")
    if isinstance(samplers, str) and len(samplers) > LONGEST_LIST["samplers"]:  # a letter for each
        raise _refusal("samplers", f"may have {LONGEST_LIST['samplers']:,} letters at most")
    for name, value in asked.items():
        if any(isinstance(node, dict) and len(node) > KEYS for node in _nodes(value)):
            raise _refusal(name[:64], f"holds an object of more than {KEYS:,} keys")
    if len(asked) > KEYS:
        raise ApiError(400, f"The body has more than {KEYS:,} fields.", code="too_much")
    _check_grammar(asked.get("grammar"))
    for name in SCHEMAS:
        _check_schema(name, asked.get(name))
    tools = asked.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        _check_schema("tools", tool)
    for name in CONVERSATIONS:
        _check_media(name, asked.get(name))


def _length(value: Any) -> int:
    """Of a list; 0 for a list of tokens, which the context bounds, and for what is no list."""
    if not isinstance(value, list) or all(isinstance(entry, int) for entry in value):
        return 0
    return len(value)


def _check_grammar(grammar: Any) -> None:
    if not isinstance(grammar, str):
        return
    groups, rules = grammar.count("("), grammar.count("::=")
    if len(grammar) > GRAMMAR_LETTERS or groups > GRAMMAR_GROUPS or rules > GRAMMAR_RULES:
        raise _refusal(
            "grammar",
            f"may have {GRAMMAR_LETTERS:,} letters, {GRAMMAR_RULES:,} rules and {GRAMMAR_GROUPS:,} groups at most",
        )
    for low, high in _IN_GRAMMAR.findall(_LITERAL.sub("", grammar)):
        _check_repetition("grammar", low, high)


def _check_schema(name: str, schema: Any) -> None:
    entries = 0
    for node in _nodes(schema):
        if isinstance(node, dict | list):
            entries += len(node)
        if entries > SCHEMA_ENTRIES:
            raise _refusal(name, f"holds a schema of more than {SCHEMA_ENTRIES:,} entries")
        if isinstance(node, dict):
            pattern = node.get("pattern")
            if isinstance(pattern, str) and len(pattern) > PATTERN_LETTERS:
                raise _refusal(name, f"holds a pattern of more than {PATTERN_LETTERS:,} letters")
            if isinstance(pattern, str):
                _check_pattern(name, pattern)
            for least, most in LEAST_AND_MOST:
                low, high = node.get(least), node.get(most)
                if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
                    raise _refusal(name, f"has a {least} above its {most}")


def _check_pattern(name: str, pattern: str) -> None:
    for braces in _IN_PATTERN.finditer(pattern):
        if braces[1] is None:
            continue
        repetition = _REPETITION.fullmatch(braces[1])
        if repetition is None:  # llama.cpp would take the digits that it begins with
            raise _refusal(name, "holds a pattern with braces that count nothing; write \\{ for a brace itself")
        low, high = repetition[1], repetition[2]
        _check_repetition(name, low or "0", high or low or "0")


def _check_repetition(name: str, low: str, high: str) -> None:
    if max(len(low), len(high)) > _DIGITS or int(low) > int(high):
        raise _refusal(name, f"repeats something {low[:20]} to {high[:20]} times, which cannot be done")


def _check_media(name: str, conversation: Any) -> None:
    for node in _nodes(conversation):
        if isinstance(node, dict) and isinstance(node.get("type"), str) and node["type"] in MEDIA:
            addresses = (part for part in _nodes(node) if isinstance(part, str))
            if any(address.lower().lstrip().startswith(("http", "file:")) for address in addresses):
                raise _refusal(name, "names a picture or sound elsewhere: this server fetches nothing, so send it as a"
                                     " `data:` address")  # fmt: skip


def _nodes(document: Any) -> Iterator[Any]:
    """The document and all within it."""
    waiting = [document]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _refusal(name: str, why: str) -> ApiError:
    return ApiError(400, f"`{name}` {why}.", code="too_much", param=name)
