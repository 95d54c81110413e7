"""Load a model, run tokens through it, sample from it: a typed layer over llama.cpp's C functions.

What is loaded here can abort the process: call it in a `localmix.worker` child. Use every class as a context
manager, the model outermost.

    with Model(path) as model, Context(model, context_length=4096) as context, Sampler(model, settings) as sampler:
        text = CachedText(context)
        text.feed(model.tokenize("Hello"))
        for token in text.generate(sampler, 100):
            print(model.piece(token))
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localmix.errors import CapacityError, FileError, InputError, Interrupted
from localmix.native import library
from localmix.native.devices import ANYWHERE, Placement, connect, cpu_buffer_type, default_threads, device_handle
from localmix.native.library import api
from localmix.native.tensors import EvalCallback
from localmix.rope_scaling import RopeScaling
from localmix.sampling import Sampling
from localmix.tensor_types import TensorType

# llama.h
LOAD_WITHOUT_MMAP, LOAD_WITH_MMAP = 0, 1
FEW_TOKENS = 16
# Words of llama.cpp and its back ends for memory that they did not get.
NO_MEMORY = ("failed to allocate", "unable to allocate", "out of memory", "bad_alloc", "cannot allocate")

SMALLER = "Close other programs, or choose a smaller type or context."


@dataclass(frozen=True)
class Vocabulary:
    """What a model says about its tokens; -1 stands for a token that it does not have.

    Attributes:
        size: number of tokens.
        add_bos, add_eos: whether `tokenize(add_special=True)` puts them around a text.
    """

    size: int
    bos: int
    eos: int
    eot: int
    add_bos: bool
    add_eos: bool


class Model:
    """Weights and vocabulary of a GGUF file (its first part, if split).

    Args:
        path: the file.
        placement: what lies on a GPU.
        mmap: map the file instead of reading it.
        repack: reorder the weights of some types for this processor, in memory of their own
            (`use_extra_bufts`); faster, but anonymous memory.
        vocabulary_only: load no weights.
        simulate: load nothing and pretend to (`no_alloc`): contexts then log what they would take.
        progress: called with the loaded fraction, 0 to 1.
        cancelled: asked while loading; True stops it (`Channel.cancelled`).

    Raises:
        FileError: there is no such file, or it cannot be read.
        InputError: llama.cpp refuses the file; the sentence holds its reason.
        CapacityError: the weights do not fit into memory.
        Interrupted: stopped by `cancelled`.
    """

    def __init__(
        self,
        path: Path,
        *,
        placement: Placement = ANYWHERE,
        mmap: bool = True,
        repack: bool = True,
        vocabulary_only: bool = False,
        simulate: bool = False,
        progress: Callable[[float], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self._handle: int | None = None
        if not path.is_file():
            raise FileError(f"{path} does not exist or is not a file.")
        if not os.access(path, os.R_OK):
            raise FileError(f"{path} cannot be read: permission denied.")
        llama = api()
        connect(placement.servers)
        parameters = llama.llama_model_default_params()
        parameters.load_mode = LOAD_WITH_MMAP if mmap and not simulate else LOAD_WITHOUT_MMAP
        parameters.use_extra_bufts = repack
        parameters.vocab_only = vocabulary_only
        parameters.no_alloc = simulate
        if placement.gpu_layers is not None:
            parameters.n_gpu_layers = placement.gpu_layers
        if placement.gpu_layers == 0 or placement.devices:
            # an empty list for no GPU: else the KV cache and large products still go there
            chosen = [] if placement.gpu_layers == 0 else [device_handle(name) for name in placement.devices]
            self._devices = (ctypes.c_void_p * (len(chosen) + 1))(*chosen, None)
            parameters.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        if placement.layer_counts:
            self._shares = (ctypes.c_float * llama.llama_max_devices())(*placement.layer_counts)
            parameters.tensor_split = self._shares
        if placement.cpu_expert_layers:
            self._overrides = _experts_on_cpu(placement.cpu_expert_layers)
            parameters.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)

        failures: list[BaseException] = []

        def report(fraction: float, _: int | None) -> bool:
            try:
                if progress is not None:
                    progress(fraction)
            except BaseException as error:  # it cannot cross native code
                failures.append(error)
            return not failures and not (cancelled and cancelled())

        callback = llama.llama_progress_callback(report)
        parameters.progress_callback = callback
        with library.log.capture() as lines:
            self._handle = llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if failures:
            raise failures[0]
        if not self._handle:
            if cancelled and cancelled():
                raise Interrupted("The run was stopped.")
            reason = _reason(lines)
            if any(words in reason for words in NO_MEMORY):
                raise CapacityError(f"{path.name} does not fit into memory: {reason}.", SMALLER)
            raise InputError(f"llama.cpp cannot load {path.name}: {reason}.", _next_step(reason, path))
        self.path = path
        self._vocab = llama.llama_model_get_vocab(self._handle)
        self.vocabulary = Vocabulary(
            size=llama.llama_vocab_n_tokens(self._vocab),
            bos=llama.llama_vocab_bos(self._vocab),
            eos=llama.llama_vocab_eos(self._vocab),
            eot=llama.llama_vocab_eot(self._vocab),
            add_bos=llama.llama_vocab_get_add_bos(self._vocab),
            add_eos=llama.llama_vocab_get_add_eos(self._vocab),
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights; contexts of this model must be closed before."""
        if self._handle:
            api().llama_model_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> int:
        """The `llama_model *`."""
        if not self._handle:
            raise RuntimeError("the model is closed")
        return self._handle

    @property
    def trained_context(self) -> int:
        """Tokens of context that the model was trained with."""
        return int(api().llama_model_n_ctx_train(self.handle))

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(api().llama_model_n_layer(self.handle))

    @property
    def head_size(self) -> int:
        """Numbers in one attention head."""
        return int(api().llama_model_n_embd(self.handle)) // int(api().llama_model_n_head(self.handle))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(api().llama_model_size(self.handle))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(api().llama_model_n_params(self.handle))

    @property
    def description(self) -> str:
        """llama.cpp's few words, such as `llama 8x7B Q4_K - Medium`."""
        return _text(lambda buffer, size: api().llama_model_desc(self.handle, buffer, size)) or ""

    def metadata(self, key: str) -> str | None:
        """The value of a GGUF key as text (arrays are not available), or None."""
        name = key.encode()
        return _text(lambda buffer, size: api().llama_model_meta_val_str(self.handle, name, buffer, size))

    def metadata_keys(self) -> list[str]:
        """Every GGUF key."""
        return [self._metadata_key(index) for index in range(api().llama_model_meta_count(self.handle))]

    def _metadata_key(self, index: int) -> str:
        return _text(lambda buffer, size: api().llama_model_meta_key_by_index(self.handle, index, buffer, size)) or ""

    def chat_template(self, name: str | None = None) -> str | None:
        """The model's own chat template (Jinja source), or None."""
        template = api().llama_model_chat_template(self.handle, name.encode() if name else None)
        return template.decode("utf-8", "replace") if template else None

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Split a text into tokens.

        Args:
            add_special: put BOS and EOS around it where the vocabulary says so.
            parse_special: read `</s>` in the text as the token of that name, not as four characters.
        """
        data = text.encode() if isinstance(text, str) else text
        tokens = np.empty(len(data) + 2, np.int32)
        for _ in range(2):  # a text may have more tokens than bytes; then the count comes back negative
            count = api().llama_tokenize(
                self._vocab, data, len(data), _tokens(tokens), len(tokens), add_special, parse_special
            )
            if count >= 0:
                return np.array(tokens[:count])
            tokens = np.empty(-count, np.int32)
        raise InputError(f"{self.path.name}: a text of {len(data)} bytes cannot be tokenized.")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; a character may be spread over several tokens.

        Args:
            special: write control tokens by their name instead of as nothing.
        """
        buffer = ctypes.create_string_buffer(64)
        for _ in range(2):
            count = api().llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
            if count >= 0:
                return buffer.raw[:count]
            buffer = ctypes.create_string_buffer(-count)
        raise AssertionError("llama_token_to_piece asked for a second buffer")

    def token_texts(self) -> list[bytes]:
        """The name of every token, as the vocabulary spells it (a space is `▁` or `Ġ`)."""
        return [api().llama_vocab_get_text(self._vocab, token) or b"" for token in range(self.vocabulary.size)]

    @property
    def recurrent(self) -> bool:
        """Whether a part of its memory is one state that cannot forget single tokens."""
        llama = api()
        return bool(llama.llama_model_is_recurrent(self.handle) or llama.llama_model_is_hybrid(self.handle))

    def ends_generation(self, token: int) -> bool:
        """Whether a token ends a reply: EOS, end of turn and their like."""
        return bool(api().llama_vocab_is_eog(self._vocab, token))


