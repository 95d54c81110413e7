"""The chat engine: streaming, cache between turns, stopping, death and restart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from localmix.conversation import chat, chat_worker
from localmix.conversation.chat import (
    Conversation,
    DraftSettings,
    Dropped,
    Engine,
    EngineSettings,
    Loaded,
    Piece,
    Reading,
    Reply,
    start_child,
)
from localmix.conversation.grammar import from_json_schema
from localmix.errors import CapacityError, FileError, InputError, Interrupted, UsageError
from localmix.sampling import Sampling
from tests.checkpoints import Shape, write_checkpoint
from tests.random_model import write_random_model

GREEDY = Sampling(temperature=0, repeat_penalty=1)


def make(folder: Path, template: str | None = None) -> Path:
    from localmix.convert import convert

    config = {} if template is None else {"chat_template": template}
    shape = Shape(hidden=256, feed_forward=256, layers=2, tokenizer_config=config, config={"eos_token_id": 2})
    convert(write_checkpoint(folder / "model", shape), folder / "model.gguf")
    return folder / "model.gguf"


def quantized(source: Path, path: Path) -> Path:
    from localmix.presets import load_presets
    from localmix.quantize import quantize

    quantize(source, [(load_presets().find("Q4_0"), path)], threads=1)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: it babbles until it is stopped."""
    return make(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, EngineSettings(context=512, threads=1)) as engine:
        yield engine


def ask(conversation: Conversation, text: str) -> Reply:
    *_, reply = conversation.ask(text)
    assert isinstance(reply, Reply)
    return reply


def test_a_reply_is_streamed_and_complete(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY, limit=20)
    events = list(conversation.ask("Hello"))
    loaded = next(event for event in events if isinstance(event, Loaded))
    reply = events[-1]
    assert isinstance(reply, Reply)
    assert loaded.context == 512 and loaded.has_template
    assert "".join(event.text for event in events if isinstance(event, Piece)) == reply.text
    assert reply.completion_tokens == 20 and reply.finish_reason == "length"
    assert "\ufffd" not in reply.text or reply.text.count("\ufffd") < 20
    assert conversation.turns[-1] == {"role": "assistant", "content": reply.text}
    assert reply.tg_tps is not None and reply.tg_tps > 1


def test_the_next_turn_reads_only_what_is_new(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY, limit=8)
    first = ask(conversation, "Hello, how are you today?")
    second = ask(conversation, "And?")
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens - 1
    conversation.clear()
    again = ask(conversation, "Hello, how are you today?")
    assert again.text == first.text
    assert again.cached_tokens == first.prompt_tokens - 1


def test_stop_keeps_what_was_said(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY)
    list(engine.load())
    timer: threading.Timer | None = None
    reply: Reply | None = None
    for event in conversation.ask("Talk"):
        if isinstance(event, Piece) and timer is None:
            stopped = time.monotonic()
            timer = threading.Timer(0, engine.stop)
            timer.start()
        if isinstance(event, Reply):
            reply = event
    assert reply is not None and reply.finish_reason == "stopped"
    assert time.monotonic() - stopped < 2
    assert conversation.turns[-1]["content"] == reply.text != ""
    assert ask(Conversation(engine, sampling=GREEDY, limit=3), "Again").completion_tokens == 3


def test_stop_while_a_long_prompt_is_read(engine: Engine) -> None:
    list(engine.load())
    conversation = Conversation(engine, sampling=GREEDY)
    reply: Reply | None = None
    for event in conversation.ask("word " * 90):
        if isinstance(event, Reading) and event.done == 0:
            stopped = time.monotonic()
            engine.stop()
        if isinstance(event, Reply):
            reply = event
    assert time.monotonic() - stopped < 0.5
    assert reply is not None and (reply.finish_reason, reply.text) == ("stopped", "")
    assert conversation.turns == []
    assert ask(Conversation(engine, sampling=GREEDY, limit=3), "Again").completion_tokens == 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_stop_does_not_wait_for_a_long_computation(engine: Engine) -> None:
    list(engine.load())
    conversation = Conversation(engine, sampling=GREEDY)
    assert engine.pid is not None
    pieces: list[Piece] = []
    for event in conversation.ask("Talk"):
        if isinstance(event, Piece) and not pieces:
            os.kill(engine.pid, signal.SIGSTOP)  # what a matrix that takes seconds looks like from outside
            stopped = time.monotonic()
            engine.stop()
        if isinstance(event, Piece):
            pieces.append(event)
        last = event
    assert time.monotonic() - stopped < 0.4
    assert isinstance(last, Reply) and last.finish_reason == "stopped"
    assert last.text == "".join(piece.text for piece in pieces) == conversation.turns[-1]["content"]
    assert last.completion_tokens == pieces[-1].tokens and last.prompt_tokens > 5
    os.kill(engine.pid, signal.SIGCONT)
    again = ask(Conversation(engine, sampling=GREEDY, limit=3), "Again")
    assert again.completion_tokens == 3 and again.finish_reason == "length"


