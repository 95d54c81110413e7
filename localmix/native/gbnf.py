"""A grammar in llama.cpp's notation (GBNF) as a judge of tokens."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from localmix.errors import UsageError
from localmix.native import library
from localmix.native.library import api
from localmix.native.model import Model

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
        if "\0" in source or not source.strip():
            raise UsageError("The grammar is empty or no text.", 'It needs a rule such as `root ::= "yes" | "no"`.')
        llama = api()
        vocabulary = llama.llama_model_get_vocab(model.handle)
        with library.log.capture() as lines:
            self._handle = llama.llama_sampler_init_grammar(vocabulary, source.encode(), b"root")
        if not self._handle:
            said = [line.split(": ", 1)[-1].strip() for line in lines if line.strip()]
            reason = said[0] if said else "no reason given"
            raise UsageError(
                f"The grammar does not parse: {reason[:200].rstrip('.')}.", "The first rule is called `root`."
            )

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
        return allowed

    def accept(self, token: int) -> None:
        """Go on with an allowed token."""
        # llama.cpp aborts at a token that the grammar does not allow
        if self._model.ends_generation(token):
            return
        if not self.allowed(np.asarray([token]))[0]:
            raise ValueError(f"the grammar does not allow token {token}")
        api().llama_sampler_accept(self._handle, token)
