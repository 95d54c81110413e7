"""JSON Schema as a grammar of llama.cpp's (GBNF): a reply that follows it is JSON that the schema accepts.

    gbnf = from_json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})

Properties come in the schema's order. A grammar allows part of what a schema does, never more: where the schema is
open (further properties, long numbers), the reply is plain; and of several alternatives it follows one (`oneOf` is read
as `anyOf`: that no other one fits is up to the schema). What cannot be promised is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from localmix.conversation import text_pattern
from localmix.conversation.text_pattern import JSON_CHARACTER, literal
from localmix.errors import UsageError

DEPTH_LIMIT = 64
RULES_LIMIT = 5000
MOST_REPEATED = 1000  # llama.cpp takes 2000 in all
MOST_DIGITS = 16

# What describes a schema without asking for anything.
ANNOTATIONS = {"$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "title", "description", "default"}
ANNOTATIONS |= {"examples", "deprecated", "readOnly", "writeOnly"}
# The keywords of each type, and what a schema without a type is taken for.
KEYWORDS: dict[str, frozenset[str]] = {
    "object": frozenset(["properties", "required", "additionalProperties"]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    "integer": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    "boolean": frozenset(),
    "null": frozenset(),
}
FORMATS = {
    "date": r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])$",  # the days that every month has
    "time": r"^([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)$",
    "date-time": r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?Z$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
}
# Rules of JSON itself, written where they are used.
JSON_RULES = {
    "ws": r'" "? | "\n" [ \t]{0,16}',
    "char": JSON_CHARACTER,
    "string": r'"\"" char* "\""',
    "integer": rf'"-"? ("0" | [1-9] [0-9]{{0,{MOST_DIGITS - 1}}})',
    "fraction": rf'"." [0-9]{{0,{MOST_DIGITS - 1}}} [1-9]',
    "number": rf'integer ("." [0-9]{{1,{MOST_DIGITS}}})? ([eE] [-+]? [0-9] [0-9]?)?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": '"{" ws (pair ("," ws pair)*)? ws "}"',
    "pair": 'string ":" ws value',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "value": "object | array | string | number | boolean | null",
}
_REFERENCE = re.compile("|".join(sorted((rf"\b{name}\b" for name in JSON_RULES), key=len, reverse=True)))


def from_json_schema(schema: object) -> str:
    """The grammar of a JSON Schema, as parsed from JSON.

    Raises:
        UsageError: the schema is broken, or uses what is not supported; the sentence names the keyword and where.
    """
    return _Writer(schema).grammar()


class _Writer:
    """Collects the rules of a schema."""

    def __init__(self, schema: object) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # body → name, so that what is the same is written once
        self._references: dict[str, str] = {}

    def grammar(self) -> str:
        root = self._visit(self._schema, "#", 0)
        lines = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._rules.items())]
        return "\n".join(lines) + "\n"

    def _json(self, name: str) -> str:
        """A rule of JSON itself, with those it refers to."""
        if name not in self._rules:
            body = self._rules[name] = JSON_RULES[name]
            # quoted text holds no references
            for found in _REFERENCE.findall(re.sub(r'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]', "", body)):
                self._json(found)
        return name

    def _rule(self, body: str, hint: str) -> str:
        """A rule with this body, under a name like the hint."""
        if body not in self._names:
            stem = re.sub(r"[^a-zA-Z0-9]+", "-", hint).strip("-")[-40:] or "part"
            name, number = f"{stem}-r", 1
            while name in self._rules:
                number += 1
                name = f"{stem}-r{number}"
            if len(self._rules) >= RULES_LIMIT:
                raise UsageError(f"The schema is too large: its grammar has more than {RULES_LIMIT} rules.")
            self._rules[name] = body
            self._names[body] = name
        return self._names[body]

    def _visit(self, schema: object, place: str, depth: int) -> str:
        """The expression of a schema: a literal, a group or the name of a rule."""
        if depth > DEPTH_LIMIT:
            raise UsageError(f"The schema is nested more than {DEPTH_LIMIT} levels deep.")
        if schema is True:
            return self._json("value")
        if schema is False:
            raise UsageError(f"The schema allows nothing at {place}.")
        if not isinstance(schema, Mapping):
            raise UsageError(f"The schema is broken at {place}: an object is needed, not {_shown(schema)}.")
        asked = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        for key, visit in self._combinators().items():
            if key in asked:
                self._alone(asked, key, place)
                return visit(asked[key], f"{place}/{key}", depth + 1)
        types = self._types(asked, place)
        if "enum" in asked or "const" in asked:
            return self._values(asked, types, place)
        if not types:
            return self._json("value")
        known = frozenset({"type"}).union(*(KEYWORDS[name] for name in types))
        for key in asked:
            if key not in known:
                raise _unsupported(key, place)
        makers: dict[str, Callable[[Mapping[str, Any], str, int], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
        }
        parts = [makers[name](asked, place, depth) if name in makers else self._json(name) for name in types]
        return parts[0] if len(parts) == 1 else self._rule(" | ".join(parts), place)

    def _combinators(self) -> dict[str, Callable[[Any, str, int], str]]:
        return {"$ref": self._reference, "anyOf": self._any, "oneOf": self._any, "allOf": self._all}

    def _alone(self, asked: Mapping[str, Any], key: str, place: str) -> None:
        others = [other for other in asked if other != key]
        # a type beside alternatives says again what each of them says
        if others and not (others == ["type"] and key in ("anyOf", "oneOf")):
            raise UsageError(f"The schema has `{key}` beside `{others[0]}` at {place}, which is not supported.")

    def _types(self, asked: Mapping[str, Any], place: str) -> list[str]:
        """The types that a value may have; empty for all."""
        types = asked.get("type", [])
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list) or ("type" in asked and not types):
            raise UsageError(f"The schema is broken at {place}: `type` is {_shown(asked['type'])}.")
        for name in types:
            if not isinstance(name, str) or name not in KEYWORDS:
                raise UsageError(f"The schema is broken at {place}: there is no type {_shown(name)}.")
        if types or "enum" in asked or "const" in asked:
            return types
        for key in asked:
            for name, keywords in KEYWORDS.items():
                if key in keywords:
                    return [name]
            raise _unsupported(key, place)
        return []

    def _reference(self, target: object, place: str, depth: int) -> str:
        if not isinstance(target, str) or not target.startswith("#"):
            raise UsageError(f"The schema refers to {_shown(target)} at {place}: only `#/…` is supported.")
        if target not in self._references:
            found: Any = self._schema
            for step in filter(None, target[1:].split("/")):
                step = step.replace("~1", "/").replace("~0", "~")
                if isinstance(found, list) and step.isdigit() and int(step) < len(found):
                    found = found[int(step)]
                elif isinstance(found, Mapping) and step in found:
                    found = found[step]
                else:
                    raise UsageError(f"The schema refers to {target}, which it does not have.")
            # the name comes first: what is inside may refer to it
            name = f"ref{len(self._references) + 1}"
            self._references[target] = name
            body = self._visit(found, target, depth)
            if body == name:
                raise UsageError(f"The schema's {target} refers to itself.")
            self._rules[name] = body
        return self._references[target]

    def _any(self, schemas: object, place: str, depth: int) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise UsageError(f"The schema is broken at {place}: a list of schemas is needed.")
        parts = [self._visit(schema, f"{place}/{number}", depth) for number, schema in enumerate(schemas)]
        return self._rule(" | ".join(parts), place)

    def _all(self, schemas: object, place: str, depth: int) -> str:
        if not isinstance(schemas, list) or len(schemas) != 1:
            raise UsageError(f"The schema has `allOf` of several at {place}, which is not supported.")
        return self._visit(schemas[0], f"{place}/0", depth)

    def _values(self, asked: Mapping[str, Any], types: Sequence[str], place: str) -> str:
        values = asked.get("enum", [asked.get("const")])
        if not isinstance(values, list):
            raise UsageError(f"The schema is broken at {place}: `enum` is {_shown(values)}.")
        for key in asked:
            if key not in ("type", "enum", "const"):
                raise UsageError(f"The schema has `enum` or `const` beside `{key}` at {place}, which is not supported.")
        if "const" in asked:
            values = [value for value in values if _same(value, asked["const"])]
        if types:
            values = [value for value in values if any(_is_of(value, name) for name in types)]
        if not values:
            raise UsageError(f"The schema allows nothing at {place}: no value of `enum` has the right type.")
        texts = [literal(json.dumps(value, ensure_ascii=False, allow_nan=False)) for value in values]
        return texts[0] if len(texts) == 1 else self._rule(" | ".join(texts), place)

    def _object(self, asked: Mapping[str, Any], place: str, depth: int) -> str:
        properties = asked.get("properties", {})
        required = asked.get("required", [])
        further = asked.get("additionalProperties", not properties and not required)
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise UsageError(f"The schema is broken at {place}: `properties` is an object, `required` a list.")
        schemas: dict[str, object] = dict(properties)
        for name in required:
            if not isinstance(name, str):
                raise UsageError(f"The schema is broken at {place}: `required` names {_shown(name)}.")
            if name not in schemas:
                if asked.get("additionalProperties") is False:
                    raise UsageError(f"The schema allows nothing at {place}: it requires and forbids {name!r}.")
                schemas[name] = asked.get("additionalProperties", True)
        ws = self._json("ws")
        # from the last property to the first: what may follow when something stands before it, and when nothing does
        after = start = ""
        if further is not False:
            key = text_pattern.other_than(list(schemas), self._rule_for_text) if schemas else self._json("string")
            inside = self._visit(further, f"{place}/additionalProperties", depth + 1)
            pair = self._rule(f'{key} ":" {ws} {inside}', f"{place}-further")
            after, start = f'("," {ws} {pair})*', f'({pair} ("," {ws} {pair})*)?'
        for name in reversed(schemas):
            inside = self._visit(schemas[name], f"{place}/properties/{name}", depth + 1)
            pair = f'{literal(json.dumps(name, ensure_ascii=False))} ":" {ws} {inside}'
            here = self._rule(f"{pair} {after}".rstrip(), f"{place}-{name}")
            if name in required:
                start, after = here, f'"," {ws} {here}'
            else:
                start = self._rule(f"{here} | {start}" if start else f"{here}?", f"{place}-{name}-first")
                after = self._rule(
                    f'"," {ws} {here} | {after}' if after else f'("," {ws} {here})?', f"{place}-{name}-next"
                )
        return self._rule(" ".join(filter(None, ['"{"', ws, start, ws, '"}"'])), place)

    def _rule_for_text(self, body: str) -> str:
        self._json("char")
        return self._rule(body, "key")

    def _array(self, asked: Mapping[str, Any], place: str, depth: int) -> str:
        low, high = self._counts(asked, "minItems", "maxItems", place)
        prefix = asked.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise UsageError(f"The schema is broken at {place}: `prefixItems` is {_shown(prefix)}.")
        prefix = prefix[:high]
        parts = [self._visit(schema, f"{place}/prefixItems/{n}", depth + 1) for n, schema in enumerate(prefix)]
        items = asked.get("items", not prefix)
        if prefix and low > len(prefix) and "items" not in asked:
            items = True
        ws = self._json("ws")
        room = None if high is None else high - len(prefix)
        missing = max(low - len(prefix), 0)
        between = f' "," {ws} '
        if items is False or room == 0:
            if missing:
                raise UsageError(f"The schema allows nothing at {place}: `minItems` is more than there can be.")
            return self._rule(f'"[" {ws} {between.join(parts)} {ws} "]"', place)
        item = self._visit(items, f"{place}/items", depth + 1)
        if parts:
            more = f'("," {ws} {item}){_times(missing, room)}'
            return self._rule(f'"[" {ws} {between.join(parts)} {more} {ws} "]"', place)
        more = f'("," {ws} {item}){_times(max(missing - 1, 0), None if room is None else room - 1)}'
        inside = f"{item} {more}" if missing else f"({item} {more})?"
        return self._rule(f'"[" {ws} {inside} {ws} "]"', place)

    def _string(self, asked: Mapping[str, Any], place: str, depth: int) -> str:
        chosen = [key for key in ("pattern", "format") if key in asked]
        if chosen and len(KEYWORDS["string"] & asked.keys()) > 1:
            raise UsageError(f"The schema has `{chosen[0]}` beside other limits of a text at {place}: not supported.")
        if "format" in asked:
            if asked["format"] not in FORMATS:
                raise _unsupported(f"format: {asked['format']}", place)
            return self._pattern(FORMATS[asked["format"]], place)
        if "pattern" in asked:
            return self._pattern(asked["pattern"], place)
        if "minLength" not in asked and "maxLength" not in asked:
            return self._json("string")
        low, high = self._counts(asked, "minLength", "maxLength", place)
        return self._rule(rf'"\"" {self._json("char")}{_times(low, high)} "\""', place)

    def _pattern(self, pattern: object, place: str) -> str:
        if not isinstance(pattern, str):
            raise UsageError(f"The schema is broken at {place}: `pattern` is {_shown(pattern)}.")
        self._json("char")
        return self._rule(rf'"\"" {text_pattern.from_pattern(pattern)} "\""', place)

    def _counts(self, asked: Mapping[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
        low, high = asked.get(least, 0), asked.get(most)
        for key, value in ((least, low), (most, high)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise UsageError(f"The schema is broken at {place}: `{key}` is {_shown(value)}.")
            if value is not None and value > MOST_REPEATED:
                raise UsageError(f"The schema's `{key}` at {place} is more than {MOST_REPEATED}: not supported.")
        if high is not None and high < low:
            raise UsageError(f"The schema allows nothing at {place}: `{most}` is less than `{least}`.")
        return low, high

    def _integer(self, asked: Mapping[str, Any], place: str, depth: int) -> str:
        low, high = _integer_bounds(asked, place)
        if low is None and high is None:
            return self._json("integer")
        return self._rule(_integers(low, high, place), place)

    def _number(self, asked: Mapping[str, Any], place: str, depth: int) -> str:
        """A number; with bounds a whole one between them, or a fraction between two whole ones that are."""
        low, high = _integer_bounds(asked, place)
        least = max((asked[key] for key in ("minimum", "exclusiveMinimum") if key in asked), default=None)
        most = min((asked[key] for key in ("maximum", "exclusiveMaximum") if key in asked), default=None)
        if least is None and most is None:
            return self._json("number")
        parts = []
        if low is None or high is None or low <= high:
            parts.append(_integers(low, high, place))
        fraction = self._json("fraction")
        # k.f lies between k and k + 1, and -k.f between -k - 1 and -k
        up = 0 if least is None else max(0, math.ceil(least))
        up_end = None if most is None else math.floor(most) - 1
        if up_end is None or up <= up_end:
            parts.append(f"({_integers(up, up_end, place)}) {fraction}")
        down = 0 if most is None else max(0, math.ceil(-most))
        down_end = None if least is None else math.floor(-least) - 1
        if down_end is None or down <= down_end:
            parts.append(f'"-" ({_integers(down, down_end, place)}) {fraction}')
        if not parts:
            raise UsageError(f"The schema's range at {place} holds no whole number, which is not supported.")
        return self._rule(" | ".join(parts), place)


def _integer_bounds(asked: Mapping[str, Any], place: str) -> tuple[int | None, int | None]:
    """The least and the greatest whole number that the bounds allow."""
    for key in KEYWORDS["integer"]:
        value = asked.get(key, 0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise UsageError(f"The schema is broken at {place}: `{key}` is {_shown(value)}.")
        if abs(value) >= 10**MOST_DIGITS:
            raise UsageError(f"The schema's `{key}` at {place} has more than {MOST_DIGITS} digits: not supported.")
    lows = [math.ceil(asked[key]) for key in ("minimum",) if key in asked]
    lows += [math.floor(asked[key]) + 1 for key in ("exclusiveMinimum",) if key in asked]
    highs = [math.floor(asked[key]) for key in ("maximum",) if key in asked]
    highs += [math.ceil(asked[key]) - 1 for key in ("exclusiveMaximum",) if key in asked]
    return max(lows, default=None), min(highs, default=None)


def _integers(low: int | None, high: int | None, place: str) -> str:
    """The whole numbers from `low` to `high`, both included; None is without end."""
    if low is not None and high is not None and low > high:
        raise UsageError(f"The schema allows nothing at {place}: its range is empty.")
    parts = []
    if low is None or low < 0:
        nearest = 1 if high is None or high >= 0 else -high
        parts.append(f'"-" ({_naturals(nearest, None if low is None else -low)})')
    if high is None or high >= 0:
        parts.append(_naturals(max(low or 0, 0), high))
    return " | ".join(parts)


def _naturals(low: int, high: int | None) -> str:
    """The numbers from `low` (at least 0) to `high`."""
    parts = []
    last = len(str(high)) if high is not None else len(str(low))
    for digits in range(len(str(low)), last + 1):
        least = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        most = 10**digits - 1 if high is None else min(high, 10**digits - 1)
        parts += _same_length(str(least), str(most))
    if high is None and last < MOST_DIGITS:
        parts.append(f"[1-9] [0-9]{_times(last, MOST_DIGITS - 1)}")
    return " | ".join(parts)


def _same_length(low: str, high: str) -> list[str]:
    """The numbers between two of the same number of digits, as alternatives."""
    if low == high:
        return [f'"{low}"']
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return [f"[{low[0]}-{high[0]}]" + (f" [0-9]{{{rest}}}" if rest else "")]
    if low[0] == high[0]:
        return [f'"{low[0]}" ({" | ".join(_same_length(low[1:], high[1:]))})']
    parts = [f'"{low[0]}" ({" | ".join(_same_length(low[1:], "9" * rest))})']
    first, last = int(low[0]) + 1, int(high[0]) - 1
    if first <= last:
        parts.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return [*parts, f'"{high[0]}" ({" | ".join(_same_length("0" * rest, high[1:]))})']


def _times(low: int, high: int | None) -> str:
    if high is None:
        return "*" if low == 0 else f"{{{low},}}"
    return f"{{{low},{high}}}"


def _unsupported(key: str, place: str) -> UsageError:
    return UsageError(f"The schema asks for `{key}` at {place}, which is not supported.")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:39] + "…"


def _same(one: object, other: object) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _is_of(value: object, name: str) -> bool:
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return name == "number" or (name == "integer" and float(value).is_integer())
    kinds: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return kinds.get(type(value)) == name
