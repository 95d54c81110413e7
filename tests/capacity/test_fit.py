"""How a model goes into a machine: the verdict, the placement, and what would help. No test needs a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localmix import library
from localmix.capacity.fit import Examiner, Wish, find_gpus, fit_table
from localmix.capacity.memory import Available, Verdict, machine
from localmix.capacity.simulation import skeleton
from localmix.downloads.pull_record import Pulled, write_record
from localmix.errors import UsageError
from localmix.native.devices import PROCESSOR, Device, Placement, choose_gpus, has_gpu_backend
from localmix.sizes import GIB, MIB
from tests.hub_server import point_to, serve
from tests.memory_jobs import hollow, write_config

FLOOR = machine(16)
CARD = Device("CUDA0", "a card", "gpu", 12 * GIB, 12 * GIB)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with a Mixtral-8x7B in three types, whose weights are holes."""
    home = tmp_path_factory.mktemp("home")
    config = write_config(home / "config")
    (home / "mixtral").mkdir()
    for kind in ("Q8_0", "Q4_K_M", "IQ2_S"):
        with skeleton(hollow(config, kind)) as path:
            os.replace(path, home / "mixtral" / f"mixtral-{kind}.gguf")
    return home


@pytest.fixture
def mixtral(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMIX_HOME", str(home))
    return home / "mixtral"


def test_what_fits_easily_is_not_simulated(random_model: Path) -> None:
    fit = Examiner(Wish(), Available(100 * GIB, "a test")).examine(random_model)
    assert fit.verdict is Verdict.RUNS_WELL and fit.placement == PROCESSOR and fit.repack
    assert fit.setting.context == 2048 == fit.trained
    tight = Examiner(Wish(), Available(fit.need.total + 4 * MIB, "a test")).examine(random_model)
    assert tight.need.compute != fit.need.compute


def test_mixtral_on_16_gb(mixtral: Path) -> None:
    examiner = Examiner(Wish(), FLOOR)
    assert examiner.examine(mixtral / "mixtral-IQ2_S.gguf").verdict is Verdict.RUNS_WELL
    slow = examiner.examine(mixtral / "mixtral-Q4_K_M.gguf")
    assert slow.verdict is Verdict.LOADS
    # most of it would be copied, and die; mapped it is only slow
    assert slow.need.anonymous > FLOOR.bytes and not slow.repack
    assert examiner.examine(mixtral / "mixtral-Q8_0.gguf").repack


def test_a_draft_model_takes_room_from_the_other(mixtral: Path, random_model: Path) -> None:
    left = Examiner(Wish(), FLOOR).beside(random_model)
    assert 0 < FLOOR.bytes - left.bytes < 100 * MIB
    assert left.limit.endswith("of random.gguf")
    assert Examiner(Wish(), FLOOR).beside(mixtral / "mixtral-Q8_0.gguf").bytes == 0


def test_texts_at_once_each_get_the_context(mixtral: Path) -> None:
    model = mixtral / "mixtral-IQ2_S.gguf"
    examiner = Examiner(Wish(context=1024), machine(32))
    one, four = examiner.examine(model), examiner.examine(model, 4)
    assert (one.context, one.setting.context) == (1024, 1024) and (four.context, four.setting.context) == (1024, 4096)
    assert four.need.kv == 4 * one.need.kv
    tight = Examiner(Wish(sequences=16), FLOOR)
    remedies = tight.remedies(tight.examine(model))
    assert remedies[0] == "`--slots 1` runs well."
    assert all(int(remedy.split()[1].rstrip("`")) < 4096 for remedy in remedies if remedy.startswith("`--ctx"))


def test_a_further_model_comes_beside_the_first(mixtral: Path) -> None:
    first = Examiner(Wish(), FLOOR)
    fit = first.examine(mixtral / "mixtral-IQ2_S.gguf")
    then = first.after(fit).examine(mixtral / "mixtral-IQ2_S.gguf")
    assert then.room.bytes == FLOOR.bytes - fit.need.total and then.verdict is not Verdict.RUNS_WELL
    assert "without the" in then.room.limit and "mixtral-IQ2_S.gguf" in then.room.limit
    card = Examiner(Wish(), machine(64), [CARD])
    fit = card.examine(mixtral / "mixtral-IQ2_S.gguf")
    then = card.after(fit).examine(mixtral / "mixtral-IQ2_S.gguf")
    assert fit.split.devices["CUDA0"] + then.split.devices.get("CUDA0", 0) <= CARD.free


def test_remedies_of_a_model_that_is_too_large(mixtral: Path) -> None:
    examiner = Examiner(Wish(), FLOOR)
    remedies = examiner.remedies(examiner.examine(mixtral / "mixtral-Q4_K_M.gguf"))
    assert remedies == ["`localmix chat mixtral:IQ2_S` runs well.", "`--kv-type q8_0` saves 0.23 GiB."]


def test_remedies_of_a_context_that_is_too_long(mixtral: Path) -> None:
    examiner = Examiner(Wish(context=32768), FLOOR)
    fit = examiner.examine(mixtral / "mixtral-IQ2_S.gguf")
    assert fit.verdict is Verdict.LOADS
    remedies = " ".join(examiner.remedies(fit))
    longest = int(remedies.partition("--ctx ")[2].partition("`")[0])
    assert 4096 < longest < 8192
    for context, verdict in ((longest, Verdict.RUNS_WELL), (longest + 256, Verdict.LOADS)):
        assert Examiner(Wish(context), FLOOR).examine(fit.path).verdict is verdict
    assert "`--kv-type q8_0` saves 1.88 GiB" in remedies


def test_what_does_not_load_at_all(mixtral: Path) -> None:
    examiner = Examiner(Wish(context=32768), Available(3 * GIB, "a test"))
    fit = examiner.examine(mixtral / "mixtral-IQ2_S.gguf")
    assert fit.verdict is Verdict.NO
    remedies = " ".join(examiner.remedies(fit))
    assert "` loads." in remedies and "`--kv-type q8_0` saves 1.88 GiB, then it loads." in remedies


def test_a_type_that_could_be_made_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mixtral").mkdir()
    with skeleton(hollow(home / "config", "BF16")) as path:
        os.replace(path, tmp_path / "mixtral" / "mixtral-BF16.gguf")
    monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path))
    examiner = Examiner(Wish(), FLOOR)
    path = library.resolve("mixtral:BF16", library.Purpose.RUN)
    remedies = examiner.remedies(examiner.examine(path))
    assert remedies[0] == "`localmix quantize IQ2_S mixtral` makes one that runs well."


