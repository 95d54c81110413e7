"""What `llama-perplexity` says: its final estimate, and its statistics of a divergence."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

NUMBER = r"(-?[0-9.]+)"


def run(tools: Path, wanted: str, *options: str | Path | int) -> str:
    """The output of a run; again when it ended before its log had written what is wanted."""
    command = [tools / "llama-perplexity", "-t", 1, *options]
    for _ in range(5):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        if re.search(wanted, done.stdout + done.stderr):
            return done.stdout + done.stderr
    raise AssertionError(done.stderr)


def perplexity(tools: Path, model: Path, text: Path, ctx: int, chunks: int, *more: str) -> tuple[float, float]:
    """The perplexity and its standard error; `more` options go to the tool."""
    estimate = rf"Final estimate: PPL = {NUMBER} \+/- {NUMBER}"
    output = run(tools, estimate, "-m", model, "-f", text, "-c", ctx, "--chunks", chunks, *more)
    match = re.search(estimate, output)
    assert match is not None
    return float(match[1]), float(match[2])


def divergence(
    tools: Path, reference: Path, model: Path, text: Path, ctx: int, chunks: int, base: Path
) -> dict[str, tuple[float, float]]:
    """Its statistics by name, each with its standard error, 0 where it has none.

    Args:
        base: file for what the reference predicts.
    """
    file = ("-f", text, "-c", ctx, "--chunks", chunks, "--kl-divergence-base", base)
    run(tools, "Final estimate", "-m", reference, *file)
    output = run(tools, "Same top p: ", "-m", model, *file, "--kl-divergence")
    found = {}
    for line in output.splitlines():
        match = re.match(rf"(.+?) *: *{NUMBER}(?: ± *{NUMBER})?", line)
        if match:
            found[match[1]] = float(match[2]), float(match[3] or 0)
    return found
