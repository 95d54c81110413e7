"""The wheel as others get it: complete, and working in an environment of its own, far from this checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import localmix

ROOT = Path(__file__).resolve().parents[1]

# config.json of Mixtral-8x7B, as published.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}

BUILD_FILES = ("build.py", "engine.cmake", "pin.json")

COMPILER = shutil.which(os.environ.get("CXX", "c++")) and shutil.which("cmake")


def build(source: Path, into: Path, what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The backend is in this environment already: without isolation a build needs no network.
    command = [sys.executable, "-m", "build", what, "--no-isolation", "--outdir", str(into), str(source)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    result = build(ROOT, folder, "--wheel")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; the folder of its programs.

    The dependencies come from the environment of these tests through a .pth file: installing them would
    compile llama.cpp for minutes. A folder that a .pth adds comes last and has no .pth processed, so this
    checkout's editable install cannot stand in for the wheel.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", str(wheel)], check=True, capture_output=True)
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", place], check=True, capture_output=True, text=True).stdout.strip()
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


def run(program: Path, *arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LOCALMIX_HOME": str(home), "PYTHONPATH": ""}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)


LANES = "localmix/native/lanes/localmix_lanes.so"


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler or no CMake")
def test_the_wheel_has_the_lane_kernels_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(rf"localmix-{localmix.__version__}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("localmix/native/lanes/")}
    assert found == {LANES}


def test_without_a_compiler_the_wheel_is_pure_and_the_same_otherwise(wheel: Path, tmp_path: Path) -> None:
    result = build(ROOT, tmp_path, "--wheel", CXX=str(tmp_path / "none"))
    assert result.returncode == 0, result.stdout + result.stderr
    name = f"localmix-{localmix.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name) as pure, zipfile.ZipFile(wheel) as compiled:
        assert set(compiled.namelist()) - set(pure.namelist()) <= {LANES}
        assert set(pure.namelist()) <= set(compiled.namelist())


def test_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        presets = archive.read("localmix/quant_presets.yaml")
        scripts = {name: archive.read(f"localmix/vendor/{name}") for name in BUILD_FILES}
    assert presets == (ROOT / "quant_presets.yaml").read_bytes()
    assert scripts == {name: (ROOT / "vendor" / "llama.cpp" / name).read_bytes() for name in BUILD_FILES}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "localmix").rglob("*.py")}
    assert sources <= names
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "localmix" / "data").rglob("*") if path.is_file()}
    assert data <= names
    info = f"localmix-{localmix.__version__}.dist-info/"
    assert f"{info}licenses/LICENSE" in names
    assert f"{info}licenses/localmix/native/lanes/LICENSE.ggml" in names
    assert {name.split("/")[0] for name in names} == {"localmix", info.rstrip("/")}


def test_the_wheel_asks_for_nothing_heavy(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"localmix-{localmix.__version__}.dist-info/METADATA").decode()
    required = [line for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE) if "extra" not in line]
    assert "llama-cpp-python==0.3.36" in required
    names = {re.split(r"[^\w-]", line)[0].lower() for line in required}
    wanted = """aiohttp llama-cpp-python gguf huggingface-hub numpy safetensors sentencepiece rich click
    prompt-toolkit platformdirs psutil pyyaml jinja2 filelock"""
    assert names == set(wanted.split())


def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    result = build(ROOT, tmp_path, "--sdist")
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        for member in files:
            # Tests and the example model need not be unpacked to build.
            parts = Path(member.name).parts
            if member.isreg() and ".." not in parts and (len(parts) == 2 or parts[1] in ("localmix", "vendor")):
                target = tmp_path.joinpath("source", *parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                content = files.extractfile(member)
                assert content
                target.write_bytes(content.read())
    result = build(tmp_path / "source", tmp_path, "--wheel")
    assert result.returncode == 0, result.stdout + result.stderr
    with zipfile.ZipFile(tmp_path / wheel.name) as ours, zipfile.ZipFile(wheel) as expected:
        assert sorted(ours.namelist()) == sorted(expected.namelist())


def test_a_wheel_without_presets_is_not_built(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "localmix", tmp_path / "localmix")
    result = build(tmp_path, tmp_path / "dist", "--wheel")
    assert result.returncode != 0
    assert "'quant_presets.yaml' not found" in result.stdout + result.stderr


def test_the_command_says_its_version(installed: Path, tmp_path: Path) -> None:
    result = run(installed / "localmix", "--version", home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert localmix.__version__ in result.stdout


def test_the_package_is_the_wheels_own(installed: Path, tmp_path: Path) -> None:
    code = "import localmix; from importlib.resources import files\n"
    code += "print(localmix.__file__); print((files('localmix') / 'quant_presets.yaml').is_file())"
    result = run(installed / "python", "-c", code, home=tmp_path)
    place, presets = result.stdout.split()
    assert Path(place).is_relative_to(installed.parent)
    assert presets == "True"


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler or no CMake")
def test_the_lane_kernels_load_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "from localmix.native.lanes import LIBRARY, instruction_sets; print(LIBRARY); print(*instruction_sets())"
    place, names = run(installed / "python", "-c", code, home=tmp_path).stdout.splitlines()
    assert Path(place).is_relative_to(installed.parent)
    assert names.startswith("baseline")


def test_a_plan_from_nothing_but_a_config(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Mixtral-8x7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL_8X7B), encoding="utf-8")
    result = run(installed / "localmix", "plan", folder, "Q4_K_M", "--json", home=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["parameters"] == 46_702_792_704
    (row,) = plan["types"]
    assert row["type"] == "Q4_K_M"
    assert row["bytes"] / 2**30 == pytest.approx(26.49, abs=0.01)
    assert row["bpw"] == pytest.approx(4.87, abs=0.01)


@pytest.mark.upstream
def test_the_installed_package_finds_and_builds_llama_server(
    installed: Path, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built in the checkout is what the package would build, so it does not build it again."""
    result = run(installed / "localmix", "doctor", "--build-server", home=tmp_path)
    assert result.stdout.strip() == str(upstream), result.stderr
    found = json.loads(run(installed / "localmix", "doctor", "--json", home=tmp_path).stdout)
    assert found["server"]["path"] == str(upstream / "llama-server") and found["server"]["rpc"]
    monkeypatch.setenv("LOCALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run(installed / "localmix", "doctor", "--build-server", home=tmp_path)
    assert result.returncode == 3 and "llama-server cannot be built: cmake is not installed." in result.stderr
    result = run(installed / "localmix", "doctor", "--build-server", "--sdist", tmp_path / "none", home=tmp_path)
    assert result.returncode == 3 and "there is no such file" in result.stderr
    found = run(installed / "localmix", "doctor", home=tmp_path)
    assert found.returncode == 0 and "localmix doctor --build-server" in found.stdout
