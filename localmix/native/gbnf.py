"""A grammar in llama.cpp's notation (GBNF) as a judge of tokens."""

from __future__ import annotations

import codecs
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from localmix.errors import UsageError
from localmix.native import library
from localmix.native.library import api
from localmix.native.model import Model

_REASON_LENGTH = 200
# llama.h's llama_token_data
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Grammar:
    """What a text may go on with.

    Args:
        source: GBNF with a rule `root`.

    Raises:
        UsageError: the grammar does not parse; the sentence holds llama.cpp's reason.
    """

    def __init__(self, model: Model, source: str) -> None:
        self._handle: int | None = None
        self._model = model
        self._pending = b""  # of a character whose last bytes are still to come
        self._pieces: dict[int, bytes] = {}
        if "\0" in source or not source.strip():
            raise UsageError("The grammar is empty or no text.", 'It needs a rule such as `root ::= "yes" | "no"`.')
        llama = api()
        vocabulary = llama.llama_model_get_vocab(model.handle)
        with library.log.capture() as lines, _error_output() as said:
            self._handle = llama.llama_sampler_init_grammar(vocabulary, source.encode(), b"root")
        if not self._handle:
            # the parser writes past the log; the first line holds what it met, often with the source from there on
            words = [line.strip() for line in [*said, *lines] if line.strip()] or ["no reason given"]
            reason = re.sub(r"^(\w+: )*(error parsing grammar: )?", "", words[0])[:_REASON_LENGTH].rstrip(". ")
            reason = re.sub(r" at$", " at its end", reason)
            raise UsageError(f"The grammar does not parse: {reason}.", "The rule that it starts with is called `root`.")

    def __enter__(self) -> Grammar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the grammar."""
        if self._handle:
            api().llama_sampler_free(self._handle)
            self._handle = None

    def allowed(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each token, whether the text may go on with it; a token that ends generation, where the text may end."""
        candidates = np.zeros(len(tokens), _CANDIDATE)
        candidates["id"] = tokens
        llama = api()
        array = llama.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        llama.llama_sampler_apply(self._handle, ctypes.byref(array))
        allowed: NDArray[np.bool_] = np.isfinite(candidates["logit"])
        for place in np.flatnonzero(allowed):
            allowed[place] = self._is_text(int(tokens[place]))
        return allowed

    def accept(self, token: int) -> None:
        """Go on with an allowed token."""
        # llama.cpp aborts at a token that the grammar does not allow
        if self._model.ends_generation(token):
            return
        if not self.allowed(np.asarray([token]))[0]:
            raise ValueError(f"the grammar does not allow token {token}")
        api().llama_sampler_accept(self._handle, token)
        self._pending = _unfinished(self._pending + self._piece(token)) or b""

    def _is_text(self, token: int) -> bool:
        """Whether the bytes so far stay UTF-8: llama.cpp takes any bytes for the parts of a character."""
        piece = self._piece(token)
        return (not self._pending and piece.isascii()) or _unfinished(self._pending + piece) is not None

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._model.piece(token)
        return self._pieces[token]


def _unfinished(data: bytes) -> bytes | None:
    """The bytes of a character that has only begun at the end of some text; None if they are no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    rest = decoder.getstate()[0]
    # half of a UTF-16 pair: Python waits for its third byte before it says no
    return None if rest[:1] == b"\xed" and rest[1:] >= b"\xa0" else rest


@contextmanager
def _error_output() -> Iterator[list[str]]:
    """The lines that native code writes to the standard error inside the block."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()
