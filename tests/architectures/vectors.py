"""What an embedding model makes of tokens in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localmix.native.library import api
from localmix.native.model import Model

# llama.h: LLAMA_POOLING_TYPE_UNSPECIFIED takes what the file says.
AS_NOTED, NO_POOLING = -1, 0


def vectors_of(model: Model, tokens: Sequence[int], pooling: int) -> NDArray[np.float32]:
    """The vector of each token, `[tokens, columns]`, or the one that they are pooled to, `[1, columns]`."""
    llama = api()
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 512, 1, 1
    parameters.embeddings, parameters.pooling_type = True, pooling
    context = llama.llama_init_from_model(model.handle, parameters)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, True
        assert llama.llama_encode(context, batch) == 0
        size = llama.llama_model_n_embd(model.handle)
        if llama.llama_pooling_type(context) == NO_POOLING:
            rows = [llama.llama_get_embeddings_ith(context, place)[0:size] for place in range(len(tokens))]
        else:
            rows = [llama.llama_get_embeddings_seq(context, 0)[0:size]]
        return np.array(rows, np.float32)
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
