"""The layer over llama.cpp: tokens, logits, several sequences, samplers, the reused cache, refusals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localmix.errors import CapacityError, FileError, InputError, Interrupted, UsageError
from localmix.native.devices import PROCESSOR, Placement
from localmix.native.library import log
from localmix.native.model import CachedText, Context, Model, Sampler
from localmix.rope_scaling import RopeScaling
from localmix.sampling import Sampling
from localmix.tensor_types import TensorType
from localmix.worker import run
from tests import native_jobs
from tests.random_model import write_random_model

GREEDY = Sampling(temperature=0, repeat_penalty=1)


@pytest.fixture(scope="module")
def model(random_model: Path) -> Iterator[Model]:
    with Model(random_model) as model:
        yield model


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(model, context_length=512, batch=64, micro_batch=32, sequences=2, unified=True) as context:
        yield context


def test_facts(model: Model) -> None:
    assert model.vocabulary.size == 277
    assert (model.vocabulary.bos, model.vocabulary.eos, model.vocabulary.eot) == (1, 2, -1)
    assert (model.vocabulary.add_bos, model.vocabulary.add_eos) == (True, False)
    assert (model.trained_context, model.layers) == (2048, 2)
    assert model.metadata("general.name") == "random"
    assert model.metadata("llama.expert_count") == "8"
    assert model.metadata("no.such.key") is None
    assert "[INST]" in (model.chat_template() or "")
    assert model.chat_template("tools") is None
    assert model.ends_generation(2) and not model.ends_generation(5)
    assert model.parameters == 3_686_144


@pytest.mark.parametrize("text", ["the ab in", "中文 and é", "", "a\0b", "x" * 1000])
def test_tokens_give_back_the_text(model: Model, text: str) -> None:
    tokens = model.tokenize(text)
    assert tokens.dtype == np.int32 and tokens[0] == 1
    assert b"".join(model.piece(token) for token in tokens).decode().removeprefix(" ") == text
    assert np.array_equal(model.tokenize(text.encode(), add_special=False), tokens[1:])


def test_special_tokens_are_read_only_on_request(model: Model) -> None:
    assert 2 not in model.tokenize("a</s>")
    assert model.tokenize("a</s>", parse_special=True)[-1] == 2
    assert model.piece(2) == b""
    assert model.piece(2, special=True) == b"</s>"


def test_logits_of_two_sequences_equal_those_of_each_alone(context: Context) -> None:
    first, second = np.arange(10, 30), np.arange(50, 70)
    alone = []
    for tokens in (first, second):
        context.clear()
        context.decode(tokens, np.arange(20), 0, True)
        alone.append(context.logits().copy())
    context.clear()
    context.decode(np.r_[first, second], np.tile(np.arange(20), 2), np.repeat([0, 1], 20), True)
    both = context.logits()
    assert both.shape == (40, 277)
    assert np.allclose(both, np.r_[alone[0], alone[1]], atol=0.02)
    assert np.abs(alone[0] - alone[1]).max() > 0.5


def test_only_tokens_that_ask_get_logits(context: Context) -> None:
    context.decode(np.arange(10, 30), np.arange(20), 0, np.arange(20) >= 17)
    assert context.logits().shape == (3, 277)
    context.decode([30], [20])
    with pytest.raises(RuntimeError, match="asked"):
        context.logits()


def test_greedy_is_the_largest_logit_and_seeds_repeat(model: Model, context: Context) -> None:
    context.decode(np.arange(10, 30), np.arange(20), 0, np.arange(20) == 19)
    largest = int(context.logits()[-1].argmax())
    with Sampler(model, GREEDY) as sampler:
        assert sampler.sample(context) == largest
    draws = []
    for seed in (7, 7, 8):
        with Sampler(model, Sampling(temperature=3, top_k=0, top_p=1, seed=seed)) as sampler:
            draws.append([sampler.sample(context) for _ in range(20)])
    assert draws[0] == draws[1] != draws[2]
    with Sampler(model, Sampling(temperature=3, top_k=1)) as sampler:
        assert sampler.sample(context) == largest


def test_the_repeat_penalty_sees_accepted_tokens(model: Model, context: Context) -> None:
    context.decode(np.arange(10, 30), np.arange(20), 0, np.arange(20) == 19)
    largest = int(context.logits()[-1].argmax())
    with Sampler(model, Sampling(temperature=0, repeat_penalty=100)) as sampler:
        sampler.accept(largest)
        assert sampler.sample(context) != largest


def test_a_fed_text_reuses_its_common_start(model: Model, context: Context) -> None:
    text = CachedText(context)
    tokens = np.arange(10, 160)
    steps: list[tuple[int, int, int]] = []
    assert text.feed(tokens, lambda *counts: steps.append(counts)) == 0
    assert steps == [(done, 150, 0) for done in (0, 32, 64, 96, 128, 150)]
    with Sampler(model, GREEDY) as sampler:
        first = list(text.generate(sampler, 5))
    assert text.tokens == [*tokens.tolist(), *first[:4]]

    changed = np.r_[tokens[:100], np.arange(200, 210)]
    assert text.feed(changed) == 100
    assert text.feed(changed) == 109  # only the last, for its logits
    assert text.feed(tokens) == 100
    with Sampler(model, GREEDY) as sampler:
        assert list(text.generate(sampler, 5)) == first
    assert text.feed(tokens[:50]) == 49
    assert text.tokens == tokens[:50].tolist()


def test_generation_ends_where_the_context_ends(model: Model, context: Context) -> None:
    text = CachedText(context)
    text.feed(np.arange(510) % 200 + 20)
    with Sampler(model, GREEDY) as sampler:
        assert len(list(text.generate(sampler, 100))) <= 3
    with pytest.raises(CapacityError, match="513 tokens"):
        text.feed(np.arange(513) % 200 + 20)


def test_a_cancelled_feed_keeps_what_was_done(model: Model) -> None:
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 200

    with Context(model, context_length=512, batch=32, micro_batch=32, cancelled=cancelled) as context:
        text = CachedText(context)
        with pytest.raises(Interrupted):
            text.feed(np.arange(400) % 200 + 20)
        assert len(text.tokens) % 32 == 0 and len(text.tokens) < 400
        done = len(text.tokens)
        calls = -(10**9)
        assert text.feed(np.arange(400) % 200 + 20) == done
        expected = context.logits().copy()
        context.clear()
        CachedText(context).feed(np.arange(400) % 200 + 20)
        assert np.allclose(context.logits(), expected, atol=0.02)


def test_kv_types_and_a_full_cache(model: Model) -> None:
    with Context(model, context_length=256, batch=256, type_k=TensorType.Q8_0, type_v=TensorType.Q8_0) as context:
        context.decode(np.arange(20, 220), np.arange(200))
        with pytest.raises(CapacityError, match=r"100 more tokens do not fit into a context of 256"):
            context.decode(np.arange(20, 120), np.arange(200, 300))
    with pytest.raises(ValueError, match="a batch of 0"), Context(model, context_length=256) as context:
        context.decode([], [])


def test_a_closed_model_is_said_not_crashed(random_model: Path) -> None:
    model = Model(random_model)
    model.close()
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = model.layers


@pytest.mark.parametrize(
    "options",
    [{"placement": PROCESSOR}, {"placement": Placement(cpu_expert_layers=2)}, {"mmap": False}, {"repack": False}],
)
def test_load_options_do_not_change_the_logits(random_model: Path, model: Model, options: dict[str, Any]) -> None:
    results = []
    with Model(random_model, **options) as other:
        for loaded in (model, other):
            with Context(loaded, context_length=256, threads=1) as context:
                context.decode(np.arange(20, 60), np.arange(40), 0, np.arange(40) == 39)
                results.append(context.logits().copy())
    assert np.array_equal(*results)


def test_rope_scaling_is_what_its_formula_says(model: Model) -> None:
    def last_logits(rope: RopeScaling | None) -> NDArray[np.float32]:
        with Context(model, context_length=256, threads=1, rope=rope) as context:
            context.decode(np.arange(20, 60), np.arange(40), 0, np.arange(40) == 39)
            return context.logits().copy()

    plain = last_logits(None)
    assert np.array_equal(last_logits(RopeScaling("linear", 1)), plain)
    assert not np.allclose(last_logits(RopeScaling("linear", 2)), plain, atol=1e-4)
    assert not np.allclose(last_logits(RopeScaling("yarn", 2)), last_logits(RopeScaling("linear", 2)), atol=1e-4)
    base = float(model.metadata("llama.rope.freq_base") or 10000) * 2 ** (model.head_size / (model.head_size - 2))
    assert np.array_equal(last_logits(RopeScaling(ntk_factor=2)), last_logits(RopeScaling(freq_base=base)))
    assert not np.allclose(last_logits(RopeScaling(ntk_factor=2)), plain, atol=1e-4)


def test_a_device_that_is_not_there_is_said(random_model: Path) -> None:
    with pytest.raises(UsageError, match="no device 'CUDA7'"):
        Model(random_model, placement=Placement(devices=("CUDA7",)))


def test_a_vocabulary_alone_tokenizes_and_a_simulation_measures(random_model: Path, model: Model) -> None:
    with Model(random_model, vocabulary_only=True) as vocabulary:
        assert np.array_equal(vocabulary.tokenize("the ab"), model.tokenize("the ab"))
    with Model(random_model, simulate=True) as simulated, log.capture() as lines:
        Context(simulated, context_length=1024).close()
    # 2 layers, 1024 cells, K and V of 2 heads of 64 in two bytes
    assert any(line.startswith("llama_kv_cache: size =    1.00 MiB") for line in lines)


def test_progress_errors_and_cancel_while_loading(random_model: Path) -> None:
    fractions: list[float] = []
    Model(random_model, progress=fractions.append).close()
    assert fractions[-1] == 1.0

    def fail(_: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Model(random_model, progress=fail)
    with pytest.raises(Interrupted):
        Model(random_model, cancelled=lambda: True)


def test_refused_files(tmp_path: Path, random_model: Path) -> None:
    with pytest.raises(FileError, match=r"none\.gguf does not exist"):
        Model(tmp_path / "none.gguf")
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"no model at all, only text")
    with pytest.raises(InputError, match=r"llama\.cpp cannot load garbage\.gguf: .*magic"):
        Model(garbage)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(random_model.read_bytes()[:2_000_000])
    with pytest.raises(InputError, match=r"cut\.gguf: .*not within the file bounds"):
        Model(cut)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_context_beyond_memory(random_model: Path) -> None:
    with pytest.raises(CapacityError, match="context of 4000000 tokens: failed to allocate"):
        run(native_jobs.open_context_in_little_memory, random_model, 4_000_000)


@pytest.mark.parametrize("fault", [{"byte_tokens": False}, {"duplicate": True}])
def test_vocabularies_that_abort_are_sentences_from_a_worker(tmp_path: Path, fault: dict[str, bool]) -> None:
    path = write_random_model(tmp_path / "bad.gguf", **fault)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"bad\.gguf makes llama\.cpp abort: \S+") as caught:
        run(native_jobs.count_tokens, path, "the 中文")
    assert "/" not in caught.value.message.removeprefix(str(path))


def test_a_file_truncated_under_mmap_is_a_sentence(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "shrinks.gguf")
    with pytest.raises(InputError, match=r"shrinks\.gguf could not be read to its end"):
        run(native_jobs.truncate_while_mapped, path)
