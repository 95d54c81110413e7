"""What `localmix ppl --json` wrote, read back as a report: a page can be made long after the measurement."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localmix.errors import InputError
from localmix.measurement.divergence import Divergence
from localmix.measurement.provenance import Provenance
from localmix.output import file_error
from localmix.presentation.published import load
from localmix.presentation.report import Report
from localmix.presentation.table import ContextPoint, QuantizationRow

# the table of a hundred models with everything measured is a tenth of this
LARGEST = 16 * 2**20


def read_result(path: Path) -> Report:
    """The report of a file that `localmix ppl --json` wrote.

    Raises:
        FileError: it cannot be read.
        InputError: it is no such document; the sentence says where it differs.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise file_error(error, path, "read") from error
    if len(content) > LARGEST:
        raise _error(path, "it is too large")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise _error(path, "it is not JSON") from None
    return from_document(document, path)


def from_document(document: object, path: Path) -> Report:
    """The report of a document of `localmix ppl`; `path` names it in errors.

    Raises:
        InputError: as `read_result`.
    """
    if not isinstance(document, dict) or not ("rows" in document or "points" in document):
        raise _error(path, "it has neither rows nor points")
    reader = _Reader(path)
    rows = reader.value(tuple[QuantizationRow, ...], document.get("rows", []), "rows")
    points = reader.value(tuple[ContextPoint, ...], document.get("points", []), "points")
    provenance = reader.value(Provenance, document, "the document")
    published = {row.model for row in (*rows, *points) if row.origin == "published"}
    notes = [note for table in load().values() if table.model in published for note in table.about]
    models = dict.fromkeys(row.model for row in (*rows, *points) if row.origin == "measured")
    what = "what each type costs" if rows else "perplexity over context"
    return Report(f"{', '.join(models)}: {what}", provenance.fields, rows, points, notes)


def _error(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is no result of `localmix ppl`: {reason}.", "Write one with `localmix ppl … --json > FILE`."
    )


class _Reader:
    """Turns JSON into dataclasses, field by field as they are annotated; what they do not have is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def value(self, hint: Any, value: Any, where: str) -> Any:
        """A value of the annotated type; JSON has no NaN, so null is NaN where only a number is allowed."""
        kind = typing.get_origin(hint) or hint
        arguments = typing.get_args(hint)
        if kind in (types.UnionType, typing.Union):
            (inner,) = (argument for argument in arguments if argument is not type(None))
            return None if value is None else self.value(inner, value, where)
        if kind is tuple and isinstance(value, list):
            return tuple(self.value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        if isinstance(value, dict):
            if dataclasses.is_dataclass(kind):
                return self._record(kind, value, where)
            if kind is Mapping:
                return {key: self.value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and value is None:
            return math.nan
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind in (str, int, float, bool) and type(value) is kind:
            return value
        raise _error(self._path, f"{where} is not what it should be")

    def _record(self, kind: Any, value: Mapping[str, Any], where: str) -> Any:
        # a table imports no divergence, only its name
        hints = typing.get_type_hints(kind, localns={"Divergence": Divergence})
        found = {}
        for field in dataclasses.fields(kind):
            if field.name in value:
                found[field.name] = self.value(hints[field.name], value[field.name], f"{where}.{field.name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise _error(self._path, f"{where} has no {field.name}")
        return kind(**found)