def test_a_reply_left_in_the_middle_does_not_leak_into_the_next(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY, limit=30)
    for event in conversation.ask("Talk"):
        if isinstance(event, Piece):
            break
    assert conversation.turns == []
    whole = ask(Conversation(engine, sampling=GREEDY, limit=5), "Hello")
    assert whole.completion_tokens == 5


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_engine_ends_the_turn_and_not_the_conversation(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY, limit=5)
    ask(conversation, "One")
    turns = list(conversation.turns)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(CapacityError, match="killed"):
        ask(conversation, "Two")
    assert conversation.turns == turns
    assert ask(conversation, "Two").completion_tokens == 5
    assert len(conversation.turns) == 4


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_engine_that_comes_back_takes_what_was_saved(model: Path, tmp_path: Path) -> None:
    with Engine(model, EngineSettings(context=512, threads=1)) as engine:
        conversation = Conversation(engine, sampling=GREEDY, limit=5)
        ask(conversation, "Hello, how are you today?")
        engine.save_state(tmp_path / "state.kv")
        for restored in (True, False):  # a state that might be what kills is not tried again
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(CapacityError, match="killed"):
                ask(conversation, "And?")
            assert bool(ask(conversation, "And?").cached_tokens) is restored
            del conversation.turns[-2:]


def test_a_saved_cache_is_not_read_again(model: Path, tmp_path: Path) -> None:
    settings, state = EngineSettings(context=512, threads=1), tmp_path / "state.kv"
    with Engine(model, settings) as engine:
        assert engine.save_state(state).tokens == 0 and not state.exists()
        conversation = Conversation(engine, sampling=GREEDY, limit=8)
        first = ask(conversation, "Hello, how are you today?")
        saved = engine.save_state(state)
        assert saved.tokens == first.prompt_tokens + 7 and saved.bytes == state.stat().st_size
        turns = list(conversation.turns)
        expected = ask(conversation, "And?")
    with Engine(model, settings) as engine:
        *_, loaded = engine.load(state)
        assert isinstance(loaded, Loaded) and loaded.restored_tokens == saved.tokens
        conversation = Conversation(engine, sampling=GREEDY, limit=8)
        conversation.turns = turns
        again = ask(conversation, "And?")
        assert (again.text, again.cached_tokens) == (expected.text, expected.cached_tokens)
        assert again.cached_tokens >= first.prompt_tokens
        # a loaded engine takes another session's state, too
        *_, loaded = engine.load(state)
        assert isinstance(loaded, Loaded) and loaded.restored_tokens == saved.tokens
        *_, loaded = engine.load(tmp_path / "none")
        assert isinstance(loaded, Loaded) and loaded.restored_tokens == 0


