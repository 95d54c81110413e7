"""JSON Schema as a grammar: llama.cpp parses it, what follows it is valid, and what it cannot promise is refused."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from localmix.conversation.grammar import from_json_schema
from localmix.errors import UsageError
from localmix.native.chooser import Chooser
from localmix.native.gbnf import Grammar
from localmix.native.model import Model
from localmix.sampling import Sampling

_grammars: dict[str, str] = {}

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Its vocabulary has every byte."""
    from tests.random_model import write_random_model

    folder = tmp_path_factory.mktemp("grammar")
    with Model(write_random_model(folder / "m.gguf", layers=1, hidden=64, feed_forward=64, experts=0)) as model:
        yield model


def accepts(model: Model, schema: object, text: str) -> bool:
    """Whether the grammar allows a whole text, byte by byte."""
    key = json.dumps(schema)
    source = _grammars[key] if key in _grammars else _grammars.setdefault(key, from_json_schema(schema))
    with Grammar(model, source) as grammar:
        for byte in text.encode():
            token = byte + 3  # behind <unk>, <s> and </s>
            if not grammar.allowed(np.asarray([token]))[0]:
                return False
            grammar.accept(token)
        return bool(grammar.allowed(np.asarray([model.vocabulary.eos]))[0])


def babble(model: Model, schema: object, seed: int) -> str:
    """A random text that follows the grammar, with a weakness for what comes to an end."""
    numbers = np.random.default_rng(seed)
    ending = [ord(c) + 3 for c in '"]},'] + [model.vocabulary.eos]
    said = b""
    with Grammar(model, from_json_schema(schema)) as grammar:
        chooser = Chooser(Sampling(temperature=1, top_k=0, top_p=1, repeat_penalty=1, seed=seed), grammar)
        for _ in range(3000):
            logits = numbers.standard_normal(model.vocabulary.size).astype(np.float32)
            logits[ending] += 4
            token = chooser.draw(chooser.probabilities(logits, []))
            chooser.accept(token)
            if model.ends_generation(token):
                return said.decode()
            said += model.piece(token)
    raise AssertionError(f"no end: {said!r}")


def whole_numbers(low: int | None, high: int | None) -> dict[str, object]:
    schema: dict[str, object] = {"type": "integer"}
    schema |= {} if low is None else {"minimum": low}
    return schema | ({} if high is None else {"maximum": high})


SCHEMAS: list[Any] = [
    True,
    {},
    {"type": "object"},
    {"type": ["string", "null", "boolean"]},
    {"enum": ["a", 'q"\\\n', 1, None, [1, {"b": 2}], "中"]},
    {"const": {"a": [1.5, True]}},
    {"type": "integer", "enum": [1, 2, "x", 3.0, True]},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "maxLength": 1000},
    {"type": "number"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -3, "exclusiveMaximum": 7.5},
    {"type": "number", "maximum": -2},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 5},
    {"type": "array", "maxItems": 0},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 1},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "string"}]},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 3, "maxItems": 4},
    {"prefixItems": [{"const": 1}], "minItems": 2},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {}}, "required": ["b"]},
    {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
    {"type": "object", "properties": {"a": {"const": 1}, "ab": {"const": 2}}, "additionalProperties": {"type": "null"}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {'"': {"const": 1}, "\n": {"const": 1}, "é": {"const": 1}}},
    {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]},
    {"oneOf": [{"$ref": "#/definitions/a"}, {"const": 5}], "definitions": {"a": {"type": "string"}}},
    {"allOf": [{"type": "boolean"}], "title": "T", "description": "D"},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    TREE,
    {"type": "string", "pattern": "^[a-c]{2,3}-\\d+(x|yz)?$"},
    {"type": "string", "pattern": "b[^a-z]"},
    {"type": "string", "pattern": '^(\\w|\\\\|"|\\.)*$'},
    {"type": "string", "pattern": "^[^\\x00-\\x7f]{1,3}.\\s?\\S\\D$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:70])
def test_what_follows_the_grammar_is_valid(model: Model, schema: object) -> None:
    for seed in range(12):
        text = babble(model, schema, seed)
        jsonschema.validate(json.loads(text), schema)  # type: ignore[arg-type]


def make_schema(numbers: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema of supported keywords."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum"]
    kind = numbers.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "array", "anyOf"])
    if kind == "enum":
        return {"enum": numbers.sample([1, "two", None, 3.5, 'ä"\\', False, [], {"k": 1}], numbers.randint(1, 4))}
    if kind == "anyOf":
        return {"anyOf": [make_schema(numbers, depth + 1) for _ in range(numbers.randint(1, 3))]}
    schema: dict[str, Any] = {"type": kind}
    if kind == "string" and numbers.random() < 0.5:
        schema |= {"minLength": numbers.randint(0, 3), "maxLength": numbers.randint(3, 9)}
    if kind in ("integer", "number") and numbers.random() < 0.7:
        low = numbers.randint(-2000, 2000)
        bounds = {"minimum": low, "exclusiveMinimum": low - 1}, {"maximum": low + 9, "exclusiveMaximum": low + 999}
        for bound in bounds:
            schema |= dict(numbers.sample(sorted(bound.items()), numbers.randint(0, 1)))
    if kind == "array":
        schema |= {"items": make_schema(numbers, depth + 1), "minItems": numbers.randint(0, 2), "maxItems": 4}
    if kind == "object":
        names = numbers.sample(["a", "b", "aa", "name", "中", 'x"y', "to\\p"], numbers.randint(0, 4))
        schema["properties"] = {name: make_schema(numbers, depth + 1) for name in names}
        schema["required"] = numbers.sample(names, numbers.randint(0, len(names)))
        schema["additionalProperties"] = numbers.choice([False, False, make_schema(numbers, 3)])
    return schema


