"""Models over two real workers on loopback, against the same models on this machine alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from localmix.capacity.fit import Examiner, Wish
from localmix.capacity.memory import available
from localmix.capacity.placement import RESERVE_BYTES
from localmix.conversation.chat import Conversation, Engine, EngineSettings, Reply
from localmix.convert import convert
from localmix.distribution import machines
from localmix.distribution.machines import Machines
from localmix.distribution.protocol import parse_endpoints
from localmix.distribution.rpc_server import RpcServer
from localmix.errors import NetworkError
from localmix.measurement.corpus import find_corpora
from localmix.measurement.measuring_child import MeasuringChild
from localmix.measurement.perplexity import Conditions, measure_here
from localmix.native.devices import PROCESSOR, Placement
from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.sampling import Sampling
from localmix.worker import Worker
from tests import worker_jobs
from tests.conftest import TINYMIX
from tests.random_model import write_random_model
from tests.workers import require_rpc_server, running_worker

MIB = 2**20


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RpcServer]]:
    """Two workers as llama.cpp makes them; `test_front` and the tests of the command have what localmix puts before."""
    program = require_rpc_server()
    with RpcServer(program, threads=1) as first, RpcServer(program, threads=1) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TinyMix in a type that this processor would reorder."""
    folder = tmp_path_factory.mktemp("spread")
    convert(TINYMIX, folder / "bf16.gguf")
    quantize(folder / "bf16.gguf", [(load_presets().find("Q4_K_M"), folder / "q4.gguf")], threads=1)
    return folder / "q4.gguf"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def addresses(servers: list[RpcServer]) -> str:
    return ",".join(str(server.endpoint) for server in servers)


def placement(workers: Machines, counts: tuple[int, ...]) -> Placement:
    names = tuple(device.name for device in workers.devices)
    servers = tuple(device.server for device in workers.devices)
    return Placement(sum(counts), 0, names, servers, counts)


def perplexity(child: MeasuringChild, model: Path, where: Placement, repack: bool) -> float:
    (corpus,) = find_corpora([str(TINYMIX / "heldout.txt")])
    conditions = Conditions(256, 6, 1, None, where, repack=repack)
    found = child.run(measure_here, model, corpus, conditions, False)
    return float(found.ppl)


def test_the_perplexity_is_that_of_this_machine_to_the_last_bit(servers: list[RpcServer], model: Path) -> None:
    with Machines(parse_endpoints(addresses(servers))) as workers, MeasuringChild() as child:
        spread = [perplexity(child, model, placement(workers, counts), True) for counts in ((2, 2), (1, 1))]
        alone = perplexity(child, model, PROCESSOR, False)
        reordered = perplexity(child, model, PROCESSOR, True)
    # workers take weights in the order of the file: what lies here is reordered, and sums in another order
    assert spread[0] == alone
    assert spread == pytest.approx([alone] * 2, rel=2e-4) and reordered == pytest.approx(alone, rel=2e-4)


def test_a_greedy_reply_is_the_same(servers: list[RpcServer], model: Path) -> None:
    def reply(where: Placement) -> str:
        settings = EngineSettings(context=512, threads=1, placement=where, repack=False)
        with Engine(model, settings) as engine:
            conversation = Conversation(engine, sampling=Sampling(temperature=0), limit=40)
            *_, last = conversation.ask("Where does Wilma live?")
            assert isinstance(last, Reply)
            return last.text

    with Machines(parse_endpoints(addresses(servers))) as workers:
        assert reply(placement(workers, (1, 3))) == reply(PROCESSOR)


