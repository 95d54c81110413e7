"""Answers questions from a folder of text files; both models run on this machine.

    localmix serve CHAT-MODEL EMBEDDING-MODEL      # in another terminal
    python docqa.py texts "When does the last ferry leave?"
    python docqa.py texts                          # asks for questions

Needs: pip install langchain-openai langchain-text-splitters
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_text_splitters import RecursiveCharacterTextSplitter

PARAGRAPH = re.compile(r"\S.*?(?=\n\s*\n|\s*\Z)", re.DOTALL)
# Where a long paragraph may be cut, best first; Chinese has no space behind its full stop.
ENDS = ("。", "！", "？", ". ", "! ", "? ", "\n", "；", "; ", "，", ", ", " ", "")

INSTRUCTION = (
    "Answer the question from the passages above and from nothing else, briefly, in the language of the question. "
    "If they do not hold the answer, say so."
)


def read_passages(folder: Path, length: int) -> list[Document]:
    """The `.txt` and `.md` files of a folder and its subfolders, by paragraphs of at most `length` characters.

    Each passage knows its `source`, as FILE:LINE.

    Raises:
        ValueError: no text, or one that is not UTF-8.
    """
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=length, chunk_overlap=0, separators=list(ENDS), keep_separator="end"
    )
    passages = []
    for path in sorted(path for pattern in ("*.txt", "*.md") for path in folder.rglob(pattern)):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        name = path.relative_to(folder).as_posix()
        for paragraph in PARAGRAPH.finditer(text):
            source = f"{name}:{text.count(chr(10), 0, paragraph.start()) + 1}"
            passages += splitter.create_documents([paragraph[0]], [{"source": source}])
    if not passages:
        raise ValueError(f"{folder} holds no text (.txt or .md)")
    return passages


def prompt(passages: Sequence[Document], question: str) -> list[BaseMessage]:
    """What the chat model reads: the passages with their sources, the instruction, the question."""
    quoted = "\n\n".join(f"[{passage.metadata['source']}]\n{passage.page_content}" for passage in passages)
    return [SystemMessage(f"{quoted}\n\n{INSTRUCTION}"), HumanMessage(question)]


class Reader:
    """Finds the passages that a question is about, and lets the chat model answer from them."""

    def __init__(self, chat: BaseChatModel, embeddings: OpenAIEmbeddings, passages: Sequence[Document]) -> None:
        self._chat = chat
        self._store = InMemoryVectorStore(embeddings)
        self._store.add_documents(list(passages))

    def find(self, question: str, count: int = 3) -> list[Document]:
        """The passages nearest to the question, nearest first."""
        return self._store.similarity_search(question, count)

    def answer(self, question: str, passages: Sequence[Document]) -> Iterator[str]:
        """The answer, piece by piece."""
        for piece in self._chat.stream(prompt(passages, question)):
            yield piece.text


def main() -> None:
    """Read the command line, and answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="its .txt and .md files are read")
    parser.add_argument("question", nargs="?", help="without one, questions are read line by line")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="where localmix serves (%(default)s)")
    parser.add_argument("--key", default="none", help="its API key, if it has one")
    parser.add_argument("--chat", metavar="MODEL", help="the model that answers (the first that is served)")
    parser.add_argument("--embedder", metavar="MODEL", help="the model that finds passages (the last)")
    parser.add_argument("--passages", type=int, default=3, metavar="N", help="how many to read (%(default)s)")
    parser.add_argument("--length", type=int, default=300, metavar="N", help="characters of each (%(default)s)")
    options = parser.parse_intermixed_args()
    try:
        with openai.DefaultHttpxClient(timeout=600) as connection:
            answer_questions(options, connection)
    except openai.APIConnectionError:
        sys.exit(f"Error: nobody answers at {options.url}; start `localmix serve CHAT-MODEL EMBEDDING-MODEL`")
    except (ValueError, OSError, openai.OpenAIError) as problem:
        sys.exit(f"Error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)


def answer_questions(options: argparse.Namespace, connection: openai.DefaultHttpxClient) -> None:
    """Read the folder, then answer one question after the other."""
    passages = read_passages(options.folder, options.length)
    access = {"base_url": options.url, "api_key": options.key, "http_client": connection, "max_retries": 0}
    served = [model.id for model in openai.OpenAI(**access).models.list()]
    chat = ChatOpenAI(model=options.chat or served[0], temperature=0, max_completion_tokens=512, **access)
    # The check would fetch OpenAI's tokenizer and send its numbers instead of the text.
    embeddings = OpenAIEmbeddings(model=options.embedder or served[-1], check_embedding_ctx_length=False, **access)
    reader = Reader(chat, embeddings, passages)
    for question in [options.question] if options.question else filter(None, map(str.strip, sys.stdin)):
        found = reader.find(question, options.passages)
        for piece in reader.answer(question, found):
            print(piece, end="", flush=True)
        print("\n\n" + "\n".join(f"  {passage.metadata['source']}" for passage in found))


if __name__ == "__main__":
    main()