def test_many_random_schemas(model: Model) -> None:
    numbers = random.Random(7)
    for seed in range(120):
        schema = make_schema(numbers)
        text = babble(model, schema, seed)
        try:
            jsonschema.validate(json.loads(text), schema)
        except (jsonschema.ValidationError, ValueError) as error:
            raise AssertionError(f"{schema}\n{text}") from error


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (0, 9), (1, 10), (7, 123), (99, 101), (-5, 5), (-120, -7), (-1, 0), (1000, 2999), (None, 12), (95, None)],
)
def test_whole_numbers_are_exactly_those_of_the_range(model: Model, low: int | None, high: int | None) -> None:
    gbnf = whole_numbers(low, high)
    numbers = sorted(
        {*range(-15, 15), *range(85, 130), *range(-130, -110), 998, 1000, 1001, 2999, 3000, 10**9, -(10**9)}
    )
    for number in numbers:
        inside = (low is None or number >= low) and (high is None or number <= high)
        assert accepts(model, gbnf, str(number)) == inside, number
    assert not accepts(model, gbnf, "007")


def test_fractions_stay_in_the_range(model: Model) -> None:
    schema = {"type": "number", "minimum": -2, "exclusiveMaximum": 3}
    for text, inside in {
        "-2": True,
        "-2.5": False,
        "-1.5": True,
        "-0.5": True,
        "0.5": True,
        "2.9": True,
        "3": False,
    }.items():
        assert accepts(model, schema, text) == inside, text
    assert not accepts(model, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "0")
    assert accepts(model, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "0.25")


def test_what_people_write_is_accepted(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "tags"],
    }
    for text in (
        '{"name": "Ada \\"L\\" \\u00e9 中😀", "age": 36, "tags": []}',
        '{"name":"x","tags":["a","b"]}',
        '{\n  "name": "x",\n  "age": 0,\n  "tags": [\n    "a"\n  ]\n}',
    ):
        jsonschema.validate(json.loads(text), schema)
        assert accepts(model, schema, text), text
    for text in ('{"tags":[],"name":"x"}', '{"name":"x"}', '{"name":"x","tags":[],}', '{"name":"a\nb","tags":[]}'):
        assert not accepts(model, schema, text), text
    assert accepts(model, TREE, '{"name":"a","children":[{"name":"b","children":[]},{"name":"c"}]}')
    assert not accepts(model, {"type": "string"}, '"\\ud800"')
    assert accepts(model, {"type": "string", "minLength": 1, "maxLength": 1}, '"😀"')