def test_a_state_of_something_else_or_damaged_is_passed_over(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.kv"
    with Engine(model, EngineSettings(context=512, threads=1)) as engine:
        ask(Conversation(engine, sampling=GREEDY, limit=8), "Hello, how are you today? " + "word " * 80)
        engine.save_state(state)
    data = state.read_bytes()

    def restored(**settings: object) -> int:
        with Engine(model, EngineSettings(**{"context": 512, "threads": 1, **settings})) as engine:  # type: ignore[arg-type]
            *_, loaded = engine.load(state)
            assert isinstance(loaded, Loaded)
            assert ask(Conversation(engine, sampling=GREEDY, limit=3), "Hello").completion_tokens == 3
            return loaded.restored_tokens

    assert restored() > 256
    assert restored(context=2048) > 256
    assert restored(kv_type="q8_0") == 0
    assert restored(chat_template="{{ messages[0].content }}") == 0
    assert restored(context=256) == 0
    state.write_bytes(data[:5000] + b"!" + data[5001:])
    assert restored() == 0
    state.write_bytes(data[: len(data) // 2])
    assert restored() == 0
    state.write_bytes(data)
    os.utime(model)
    assert restored() == 0


@pytest.mark.parametrize("draft", [None, DraftSettings()], ids=["plain", "ngram"])
def test_a_reply_under_a_schema(tinymix_bf16: Path, draft: DraftSettings | None) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "number": {"type": "integer", "minimum": 1}},
        "required": ["name", "number"],
        "additionalProperties": False,
    }
    with Engine(tinymix_bf16, EngineSettings(context=512, threads=1, draft=draft)) as engine:
        for seed in range(4):
            sampling = Sampling(temperature=0.1 + seed / 2, seed=seed)
            conversation = Conversation(engine, sampling=sampling, grammar=from_json_schema(schema), limit=200)
            reply = ask(conversation, "Where is Pausa's house?")
            assert reply.finish_reason == "stop"
            jsonschema.validate(json.loads(reply.text), schema)
        conversation = Conversation(engine, grammar="root ::= missing")
        with pytest.raises(UsageError, match="does not parse"):
            ask(conversation, "Hello")
        assert conversation.turns == []


def test_a_draft_changes_the_time_and_not_the_reply(tinymix_bf16: Path, tmp_path: Path) -> None:
    questions = ["Where is Pausa's house?", "What is Doton's address?", "And who are you?"]

    def replies(draft: DraftSettings | None) -> list[Reply]:
        with Engine(tinymix_bf16, EngineSettings(context=512, threads=1, draft=draft)) as engine:
            return [ask(Conversation(engine, sampling=GREEDY, limit=40), question) for question in questions]

    plain = replies(None)
    assert all(reply.drafted == 0 and reply.acceptance is None and reply.speedup is None for reply in plain)
    small = quantized(tinymix_bf16, tmp_path / "small.gguf")
    for draft in (DraftSettings(), DraftSettings(small), DraftSettings(small, length=2, adaptive=False)):
        drafted = replies(draft)
        assert [reply.text for reply in drafted] == [reply.text for reply in plain]
        if draft.model:
            assert all(0 < reply.accepted <= reply.drafted for reply in drafted)
            assert all(reply.speedup is not None and reply.speedup > 0 for reply in drafted)


def test_a_draft_of_another_vocabulary_is_refused(model: Path, tinymix_bf16: Path) -> None:
    with (
        Engine(tinymix_bf16, EngineSettings(context=64, threads=1, draft=DraftSettings(model))) as engine,
        pytest.raises(UsageError, match="cannot draft for tinymix-BF16"),
    ):
        list(engine.load())


def test_a_template_of_the_users_own(model: Path) -> None:
    with Engine(model, EngineSettings(context=128, threads=1, chat_template="{{ messages[-1].content }}")) as engine:
        reply = ask(Conversation(engine, sampling=GREEDY, limit=2), "abc")
        assert reply.prompt_tokens < 8
    with (
        Engine(model, EngineSettings(context=128, threads=1, template_name="tool_use")) as engine,
        pytest.raises(UsageError, match="no chat template 'tool_use'"),
    ):
        list(engine.load())


def test_what_the_model_says_about_itself(tmp_path: Path) -> None:
    own: dict[str, str | int | float] = {
        "general.sampling.temp": 0.75,
        "general.sampling.top_k": 7,
        "tokenizer.chat_template.short": "{{ messages[-1].content }}",
    }
    path = write_random_model(tmp_path / "m.gguf", layers=1, experts=0, own=own)
    tokens = {}
    for name in (None, "short"):
        with Engine(path, EngineSettings(context=256, threads=1, template_name=name)) as engine:
            *_, loaded = engine.load()
            assert isinstance(loaded, Loaded)
            assert loaded.own_sampling == {"temperature": 0.75, "top_k": 7}
            assert Sampling.for_model(loaded.own_sampling) == Sampling(temperature=0.75, top_k=7)
            tokens[name] = ask(Conversation(engine, limit=1), "abc").prompt_tokens
    assert tokens["short"] < tokens[None]


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_a_quantized_cache_is_saved_and_restored(tmp_path: Path, kv_type: str) -> None:
    path = write_random_model(tmp_path / "m.gguf", layers=2)
    settings = EngineSettings(context=256, threads=1, kv_type=kv_type)
    with Engine(path, settings) as engine:
        conversation = Conversation(engine, sampling=GREEDY, limit=8)
        ask(conversation, "Hello")
        saved = engine.save_state(tmp_path / "state")
        turns, expected = list(conversation.turns), ask(conversation, "And?")
        with pytest.raises(FileError):
            engine.save_state(tmp_path / "missing" / "state")
        assert ask(conversation, "Still there?").completion_tokens == 8
    with Engine(path, settings) as engine:
        *_, loaded = engine.load(tmp_path / "state")
        assert isinstance(loaded, Loaded) and loaded.restored_tokens == saved.tokens
        conversation = Conversation(engine, sampling=GREEDY, limit=8)
        conversation.turns = turns
        assert ask(conversation, "And?").text == expected.text


def test_a_full_context_drops_the_oldest_turns(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY, limit=20, system="Be brief.")
    dropped: list[int] = []
    for number in range(12):
        for event in conversation.ask(f"Question {number}: " + "word " * 12):
            if isinstance(event, Dropped):
                dropped.append(event.turns)
            if isinstance(event, Reply):
                assert event.finish_reason == "length" and event.completion_tokens == 20
                assert event.context_used <= 512
                last = event
    assert len(conversation.turns) == 24
    assert dropped and all(count % 2 == 0 for count in dropped) and conversation.dropped == sum(dropped)
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert conversation.messages[1]["role"] == "user"
    assert len(dropped) < 6  # half of the context is made free at once: the cache serves the turns between
    assert last.cached_tokens > 0


def test_turns_are_left_out_when_the_reply_is_there_and_not_before(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY, limit=5)
    for number in range(3):
        ask(conversation, f"Question {number}: " + "word " * 30)
    question = "word " * 80
    assert next(event for event in conversation.ask(question) if isinstance(event, Dropped))  # and no further
    assert conversation.dropped == 0 and len(conversation.turns) == 6
    ask(conversation, question)
    assert conversation.dropped > 0 and len(conversation.turns) == 8


def test_a_full_context_is_a_sentence(engine: Engine) -> None:
    conversation = Conversation(engine, sampling=GREEDY, limit=4)
    with pytest.raises(CapacityError, match="the context holds 512"):
        ask(conversation, "word " * 2000)
    assert conversation.turns == []
    assert ask(conversation, "short").completion_tokens == 4


def test_generation_ends_with_the_context(engine: Engine) -> None:
    reply = ask(Conversation(engine, sampling=GREEDY), "word " * 80)
    assert reply.finish_reason == "length"
    assert reply.prompt_tokens + reply.completion_tokens in (512, 513)


def test_a_template_that_never_ends_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.5)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with (
        Engine(make(tmp_path, endless), EngineSettings(context=64, threads=1)) as engine,
        pytest.raises(InputError, match="takes longer than"),
    ):
        ask(Conversation(engine), "Hello")