def test_a_type_that_the_hub_has_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path))
    folder = tmp_path / "mixtral"
    folder.mkdir()
    os.link(home / "mixtral" / "mixtral-Q8_0.gguf", folder / "mixtral-Q8_0.gguf")
    write_record(folder, {"mixtral-Q8_0.gguf": Pulled("org/mixtral-GGUF", "0" * 40, "m-Q8_0.gguf", 1, "", "", 1)})
    need = Examiner(Wish(), FLOOR).examine(folder / "mixtral-Q8_0.gguf").need
    examiner = Examiner(Wish(), Available(need.total - need.weights + 3000, "a test"))
    fit = examiner.examine(folder / "mixtral-Q8_0.gguf")
    with serve() as hub:
        sizes = {"m-Q8_0.gguf": 4000, "m-Q2_K.gguf": 1000, "m-Q4_K_M.gguf": 2000, "x.json": 3000}
        hub.repositories["org/mixtral-GGUF"] = {name: bytes(size) for name, size in sizes.items()}
        point_to(hub.endpoint, monkeypatch)
        assert examiner.remedies(fit)[0] == "`localmix pull org/mixtral-GGUF:Q4_K_M` fetches one that runs well."
    point_to("http://127.0.0.1:9", monkeypatch)  # nobody answers
    assert "pull" not in " ".join(examiner.remedies(fit))


def test_a_gpu_takes_what_it_has_room_for(mixtral: Path) -> None:
    large = Examiner(Wish(), FLOOR, [CARD]).examine(mixtral / "mixtral-Q4_K_M.gguf")
    assert large.placement.gpu_layers == 33 and 15 < large.placement.cpu_expert_layers < 25
    assert large.split.fits and 11 * GIB < large.split.devices["CUDA0"] <= CARD.free - 512 * MIB
    # attention and all of the cache are there, so the processor's memory holds experts only
    assert large.split.kv == 512 * MIB and large.need.kv == 0
    assert large.need.weights + large.split.weights == 28447727616
    alone = Examiner(Wish(device="cpu"), FLOOR, []).examine(mixtral / "mixtral-Q4_K_M.gguf")
    assert alone.verdict is Verdict.LOADS
    assert Examiner(Wish(), machine(24), [CARD]).examine(large.path).verdict is Verdict.RUNS_WELL

    cold = Examiner(Wish(experts="cpu"), FLOOR, [CARD]).examine(large.path)
    assert cold.placement == Placement(33, 32) and cold.split.devices["CUDA0"] < 3 * GIB
    whole = Examiner(Wish(experts="gpu"), FLOOR, [CARD]).examine(large.path)
    assert whole.placement.cpu_expert_layers == 0 and 8 < (whole.placement.gpu_layers or 0) < 16


def test_too_many_layers_are_refused_with_the_number_that_fits(mixtral: Path) -> None:
    examiner = Examiner(Wish(gpu_layers=30, experts="gpu"), FLOOR, [CARD])
    fit = examiner.examine(mixtral / "mixtral-Q4_K_M.gguf")
    assert fit.verdict is Verdict.NO and not fit.split.fits
    fitting = Examiner(Wish(experts="gpu"), FLOOR, [CARD]).examine(fit.path)
    assert f"`--gpu-layers {fitting.placement.gpu_layers}` fits." in examiner.remedies(fit)