def test_further_properties_have_names_of_their_own(model: Model) -> None:
    schema = {"properties": {"a": {"const": 1}, "abc": {"const": 1}}, "additionalProperties": {"const": 2}}
    for name in ("", "b", "ab", "abcd", "aa", "abd", "中"):
        assert accepts(model, schema, f'{{"{name}":2}}'), name
    for name in ("a", "abc", "\\u0061", "ab\\u0063"):
        assert not accepts(model, schema, f'{{"{name}":2}}'), name
    assert accepts(model, schema, '{"a":1,"b":2,"c":2}')


@pytest.mark.parametrize(
    "pattern", ["^a+b?$", "x", "^(ab|c)*d{2}$", "^[a-c\\-\\]]{1,2}$", "^\\d\\D$", "a.c|bb", "^[^ab]$"]
)
def test_patterns_match_what_the_expression_matches(model: Model, pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    for length in range(4):
        for letters in itertools.product("abcdx1]-"[: 8 if length < 3 else 6], repeat=length):
            text = "".join(letters)
            assert accepts(model, schema, json.dumps(text)) == bool(re.search(pattern, text)), text


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (3, "an object is needed, not 3"),
        (False, "allows nothing at #"),
        ({"type": "text"}, 'no type "text"'),
        ({"type": 5}, "`type` is 5"),
        ({"type": []}, "`type` is"),
        ({"not": {}}, "`not` at #"),
        ({"type": "object", "patternProperties": {}}, "`patternProperties`"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "integer", "multipleOf": 2}, "`multipleOf`"),
        ({"properties": {"a": {"if": {}}}}, "`if` at #/properties/a"),
        ({"type": "string", "minimum": 3}, "`minimum`"),
        ({"$ref": "#/$defs/none"}, "which it does not have"),
        ({"$ref": "http://example.com/s.json"}, "only `#/…`"),
        ({"$ref": "#"}, "refers to itself"),
        ({"$ref": "#/a", "type": "string"}, r"`\$ref` beside `type`"),
        ({"allOf": [{}, {}]}, "`allOf` of several"),
        ({"anyOf": []}, "a list of schemas"),
        ({"enum": []}, "no value of `enum`"),
        ({"enum": 3}, "`enum` is 3"),
        ({"type": "string", "enum": [1]}, "no value of `enum`"),
        ({"minItems": 3, "maxItems": 2}, "`maxItems` is less"),
        ({"maxItems": -1}, "`maxItems` is -1"),
        ({"maxLength": 10**6}, "more than 1000"),
        ({"prefixItems": [{}], "items": False, "minItems": 2}, "`minItems`"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "range is empty"),
        ({"type": "integer", "minimum": "3"}, "`minimum` is"),
        ({"type": "integer", "minimum": 10**30}, "more than 16 digits"),
        ({"type": "number", "minimum": 0.2, "maximum": 0.3}, "no whole number"),
        ({"required": ["a"], "additionalProperties": False}, "requires and forbids 'a'"),
        ({"type": "string", "format": "email"}, "`format: email`"),
        ({"type": "string", "pattern": "(?=a)"}, r"\(\?="),
        ({"type": "string", "pattern": "(a"}, "without"),
        ({"type": "string", "pattern": "a**"}, "not supported"),
        ({"type": "string", "pattern": "\\b"}, "not supported"),
        ({"type": "string", "pattern": "^a|b"}, "one alternative"),
        ({"type": "string", "pattern": "a{2000}"}, "more than 1000"),
        ({"type": "string", "pattern": "a{2"}, "not supported"),
        ({"type": "string", "pattern": "[z-a]"}, "backwards"),
        ({"type": "string", "pattern": "[a"}, "ends too early"),
        ({"type": "string", "pattern": "(" * 99}, "nested"),
        ({"type": "string", "pattern": "a", "minLength": 2}, "`pattern` beside"),
        (nested(100), "64 levels"),
        ({"enum": list(range(9000))[:1], "const": 5}, "no value"),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(schema: object, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        from_json_schema(schema)


def test_a_large_schema_is_written_in_no_time(model: Model, tmp_path: Path) -> None:
    properties = {f"property{number}": {"type": "integer", "minimum": number} for number in range(300)}
    with Grammar(model, from_json_schema({"properties": properties, "required": ["property299"]})):
        pass
    too_many = {f"p{number}": {"properties": {f"q{number}": {"const": number}}} for number in range(4000)}
    with pytest.raises(UsageError, match="more than 5000 rules"):
        from_json_schema({"properties": too_many})