def test_workers_take_no_more_than_was_computed(servers: list[RpcServer], tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "wide.gguf", layers=4, hidden=512, feed_forward=1024, context=4096)

    def peak(server: RpcServer) -> int:
        assert server._process is not None
        status = Path(f"/proc/{server._process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+)", status)
        assert match is not None
        return int(match[1]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("there is no /proc here")
    for server in servers:  # so that nothing of other tests is in their peaks
        server.stop()
        server.start()
    before = [peak(server) for server in servers]
    with Machines(parse_endpoints(addresses(servers))) as workers:
        wish = Wish(context=4096, remote=workers.devices)
        fit = Examiner(wish, available()).examine(path)
        assert fit.split.fits and fit.placement.layer_counts == (3, 2) and fit.layers == 5
        settings = EngineSettings(context=4096, threads=1, placement=fit.placement)
        with Engine(path, settings) as engine:
            for _ in Conversation(engine, limit=2).ask("the " * 300):
                pass
    taken = [peak(server) - first for server, first in zip(servers, before, strict=True)]
    for real, device in zip(taken, workers.devices, strict=True):
        computed = fit.split.devices[device.name]
        assert 0.7 * computed < real < computed + RESERVE_BYTES / 8


def test_nobody_at_one_of_the_addresses(servers: list[RpcServer]) -> None:
    with (
        pytest.raises(NetworkError, match=r"No worker listens at 127\.0\.0\.1:1"),
        Machines(parse_endpoints(f"{servers[0].endpoint},127.0.0.1:1")),
    ):
        pass
    # and the one that is there is free again
    with Machines(parse_endpoints(str(servers[0].endpoint))) as workers:
        assert [device.title for device in workers.devices] == [str(servers[0].endpoint)]
        assert workers.failure is None


def test_the_child_that_a_lost_worker_kills_says_so(servers: list[RpcServer], model: Path) -> None:
    with Machines(parse_endpoints(addresses(servers))) as workers:
        settings = EngineSettings(context=512, threads=1, placement=placement(workers, (2, 2)))
        with Engine(model, settings) as engine:
            list(engine.load())
            assert servers[1]._process is not None
            servers[1]._process.kill()
            conversation = Conversation(engine, limit=40)
            with pytest.raises(NetworkError, match=f"{servers[1].endpoint} was lost: it ended the connection"):
                list(conversation.ask("Where does Wilma live?"))
            # it may come back, and the conversation goes on
            address = servers[1].endpoint
            with pytest.raises(NetworkError, match=f"No worker listens at {address}"):
                list(conversation.ask("Where does Wilma live?"))
    servers[1].stop()
    servers[1].start()


def test_a_worker_that_is_lost_between_two_questions_is_named_however_late(
    servers: list[RpcServer], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_GRACE_SECONDS", 0.0)
    with Machines(parse_endpoints(str(servers[0].endpoint))) as workers:
        settings = EngineSettings(context=512, threads=1, placement=placement(workers, (4,)))
        with Engine(model, settings) as engine:
            list(engine.load())
            assert engine.pid is not None
            child = psutil.Process(engine.pid)
            servers[0].stop()
            servers[0].start(servers[0].endpoint.port)
            wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)
            conversation = Conversation(engine, limit=8)
            with pytest.raises(NetworkError, match="was lost: it ended the connection"):
                list(conversation.ask("Where does Wilma live?"))
            assert workers.failure is not None
            # it is back
            *_, last = conversation.ask("Where does Wilma live?")
            assert isinstance(last, Reply) and last.text
            wait_until(lambda: workers.failure is None)


def test_one_worker_under_two_names_is_seen(tmp_path: Path) -> None:
    with running_worker(tmp_path) as (address, _):
        names = f"{address},localhost:{address.rpartition(':')[2]}"
        with pytest.raises(NetworkError, match="is busy") as refused, Machines(parse_endpoints(names)):
            pass
        assert "Two names" in refused.value.hint


def test_leaving_ends_no_other_child(servers: list[RpcServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_GRACE_SECONDS", 0.0)
    with Worker(worker_jobs.echo) as other:
        with Machines(parse_endpoints(str(servers[0].endpoint))) as workers:
            pass
        time.sleep(0.3)
        other.send("x")
        assert next(other) == "x" and workers.failure is None


def test_the_end_of_the_relay_is_a_loss(servers: list[RpcServer], model: Path) -> None:
    with Machines(parse_endpoints(addresses(servers))) as workers:
        settings = EngineSettings(context=512, threads=1, placement=placement(workers, (2, 2)))
        with Engine(model, settings) as engine:
            list(engine.load())
            workers._relay.kill()
            with pytest.raises(NetworkError, match="connection to the workers ended"):
                list(Conversation(engine, limit=40).ask("Where does Wilma live?"))
