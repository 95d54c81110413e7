"""llama-server's arguments and environment, and what a user may not hand through to it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from localmix.conversation.chat_events import DraftSettings
from localmix.errors import UsageError
from localmix.native.devices import PROCESSOR, Placement
from localmix.rope_scaling import RopeScaling
from localmix.serving.engine_client import EngineAddress
from localmix.serving.engine_options import REFUSED, EngineOptions, check_further, environment, longer_key, rope_base
from localmix.sources.open import open_source
from localmix.worker import ENVIRONMENT, WAITING

SOCKET = EngineAddress(Path("/run/x.sock"))


def given(options: EngineOptions, address: EngineAddress = SOCKET) -> dict[str, str]:
    """The arguments that have a value."""
    arguments = options.arguments(address)
    pairs = itertools.pairwise(arguments)
    return {name: value for name, value in pairs if name.startswith("--") and not value.startswith("--")}


def test_every_slot_has_the_context() -> None:
    arguments = given(EngineOptions(Path("m.gguf"), "m:Q4_K_M", 1000, 3, threads=5, cache_bytes=2**30))
    assert arguments["--ctx-size"] == "3000" and arguments["--parallel"] == "3"
    assert arguments["--host"] == "/run/x.sock" and "--port" not in arguments
    assert arguments["--threads"] == arguments["--threads-batch"] == "5"
    assert arguments["--cache-ram"] == "1024" and arguments["--alias"] == "m:Q4_K_M"


def test_long_prompts_are_computed_in_small_batches_where_that_takes_long() -> None:
    assert given(EngineOptions(Path("m.gguf"), "m", 4096, placement=PROCESSOR))["--batch-size"] == "512"
    assert "--batch-size" not in given(EngineOptions(Path("m.gguf"), "m", 4096, placement=Placement(9, 0, ("CUDA0",))))
    vectors = EngineOptions(Path("m.gguf"), "m", 4096, embeddings=True).arguments(SOCKET)
    assert vectors.count("--batch-size") == 1 and vectors[vectors.index("--batch-size") + 1] == "4096"


def test_other_machines_are_named_before_their_devices() -> None:
    where = Placement(5, 0, ("RPC0", "RPC1"), ("127.0.0.1:1", "127.0.0.1:2"), (3, 2))
    arguments = EngineOptions(Path("m.gguf"), "m", 10, placement=where).arguments(SOCKET)
    assert given(EngineOptions(Path("m.gguf"), "m", 10, placement=where))["--rpc"] == "127.0.0.1:1,127.0.0.1:2"
    assert arguments.index("--rpc") < arguments.index("--device")
    assert arguments[arguments.index("--device") + 1] == "RPC0,RPC1"
    assert arguments[arguments.index("--tensor-split") + 1] == "3,2"


def test_a_port_of_the_loopback_where_there_are_no_sockets() -> None:
    arguments = given(EngineOptions(Path("m.gguf"), "m", 10), EngineAddress(None, 1234, "secret"))
    assert arguments["--host"] == "127.0.0.1" and arguments["--port"] == "1234"
    assert "secret" not in arguments.values()


def test_placements() -> None:
    def placed(placement: Placement, draft: DraftSettings | None = None) -> dict[str, str]:
        return given(EngineOptions(Path("m.gguf"), "m", 10, placement=placement, draft=draft))

    processor = placed(PROCESSOR)
    assert processor["--device"] == "none" and processor["--gpu-layers"] == "0"
    gpu = placed(Placement(20, 5, ("CUDA0", "CUDA1")))
    assert gpu["--device"] == "CUDA0,CUDA1" and gpu["--gpu-layers"] == "20" and gpu["--n-cpu-moe"] == "5"
    assert not {"--device", "--gpu-layers"} & placed(Placement()).keys()
    drafting = placed(Placement(20), DraftSettings(Path("d.gguf"), 6, placement=PROCESSOR))
    assert drafting["--spec-draft-device"] == "none" and drafting["--spec-draft-ngl"] == "0"
    assert drafting["--spec-draft-model"] == "d.gguf" and drafting["--spec-draft-n-max"] == "6"


def test_a_text_that_becomes_a_vector_is_computed_at_once() -> None:
    arguments = EngineOptions(Path("m.gguf"), "m", 512, 2, embeddings=True, pooling="mean").arguments(SOCKET)
    assert "--embeddings" in arguments
    for name, value in (("--batch-size", "512"), ("--ubatch-size", "512"), ("--pooling", "mean")):
        assert arguments[arguments.index(name) + 1] == value


def test_the_base_of_ntk_scaling_is_chats(random_model: Path) -> None:
    with open_source(random_model) as source:
        own = source.get("{arch}.rope.freq_base", 10000.0)  # llama.cpp's default
        dimensions = source.number("{arch}.rope.dimension_count")
        assert rope_base(source, None) is None and rope_base(source, RopeScaling("linear", 2.0)) is None
        assert rope_base(source, RopeScaling(freq_base=5.0)) == 5.0
        expected = own * 4 ** (dimensions / (dimensions - 2))
        assert rope_base(source, RopeScaling(ntk_factor=4.0)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "argument", ["--host", "--HOST", "--api-key=x", "--cors_origins", "-m", "--tools", "--ctx-size"]
)
def test_what_would_get_round_localmix_is_refused(argument: str) -> None:
    if argument.lower() != argument:
        assert check_further([argument]) == (argument,)  # llama-server does not know it either
        return
    with pytest.raises(UsageError) as caught:
        check_further(["--temp", "0.5", argument])
    assert caught.value.hint in REFUSED.values()


def test_beyond_the_trained_context(random_model: Path) -> None:
    with open_source(random_model) as source:
        assert longer_key(source, 2048, None) is None and longer_key(source, 4000, RopeScaling("yarn", 2.0)) is None
        key = longer_key(source, 4000, None)
    assert key == "llama.context_length"
    arguments = given(EngineOptions(Path("m.gguf"), "m", 4000, longer_key=key))
    assert arguments["--override-kv"] == "llama.context_length=int:4096" and arguments["--ctx-size"] == "4000"


def test_other_arguments_go_through() -> None:
    assert check_further(["--temp", "0.2", "--cache-reuse", "256"]) == ("--temp", "0.2", "--cache-reuse", "256")


def test_the_environment_brings_no_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ARG_TOOLS", "LLAMA_API_KEY", "LLAMA_SERVER_ROUTER_PORT", "HF_TOKEN", "LOCALMIX_API_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    variables = environment(SOCKET)
    assert "x" not in variables.values() and variables["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment(EngineAddress(None, 1, "secret"))["LLAMA_API_KEY"] == "secret"


def test_threads_that_wait_leave_the_cores_to_others_unless_the_user_says_how_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert environment(SOCKET).items() >= {**WAITING, **ENVIRONMENT}.items()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment(SOCKET)["GOMP_SPINCOUNT"] == "7"