class Context:
    """A KV cache and compute buffers for a model.

    Args:
        model: stays open longer than this.
        context_length: tokens in the cache, over all sequences.
        batch: most tokens of one `decode`.
        micro_batch: most tokens that are computed at once.
        sequences: most sequences.
        threads: None for `default_threads()`.
        type_k, type_v: types of the KV cache; a quantized `type_v` needs flash attention, which is on where it can be.
        rope: how positions are stretched beyond the trained context; None for the model's own way.
        unified: one cache that all sequences share, instead of an equal part for each.
        outputs: most tokens of a decode that ask for logits; None for `batch`.
        callback: sees the graph's nodes.
        cancelled: asked before each node that the CPU computes; True stops the decode (`Channel.cancelled`). A decode
            of `FEW_TOKENS` or fewer is not asked about: it is soon over, and asking costs it time.

    Raises:
        CapacityError: the cache or the buffers do not fit into memory.
        InputError: llama.cpp refuses these settings; the sentence holds its reason.
    """

    def __init__(
        self,
        model: Model,
        *,
        context_length: int,
        batch: int = 2048,
        micro_batch: int = 512,
        sequences: int = 1,
        threads: int | None = None,
        type_k: TensorType = TensorType.F16,
        type_v: TensorType = TensorType.F16,
        rope: RopeScaling | None = None,
        unified: bool = False,
        outputs: int | None = None,
        callback: EvalCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self._handle: int | None = None
        llama = api()
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context_length
        parameters.n_batch = batch
        parameters.n_ubatch = micro_batch
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads or default_threads()
        parameters.type_k, parameters.type_v = int(type_k), int(type_v)
        if rope is not None:
            _set_rope(parameters, rope, model)
        parameters.kv_unified = unified
        parameters.n_outputs_max = outputs or 0
        self._callback = callback  # llama.cpp keeps the pointer; so must we
        if callback is not None:
            parameters.cb_eval = callback.pointer
        self._never = llama.ggml_abort_callback()
        self._abort = self._never if cancelled is None else llama.ggml_abort_callback(lambda _: cancelled())
        self._watched = False
        with library.log.capture() as lines:
            self._handle = llama.llama_init_from_model(model.handle, parameters)
        if not self._handle:
            reason = _reason(lines)
            message = f"{model.path.name} with a context of {context_length} tokens: {reason}."
            if any(words in reason for words in NO_MEMORY):
                raise CapacityError(message, SMALLER)
            raise InputError(message)
        self.model = model
        self.length = int(llama.llama_n_ctx(self._handle))
        self.batch = int(llama.llama_n_batch(self._handle))
        self.micro_batch = int(llama.llama_n_ubatch(self._handle))
        self._memory = llama.llama_get_memory(self._handle)
        self._outputs = 0
        self._input = _Batch(self.batch)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache and the buffers."""
        if self._handle:
            api().llama_free(self._handle)
            self._handle = None

    @property
    def handle(self) -> int:
        """The `llama_context *`."""
        if not self._handle:
            raise RuntimeError("the context is closed")
        return self._handle

    def decode(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        sequences: ArrayLike = 0,
        logits: ArrayLike = False,
    ) -> None:
        """Run tokens through the model and add them to the cache.

        Args:
            tokens: at most `batch` of them; the other arguments have one value for each, or one for all.
            positions: place of each in its sequence.
            sequences: sequence of each.
            logits: whether the token's prediction is wanted.

        Raises:
            CapacityError: the cache is full, or memory ran out.
            Interrupted: stopped by `cancelled`; the tokens before the interrupted micro-batch stay in the cache.
            InputError: llama.cpp failed; the sentence holds its reason.
            Whatever the callback raised.
        """
        count, self._outputs = self._input.fill(tokens, positions, sequences, logits)
        watch = count > FEW_TOKENS
        if watch != self._watched:
            api().llama_set_abort_callback(self.handle, self._abort if watch else self._never, None)
            self._watched = watch
        with library.log.capture() as lines:
            status = api().llama_decode(self.handle, self._input.struct)
        if self._callback is not None:
            self._callback.raise_kept()
        if status == 0:
            return
        self._outputs = 0
        name = self.model.path.name
        if status == 2:
            raise Interrupted("The run was stopped.")
        if status == 1:
            raise CapacityError(f"{name}: {count} more tokens do not fit into a context of {self.length}.")
        if status == -2:
            raise CapacityError(f"{name}: memory ran out in a batch of {count} tokens.", SMALLER)
        raise InputError(f"{name}: llama.cpp failed ({status}): {_reason(lines)}.")

    def logits(self) -> NDArray[np.float32]:
        """Predictions of the last `decode`: one row of vocabulary-size values for each token that asked.

        A view into llama.cpp's memory: the next decode overwrites it.
        """
        if not self._outputs:
            raise RuntimeError("no token of the last batch asked for logits")
        pointer = api().llama_get_logits(self.handle)
        return np.ctypeslib.as_array(pointer, (self._outputs, self.model.vocabulary.size))

    def synchronize(self) -> None:
        """Wait for the device to finish: only then is a time measured right."""
        api().llama_synchronize(self.handle)

    def clear(self) -> None:
        """Empty the cache."""
        api().llama_memory_clear(self._memory, True)

    def save(self, sequence: int, tokens: ArrayLike, path: Path) -> None:
        """Write a sequence's part of the cache, and the tokens it stands for, to a file.

        Raises:
            FileError, CapacityError: it cannot be written; the disk may be full.
        """
        values = np.atleast_1d(np.asarray(tokens, np.int32))
        with library.log.capture() as lines:
            written = api().llama_state_seq_save_file(
                self.handle, os.fsencode(path), sequence, _tokens(values), len(values)
            )
        if not written or path.stat().st_size != written:
            reason = _reason(lines)
            if "no space" in reason.lower():
                raise CapacityError(f"There is no space left for the KV cache in {path.parent}.", "Free some space.")
            raise FileError(f"The KV cache cannot be written to {path.parent}: {reason}.")

    def restore(self, sequence: int, path: Path) -> NDArray[np.int32] | None:
        """Fill an empty sequence from a file of `save`; its tokens, or None if it does not fit this context.

        llama.cpp trusts what it reads: the file must be known to be sound (see `kv_state`).
        """
        tokens, count = np.empty(self.length, np.int32), ctypes.c_size_t()
        read = api().llama_state_seq_load_file(
            self.handle, os.fsencode(path), sequence, _tokens(tokens), len(tokens), ctypes.byref(count)
        )
        if not read:
            self.remove(sequence, 0)
            return None
        return np.array(tokens[: count.value])

    def remove(self, sequence: int, start: int) -> bool:
        """Forget a sequence from position `start` on; False if this kind of cache cannot (recurrent ones)."""
        return bool(api().llama_memory_seq_rm(self._memory, sequence, start, -1))


class _Batch:
    """A `llama_batch` over numpy arrays of our own, so that it is filled without a loop."""

    def __init__(self, size: int) -> None:
        llama = api()
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequence_counts = np.ones(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._logits = np.zeros(size, np.int8)
        # seq_id is an array of pointers, each to the list of sequences of its token: here a list of one
        self._pointers = (self._sequences.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        integers = ctypes.POINTER(ctypes.c_int32)
        self.struct: Any = llama.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(integers),
            pos=self._positions.ctypes.data_as(integers),
            n_seq_id=self._sequence_counts.ctypes.data_as(integers),
            seq_id=self._pointers.ctypes.data_as(ctypes.POINTER(integers)),
            logits=self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, tokens: ArrayLike, positions: ArrayLike, sequences: ArrayLike, logits: ArrayLike) -> tuple[int, int]:
        """Take over the arguments of `Context.decode`; the number of tokens and of those that ask."""
        values = np.atleast_1d(np.asarray(tokens, np.int32))
        count = len(values)
        if not 0 < count <= len(self._tokens):
            raise ValueError(f"a batch of {count} tokens; 1 to {len(self._tokens)} are possible")
        self._tokens[:count] = values
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._logits[:count] = logits
        self.struct.n_tokens = count
        return count, int(np.count_nonzero(self._logits[:count]))


class Sampler:
    """llama.cpp's own samplers in the order of its tools: penalties, top-k, top-p, min-p, temperature."""

    def __init__(self, model: Model, settings: Sampling) -> None:
        llama = api()
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        parts = []
        if settings.repeat_penalty != 1 and settings.repeat_last > 0:
            size = model.vocabulary.size
            parts.append(llama.llama_sampler_init_penalties(size, settings.repeat_last, settings.repeat_penalty, 0, 0))
        if settings.temperature <= 0:
            parts.append(llama.llama_sampler_init_greedy())
        else:
            if settings.top_k > 0:
                parts.append(llama.llama_sampler_init_top_k(settings.top_k))
            if settings.top_p < 1:
                parts.append(llama.llama_sampler_init_top_p(settings.top_p, 1))
            if settings.min_p > 0:
                parts.append(llama.llama_sampler_init_min_p(settings.min_p, 1))
            parts.append(llama.llama_sampler_init_temp(settings.temperature))
            seed = llama.LLAMA_DEFAULT_SEED if settings.seed is None else settings.seed & 0xFFFFFFFF
            parts.append(llama.llama_sampler_init_dist(seed))
        for part in parts:
            llama.llama_sampler_chain_add(self._chain, part)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the chain with its parts."""
        if self._chain:
            api().llama_sampler_free(self._chain)
            self._chain = None

    def sample(self, context: Context) -> int:
        """Choose from the last row of logits, and remember the choice for the penalties."""
        return int(api().llama_sampler_sample(self._chain, context.handle, -1))

    def accept(self, token: int) -> None:
        """Count a token that was not sampled here (of the prompt, say) as recent."""
        api().llama_sampler_accept(self._chain, token)


class TokenSource(Protocol):
    """Chooses the next token: a Sampler, or what takes its place."""

    def sample(self, context: Context) -> int:
        """Choose from the last row of logits, and remember the choice."""


class CachedText:
    """A growing text in one sequence of a context: what the cache holds already is not computed again.

    Attributes:
        tokens: the tokens whose keys and values are in the cache.
        context: where they lie.
    """

    def __init__(self, context: Context, sequence: int = 0) -> None:
        self.tokens: list[int] = []
        self.context = context
        self._sequence = sequence

    def feed(self, tokens: ArrayLike, progress: Callable[[int, int, int], None] | None = None) -> int:
        """Make the cache hold exactly these tokens, with the last one's logits ready to be sampled.

        Args:
            tokens: the whole text, of at least one token.
            progress: called with (tokens done, tokens to do, tokens that were there) before and after each micro-batch.

        Returns:
            How many tokens were in the cache already.

        Raises:
            CapacityError: more tokens than the context has room for.
            As `Context.decode`; what was decoded before stays in the cache and in `tokens`.
        """
        wanted = np.atleast_1d(np.asarray(tokens, np.int32))
        total, context = len(wanted), self.context
        if total > context.length:
            raise CapacityError(
                f"The text has {total} tokens, but the context holds {context.length}.",
                "Shorten it, or ask for a larger context with --ctx.",
            )
        # the last token is computed in any case: its logits are gone
        held = np.asarray(self.tokens[: total - 1], np.int32)
        different = np.nonzero(held != wanted[: len(held)])[0]
        kept = int(different[0]) if len(different) else len(held)
        if kept < len(self.tokens) and not context.remove(self._sequence, kept):
            context.remove(self._sequence, 0)  # a recurrent state goes as a whole or not at all
            kept = 0
        del self.tokens[kept:]
        for start in range(kept, total, context.micro_batch):
            if progress is not None:
                progress(start - kept, total - kept, kept)
            part = wanted[start : start + context.micro_batch]
            places = np.arange(start, start + len(part))
            self._decode(part, places, places == total - 1)
        if progress is not None:
            progress(total - kept, total - kept, kept)
        return kept

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text, each with its logits: at most `Context.batch` of them."""
        places = np.arange(len(self.tokens), len(self.tokens) + len(tokens))
        self._decode(np.asarray(tokens, np.int32), places, True)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; not for recurrent models."""
        if length < len(self.tokens):
            self.context.remove(self._sequence, length)
            del self.tokens[length:]

    def save(self, path: Path) -> None:
        """Write the cache to a file; see `Context.save`."""
        self.context.save(self._sequence, self.tokens, path)

    def restore(self, path: Path) -> bool:
        """Take the cache from a file, in place of what it holds; see `Context.restore`."""
        self.context.remove(self._sequence, 0)
        tokens = self.context.restore(self._sequence, path)
        self.tokens = [] if tokens is None else tokens.tolist()
        return tokens is not None

    def generate(self, sampler: TokenSource, limit: int) -> Iterator[int]:
        """Sample tokens one by one, each before it is added to the cache.

        Ends after a token that ends generation (which is yielded too), after `limit` tokens, or when the
        context is full. The text must have been fed.
        """
        context = self.context
        for number in range(limit):
            token = sampler.sample(context)
            yield token
            last = number == limit - 1 or len(self.tokens) >= context.length
            if last or context.model.ends_generation(token):
                return
            self._decode(np.asarray([token], np.int32), np.asarray([len(self.tokens)]), True)

    def _decode(self, tokens: NDArray[np.int32], places: NDArray[np.intp], logits: ArrayLike) -> None:
        try:
            self.context.decode(tokens, places, self._sequence, logits)
        except BaseException:
            # some micro-batches may be in the cache: forget them, so that it holds what `tokens` says
            if not self.context.remove(self._sequence, int(places[0])):
                self.context.remove(self._sequence, 0)
                self.tokens.clear()
            raise
        self.tokens.extend(tokens.tolist())


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override`, which the bindings leave out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def _experts_on_cpu(layers: int) -> Any:
    """A `llama_model_tensor_buft_override` list that keeps the experts of the first layers in the CPU's memory."""
    buffer = cpu_buffer_type()
    # one pattern for each layer, as llama.cpp's --n-cpu-moe makes them
    patterns = [rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode() for layer in range(layers)]
    rows = (_Override * (layers + 1))()
    for row, pattern in zip(rows, patterns, strict=False):  # the last row stays empty: the end
        row.pattern, row.buft = pattern, buffer
    return rows


def _set_rope(parameters: Any, rope: RopeScaling, model: Model) -> None:
    """Write a scaling into `llama_context_params`; what it leaves open stays the model's own."""
    llama = api()
    if rope.kind is not None:
        parameters.rope_scaling_type = getattr(llama, f"LLAMA_ROPE_SCALING_TYPE_{rope.kind.upper()}")
    if rope.kind == "none":
        parameters.rope_freq_scale = 1.0
    elif rope.factor is not None:
        parameters.rope_freq_scale = 1 / rope.factor
    base = rope.freq_base
    if rope.ntk_factor is not None:
        architecture = model.metadata("general.architecture")
        if base is None:
            base = float(model.metadata(f"{architecture}.rope.freq_base") or 10000)
        dimensions = int(model.metadata(f"{architecture}.rope.dimension_count") or 0) or model.head_size
        base *= rope.ntk_factor ** (dimensions / (dimensions - 2))
    if base is not None:
        parameters.rope_freq_base = base
    if rope.original_context is not None:
        parameters.yarn_orig_ctx = rope.original_context


def _tokens(array: NDArray[np.int32]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


def _text(call: Callable[[Any, int], int]) -> str | None:
    """The text that a C function writes into a buffer, or None where it returns a negative length."""
    buffer = ctypes.create_string_buffer(256)
    length = call(buffer, len(buffer))
    if length >= len(buffer):
        buffer = ctypes.create_string_buffer(length + 1)
        length = call(buffer, len(buffer))
    return buffer.raw[:length].decode("utf-8", "replace") if length >= 0 else None


def _next_step(reason: str, path: Path) -> str:
    """What to do with a file that cannot be loaded."""
    experts_apart = "_exps." in reason and "not found" in reason
    in_pieces = "invalid magic" in reason and path.suffix != ".gguf"
    if experts_apart or in_pieces or "no longer supported" in reason:
        return f"It may be of an older llama.cpp, or in pieces: `localmix convert {path}` mends that."
    return f"Look at it with `localmix info {path}`."


def _reason(lines: list[str]) -> str:
    """What went wrong, out of a failed operation's log: its first line about an error, from where that starts."""
    for mark in ("gguf_init", "error loading model: ", "error: ", "failed to ", "unable to "):
        for line in lines:
            start = line.lower().find(mark)
            if start >= 0:
                # a mark that ends in a colon, and a function's name, are not part of the sentence
                said = line[start + len(mark) :] if mark.endswith(": ") else line[start:]
                return re.sub(r"^\w+: ", "", said).strip().rstrip(".")
    return library.log.last_error.rstrip(".") or "no reason given"