def test_a_gpu_without_any_room_is_left_out(mixtral: Path) -> None:
    full = Device("CUDA0", "a card", "gpu", 100 * MIB, 12 * GIB)
    fit = Examiner(Wish(), FLOOR, [full]).examine(mixtral / "mixtral-Q4_K_M.gguf")
    assert fit.placement == PROCESSOR and not fit.gpus
    # so the processor's own order counts again
    assert fit.need.repacked > 19 * GIB and not fit.repack


def test_a_cache_type_that_the_heads_refuse_is_no_remedy(tmp_path: Path) -> None:
    config = write_config(tmp_path / "odd", hidden_size=4096 - 32 * 8)  # heads of 120
    examiner = Examiner(Wish(), Available(2 * GIB, "a test"))
    fit = examiner.examine(config)
    assert fit.verdict is Verdict.LOADS
    assert not any("q8_0" in remedy for remedy in examiner.remedies(fit))


def test_memory_that_a_driver_does_not_tell(mixtral: Path) -> None:
    silent = Device("Vulkan0", "a card", "gpu", 0, 0)
    fit = Examiner(Wish(), FLOOR, [silent]).examine(mixtral / "mixtral-IQ2_S.gguf")
    assert fit.placement == PROCESSOR
    assert fit.notes == ("Vulkan0 does not say how much memory it has: name a number with --gpu-layers to use it.",)
    told = Examiner(Wish(gpu_layers=5), FLOOR, [silent]).examine(fit.path)
    assert told.placement == Placement(5) and not told.notes


def test_memory_that_both_share_is_counted_for_both(mixtral: Path) -> None:
    metal = Device("MTL0", "a processor of Apple's", "gpu", 11 * GIB, 12 * GIB)
    fit = Examiner(Wish(), FLOOR, [metal]).examine(mixtral / "mixtral-IQ2_S.gguf")
    assert metal.shares_memory and fit.need.total > 13 * GIB
    assert fit.placement.gpu_layers == 33 and fit.placement.cpu_expert_layers > 0


def test_devices_are_chosen_by_kind_and_by_name() -> None:
    cards = [Device(f"CUDA{number}", "", "gpu", 1, 1) for number in range(2)]
    inside = Device("Vulkan0", "", "integrated gpu", 1, 1)
    found = [*cards, inside, Device("CPU", "", "cpu", 1, 1)]
    assert choose_gpus(found, "auto") == cards
    assert choose_gpus([inside, found[-1]], "auto") == [inside]
    assert choose_gpus(found, "cpu") == []
    assert choose_gpus(found, "cuda") == cards
    assert choose_gpus(found, "CUDA1") == [cards[1]]
    assert choose_gpus(found, "vulkan,CUDA0") == [inside, cards[0]]
    assert choose_gpus([Device("MTL0", "", "gpu", 1, 1)], "metal")[0].name == "MTL0"
    for wrong in ("metal", "CUDA7", "", "cuda,rocm", "CPU", "."):
        with pytest.raises(UsageError, match="finds no device"):
            choose_gpus(found, wrong)


def test_a_build_without_a_gpu_is_known_without_loading_it() -> None:
    if has_gpu_backend():
        pytest.skip("this build has a GPU's back end")
    assert find_gpus("auto") == [] == find_gpus("cpu")
    with pytest.raises(UsageError, match="no device cuda"):
        find_gpus("cuda")


def test_the_table_of_a_library_without_full_precision(mixtral: Path) -> None:
    found = fit_table(mixtral / "mixtral-Q4_K_M.gguf", FLOOR)
    assert found.simulated and found.contexts == (2048, 4096, 8192, 16384, 32768)
    assert [(row.type, row.in_library) for row in found.rows] == [("Q8_0", True), ("Q4_K_M", True), ("IQ2_S", True)]
    assert found.rows[2].verdicts[0] is Verdict.RUNS_WELL and found.rows[2].verdicts[-1] is Verdict.LOADS
    for row in found.rows:
        totals = [need.total for need in row.needs]
        assert totals == sorted(totals)
        assert totals[1] == pytest.approx(row.weights + 0.85 * GIB, abs=0.1 * GIB)


def test_the_table_of_a_file_elsewhere(random_model: Path) -> None:
    found = fit_table(random_model, FLOOR, names=["Q8_0"], contexts=[300], kv_type="q8_0")
    assert [row.type for row in found.rows] == ["Q8_0"] and found.contexts == (300,)
    assert len(found.rows[0].needs) == 1 and not found.rows[0].in_library


def test_layers_for_a_gpu_that_is_not_there(random_model: Path) -> None:
    fit = Examiner(Wish(gpu_layers=5), FLOOR, []).examine(random_model)
    assert fit.placement == PROCESSOR
    assert fit.notes == ("--gpu-layers 5 does nothing: there is no GPU to be used.",)
