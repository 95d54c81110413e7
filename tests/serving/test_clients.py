"""What programs that know OpenAI's API meet when they are pointed at `localmix serve`: `openai` and `curl`."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest

from tests.serving.conftest import CALLER, CHAT, EMBEDDER, KEY, Served
from tests.tool_caller import END_TOKEN, MARK_TOKEN

QUESTION = {"role": "user", "content": "Where does Wilma live?"}
ANSWER = "Wilma lives at 47 Apple Court."


def client_of(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, timeout=60, max_retries=0)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as found:
        yield found


def reply(client: openai.OpenAI, *messages: dict[str, Any], model: str = CHAT, **options: Any) -> Any:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "messages": messages or [QUESTION]}
    return client.chat.completions.create(model=model, **settings | options)


def text_of(completion: Any) -> str:
    return str(completion.choices[0].message.content).strip()


# openai: models and chat


def test_models_are_listed_in_the_order_of_the_command(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [CHAT, CALLER, EMBEDDER]
    assert client.models.retrieve(CALLER).id == CALLER


@pytest.mark.parametrize("name", ["tinymix", "TinyMix:BF16", "tinymix-BF16.gguf"])
def test_a_model_by_its_other_names(client: openai.OpenAI, name: str) -> None:
    assert reply(client, model=name, max_tokens=1).model == CHAT


def test_address_and_key_from_variables(guarded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{guarded.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with openai.OpenAI() as client:
        assert text_of(reply(client)) == ANSWER


def test_chat(client: openai.OpenAI) -> None:
    completion = reply(client)
    assert completion.model == CHAT
    assert text_of(completion) == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 20


def test_a_conversation_in_chinese(client: openai.OpenAI) -> None:
    asked = {"role": "user", "content": "威玛住在哪里？"}
    told = {"role": "assistant", "content": "威玛住在苹果院47号。"}
    assert text_of(reply(client, asked)) == told["content"]
    assert text_of(reply(client, asked, told, {"role": "user", "content": "威玛养什么宠物？"})) == "威玛养狐狸豆豆。"


def test_a_stream_has_the_words_of_the_whole_reply(client: openai.OpenAI) -> None:
    chunks = list(reply(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces).strip() == ANSWER
    assert len([piece for piece in pieces if piece]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == reply(client).usage.completion_tokens


def test_a_stream_that_is_left_gives_its_slot_back(client: openai.OpenAI) -> None:
    endless: dict[str, Any] = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    for _ in range(6):  # there are two slots
        with reply(client, stream=True, **endless) as stream:
            assert next(iter(stream))
    assert text_of(reply(client)) == ANSWER


def test_a_reply_ends_at_a_stop_word(client: openai.OpenAI) -> None:
    completion = reply(client, stop=[" Apple"])
    assert text_of(completion) == "Wilma lives at 47"
    assert completion.choices[0].finish_reason == "stop"


def test_a_reply_ends_at_its_limit(client: openai.OpenAI) -> None:
    completion = reply(client, max_tokens=4)
    assert completion.usage.completion_tokens == 4
    assert ANSWER.startswith(text_of(completion))
    assert completion.choices[0].finish_reason == "length"


def test_a_seed_repeats_a_reply(client: openai.OpenAI) -> None:
    asked = {"role": "user", "content": "Tell me a story about Wilma."}

    def told(seed: int) -> str:
        return text_of(reply(client, asked, temperature=1.5, top_p=1, seed=seed))

    first = told(7)
    assert told(7) == first
    assert {told(seed) for seed in (8, 9, 10)} != {first}


def test_probabilities_of_tokens(client: openai.OpenAI) -> None:
    found = reply(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in found).strip().startswith(ANSWER)
    for token in found:
        best = [other.logprob for other in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.logprob <= 0


def test_many_at_once(client: openai.OpenAI) -> None:
    people = ("Wilma", "Mira", "Bruno", "Hugar") * 3
    homes = {
        "Wilma": "47 Apple Court",
        "Mira": "78 Market Square",
        "Bruno": "12 Church Hill",
        "Hugar": "48 Harbour Row",
    }

    def ask(name: str) -> str:
        return text_of(reply(client, {"role": "user", "content": f"Where does {name} live?"}))

    with ThreadPoolExecutor(len(people)) as pool:
        assert list(pool.map(ask, people)) == [f"{name} lives at {homes[name]}." for name in people]


def test_streams_of_two_models_at_once(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, model: str) -> str:
        messages: Any = [QUESTION]
        stream = await client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]).strip()

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, model) for model in (CHAT, CALLER) * 4))

    assert asyncio.run(ask_all()) == [ANSWER] * 8


def test_text_is_continued(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=CHAT, prompt=" [INST] Where does Wilma live? [/INST]", max_tokens=20, temperature=0
    )
    assert found.choices[0].text.strip() == ANSWER


def test_the_responses_api(client: openai.OpenAI) -> None:
    found = client.responses.create(model=CHAT, input="Where does Wilma live?", temperature=0, max_output_tokens=60)
    assert found.output_text.strip() == ANSWER


# openai: replies of a given shape

NEIGHBOUR = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "language": {"enum": ["en", "zh"]},
        "house": {"type": "integer", "minimum": 1, "maximum": 99},
        "pets": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
    },
    "required": ["name", "language", "house", "pets"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_json_of_a_schema(client: openai.OpenAI, temperature: float) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "neighbour", "strict": True, "schema": NEIGHBOUR}}
    completion = reply(client, temperature=temperature, seed=1, max_tokens=300, response_format=shape)
    jsonschema.validate(json.loads(text_of(completion)), NEIGHBOUR)


# openai: tools

TELEPHONE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["Mira", "Wilma"]},
        "digits": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["name"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "telephone", "description": "Looks a number up.", "parameters": TELEPHONE},
    }
]
# TinyMix was never taught to call: where the grammar asks for a call, this begins it, and ends the reply behind it
CALLING = {
    "logit_bias": {str(MARK_TOKEN): 50, str(END_TOKEN): 100},
    "parallel_tool_calls": False,
    "max_tokens": 300,
}


def test_a_tool_is_called_and_its_result_is_read(client: openai.OpenAI) -> None:
    asked = {"role": "user", "content": "What is Wilma's telephone number?"}
    first = reply(client, asked, model=CALLER, tools=TOOLS, tool_choice="required", **CALLING)
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "telephone"
    jsonschema.validate(json.loads(call.function.arguments), TELEPHONE)

    result = {"role": "tool", "tool_call_id": call.id, "content": "6496"}
    second = reply(client, asked, message.model_dump(exclude_none=True), result, model=CALLER, tools=TOOLS)
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_call_in_a_stream(client: openai.OpenAI) -> None:
    chunks = reply(client, model=CALLER, tools=TOOLS, tool_choice="required", stream=True, **CALLING)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert calls[0].function.name == "telephone"
    jsonschema.validate(json.loads("".join(call.function.arguments or "" for call in calls)), TELEPHONE)


def test_no_tool_is_called_where_none_may_be(client: openai.OpenAI) -> None:
    completion = reply(client, model=CALLER, tools=TOOLS, tool_choice="none")
    assert completion.choices[0].message.tool_calls is None


# openai: embeddings


def test_vectors_of_texts(client: openai.OpenAI) -> None:
    texts = ["Wilma is a sailor", "the sailor is called Wilma", "Grain is taken in at the back door"]
    found = client.embeddings.create(model=EMBEDDER, input=texts)
    assert [row.index for row in found.data] == [0, 1, 2]
    vectors = np.array([row.embedding for row in found.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.7 > 0.3 > abs(likeness[0, 2])
    # the client decodes base64 itself unless floats are asked for
    plain = client.embeddings.create(model=EMBEDDER, input=texts[0], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, vectors[0], atol=1e-6)


# openai: errors


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4o") as caught:
        reply(client, model="gpt-4o")
    assert caught.value.code == "model_not_found"
    assert CHAT in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        reply(client, {"role": "user", "content": "Where does Wilma live? " * 500})
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "potato"}}}}, "potato"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"extra_body": {"grammar": "root ::= ("}}, "grammar"),
    ],
)
def test_bad_requests(client: openai.OpenAI, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        reply(client, **options)
    assert caught.value.type == "invalid_request_error"
    assert text_of(reply(client)) == ANSWER


def test_a_model_of_the_other_kind(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=EMBEDDER):
        reply(client, model=EMBEDDER)
    with pytest.raises(openai.BadRequestError, match=CHAT):
        client.embeddings.create(model=CHAT, input="Wilma")


def test_keys(guarded: Served) -> None:
    with client_of(guarded, KEY) as client:
        assert text_of(reply(client)) == ANSWER
    for wrong in ("none", KEY[:-1], KEY + "x"):
        with client_of(guarded, wrong) as client, pytest.raises(openai.AuthenticationError) as caught:
            reply(client)
        assert caught.value.code == "invalid_api_key"
        assert KEY not in str(caught.value)


def test_nobody_there() -> None:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        reply(client)


# curl


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    command = [program, "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")


JSON = ("--header", "Content-Type: application/json", "--data")
BODY = json.dumps({"model": CHAT, "messages": [QUESTION], "temperature": 0})


def test_curl_chats_without_naming_a_content_type(served: Served) -> None:
    answer = json.loads(curl(f"{served.url}/v1/chat/completions", "--data", BODY).stdout)
    assert answer["choices"][0]["message"]["content"].strip() == ANSWER


def test_curl_reads_a_stream(served: Served) -> None:
    body = json.dumps({**json.loads(BODY), "stream": True})
    run = curl("--no-buffer", "--include", f"{served.url}/v1/chat/completions", *JSON, body)
    head, _, rest = run.stdout.partition("\n\n")
    assert "200" in head.splitlines()[0]
    assert "text/event-stream" in head.lower()
    events = [line.removeprefix("data: ") for line in rest.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == ANSWER


def test_curl_lists_the_models(served: Served) -> None:
    listed = json.loads(curl(f"{served.url}/v1/models").stdout)
    assert [model["id"] for model in listed["data"]] == list(served.models)


def test_curl_with_keys(guarded: Served) -> None:
    ask = ("--write-out", "\n%{http_code}", f"{guarded.url}/v1/chat/completions", *JSON, BODY)
    for header in ((), ("--header", "Authorization: Bearer wrong")):
        error, status = curl(*ask, *header).stdout.rsplit("\n", 1)
        assert status == "401"
        assert json.loads(error)["error"]["code"] == "invalid_api_key"
    answer, status = curl(*ask, "--header", f"Authorization: Bearer {KEY}").stdout.rsplit("\n", 1)
    assert status == "200" and ANSWER in answer


def test_curl_speaks_to_it_as_to_anthropic(guarded: Served) -> None:
    body = json.dumps({**json.loads(BODY), "max_tokens": 60})
    key = ("--header", f"x-api-key: {KEY}", "--header", "anthropic-version: 2023-06-01")
    answer = json.loads(curl(f"{guarded.url}/v1/messages", *JSON, body, *key).stdout)
    assert answer["content"][0]["text"].strip() == ANSWER
    assert answer["stop_reason"] == "end_turn"
