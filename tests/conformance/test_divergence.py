"""The statistics of `llama-perplexity --kl-divergence`, as far as the 16 bits of its base file go."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmix.measurement.divergence import measure_divergence
from localmix.presets import load_presets
from localmix.quantize import quantize
from tests.conformance import upstream_perplexity
from tests.random_model import write_random_model
from tests.texts import write_text

TINYMIX = Path(__file__).parents[2] / "examples" / "tinymix"

# Log-probabilities lie on a grid of 65536 steps over at most 16: this is how far one can be off.
ROUNDING = 16 / 65535 / 2


@pytest.fixture(scope="module")
def pairs(tinymix_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """A reference, a model and a text by name."""
    folder = tmp_path_factory.mktemp("pairs")
    presets = load_presets()
    types = {kind: folder / f"tinymix-{kind}.gguf" for kind in ("Q4_K_M", "Q2_K")}
    quantize(tinymix_bf16, [(presets.find(kind), path) for kind, path in types.items()], threads=1)
    heldout = TINYMIX / "heldout.txt"
    dense = [write_random_model(folder / f"dense-{seed}.gguf", experts=0, seed=seed) for seed in (1, 2)]
    words = write_text(folder / "text.txt", 12000)
    return {
        **{kind: (tinymix_bf16, path, heldout) for kind, path in types.items()},
        "dense": (dense[0], dense[1], words),
    }


@pytest.mark.upstream
@pytest.mark.parametrize("ctx", [512, 1024])
@pytest.mark.parametrize("name", ["Q4_K_M", "Q2_K", "dense"])
def test_the_statistics(
    upstream: Path, pairs: dict[str, tuple[Path, Path, Path]], tmp_path: Path, name: str, ctx: int
) -> None:
    reference, model, text = pairs[name]
    chunks = 4096 // ctx
    expected = upstream_perplexity.divergence(upstream, reference, model, text, ctx, chunks, tmp_path / "base")
    found = measure_divergence(reference, [model], text, ctx, chunks, threads=1)[0]
    divergence = found.divergence
    assert divergence is not None and found.chunks == chunks

    ppl, error = expected["Mean PPL(Q)"]
    assert found.ppl == pytest.approx(ppl, rel=1e-5)
    assert found.error == pytest.approx(error, rel=1e-4, abs=1e-6)
    delta, delta_error = expected["Mean PPL(Q)-PPL(base)"]
    assert found.delta_ppl == pytest.approx(delta, abs=ROUNDING * found.ppl)
    assert found.delta_error == pytest.approx(delta_error, rel=1e-3, abs=1e-6)
    mean, mean_error = expected["Mean    KLD"]
    assert divergence.mean == pytest.approx(mean, rel=1e-3, abs=ROUNDING / 4)
    assert divergence.error == pytest.approx(mean_error, rel=1e-2, abs=1e-6)
    assert divergence.median == pytest.approx(expected["Median  KLD"][0], rel=1e-3, abs=ROUNDING)
    assert divergence.percentile_99 == pytest.approx(expected["99.0%   KLD"][0], rel=1e-2, abs=ROUNDING)
    assert divergence.maximum == pytest.approx(expected["Maximum KLD"][0], rel=1e-3, abs=ROUNDING)
    share, share_error = expected["Same top p"]
    assert 100 * divergence.same_top == pytest.approx(share, abs=0.1)  # a tie on the grid may be none
    assert 100 * divergence.same_top_error == pytest.approx(share_error, abs=0.01)