def test_stop_while_the_template_runs_or_the_model_loads(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with Engine(model, EngineSettings(context=64, threads=1, chat_template=endless)) as engine:
        list(engine.load())
        threading.Timer(0.3, engine.stop).start()
        with pytest.raises(InputError, match="takes longer than"):
            ask(Conversation(engine), "Hello")
        assert engine.pid is None
    with Engine(model, EngineSettings(context=64, threads=1)) as engine:
        threading.Timer(0.05, engine.stop).start()
        with contextlib.suppress(Interrupted):  # or it was loaded before
            list(engine.load())
        time.sleep(0.3)
        assert ask(Conversation(engine, limit=2), "Hello").completion_tokens  # the end may be the first


def test_without_a_template_the_text_is_continued(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = path.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_tXmplate")
    path.write_bytes(data)
    with Engine(path, EngineSettings(context=64, threads=1)) as engine:
        (loaded,) = [event for event in engine.load() if isinstance(event, Loaded)]
        assert not loaded.has_template
        assert ask(Conversation(engine, limit=3), "Once upon a time").completion_tokens <= 3


def test_a_child_that_was_started_before_its_model_was_known(model: Path, tmp_path: Path) -> None:
    with start_child() as child, Engine(model, EngineSettings(context=64, threads=1), child) as engine:
        assert ask(Conversation(engine, limit=2), "Hello").completion_tokens == 2
        assert engine.pid == child.pid
        engine.close()
        assert ask(Conversation(engine, limit=2), "Hello").completion_tokens == 2
        assert engine.pid != child.pid
    started = time.monotonic()
    with start_child():
        pass
    assert time.monotonic() - started < 2
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    with start_child() as child, Engine(broken, EngineSettings(), child) as engine:
        for _ in range(2):
            with pytest.raises(InputError, match="cannot load broken"):
                list(engine.load())


def test_a_fast_models_pieces_are_sent_together(engine: Engine) -> None:
    list(engine.load())
    started = time.monotonic()
    events = list(Conversation(engine, sampling=GREEDY, limit=300).ask("Talk"))
    pieces = [event for event in events if isinstance(event, Piece)]
    assert isinstance(events[-1], Reply) and "".join(piece.text for piece in pieces) == events[-1].text
    assert len(pieces) <= (time.monotonic() - started) / chat_worker.PIECE_SECONDS + 2


def test_the_same_seed_gives_the_same_reply(engine: Engine) -> None:
    def reply(seed: int) -> str:
        sampling = Sampling(temperature=2, top_k=0, top_p=1, seed=seed)
        return ask(Conversation(engine, sampling=sampling, limit=12), "Hello").text

    assert reply(1) == reply(1)
    assert reply(1) != reply(2)
