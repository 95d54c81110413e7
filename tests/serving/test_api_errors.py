from __future__ import annotations

import json

import pytest

from localmix.serving.api_errors import ApiError, engine_error


def told(message: str, status: int = 500, kind: str = "server_error") -> ApiError:
    body = json.dumps({"error": {"code": status, "message": message, "type": kind}}).encode()
    return engine_error(status, body, ("prompt", "tools", "temperature"))


@pytest.mark.parametrize(
    ("message", "status", "param"),
    [
        ("Field 'temperature': [json.exception.type_error.302] type must be number, but is string", 400, "temperature"),
        ("Failed to parse tools: Missing tool type: 5; tools = [5]", 400, "tools"),
        ("'messages' is required", 400, "messages"),
        ("[json.exception.out_of_range.403] key 'input' not found", 400, "input"),
        ("Cannot determine type of 'item'", 400, ""),
        ("vector::_M_range_check: __n", 400, ""),
        ("Compute error.", 500, ""),
        ("got exception: 'prompt'", 500, ""),
        ("decode() failed: x", 500, ""),
        ("std::bad_alloc", 500, ""),
    ],
)
def test_whose_fault_it_was_and_which_field(message: str, status: int, param: str) -> None:
    error = told(message)
    assert (error.status, error.param) == (status, param)
    assert "json.exception" not in error.message


def test_an_answer_that_is_no_error_is_not_passed_on() -> None:
    for body in (b"", b"Internal Server Error", b"[]", b'{"error": "text"}', b'{"error": {}}'):
        error = engine_error(500, body)
        assert error.status == 502 and error.kind == "server_error"


def test_a_text_larger_than_an_embeddings_batch_is_above_the_context() -> None:
    error = told("input (600 tokens) is too large to process. increase the physical batch size")
    assert (error.status, error.code) == (400, "context_length_exceeded")


def test_an_event_ends_the_one_that_was_cut() -> None:
    cut = b'data: {"choices": [{"te' + ApiError(503, "gone", code="x").event(anthropic=False)
    first, second, rest = cut.split(b"\n\n")
    assert first.startswith(b"data: ") and json.loads(second[6:])["error"]["code"] == "x" and rest == b""
    assert b"\n\nevent: error\ndata: " in ApiError(503, "gone").event(anthropic=True)


def test_any_text_can_be_told() -> None:
    assert json.loads(ApiError(404, "caf\u00e9 \udcff").body())["error"]["message"] == "caf\u00e9 \udcff"
