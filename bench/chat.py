"""The chat beside llama-bench: its speed of prompt and reply, and how soon its first token comes.

    python bench/chat.py                             # about ten minutes on 2 cores
    python bench/chat.py --threads 1 --repeat 9

A Mixtral of 1.2 G random weights answers in localmix's chat engine and in llama-bench, in turns; each pair gives a
ratio and the median of the ratios counts, so that a slow moment of the machine hits both. The first token is that of
`localmix chat -p` with TinyMix, from the start of the command. Writes CHAT.md beside this file.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from side_by_side import ROOT, TINYMIX, Pairs, Side, options, side_of

from localmix.conversation.chat import Engine, EngineSettings, Reply
from localmix.sampling import Sampling

PROMPT, REPLY = 256, 48
TYPES = ("Q4_K_M", "Q8_0")
GREEDY = Sampling(temperature=0, repeat_penalty=1)
# no dialogue around the text: so many tokens as were asked for
PLAIN = "{{ messages[-1].content }}"


def speed_rows(side: Side, model: Path) -> list[Pairs]:
    """Tokens per second of prompt and of reply, as the chat's statistics say them."""
    rows = [Pairs(f"{model.stem}, {name}", "llama-bench", "tokens/s") for name in (f"pp{PROMPT}", f"tg{REPLY}")]
    tool = (side.tools / "llama-bench", "-m", model, "-p", PROMPT, "-n", REPLY, "-r", 1, "-t", side.threads)
    settings = EngineSettings(context=1024, threads=side.threads, chat_template=PLAIN)
    with Engine(model, settings) as engine:

        def ask(text: str, limit: int) -> Reply:
            *_, reply = engine.reply([{"role": "user", "content": text}], GREEDY, limit)
            assert isinstance(reply, Reply)
            return reply

        ask("the", 4)  # the file is read now
        for number in range(side.repeat):
            theirs = json.loads(side.run(*tool, "-o", "json")[0])
            rows[0].theirs.append(theirs[0]["avg_ts"])
            rows[1].theirs.append(theirs[1]["avg_ts"])
            # another first letter each time, or the cache would have it
            prompt = ask(chr(97 + number % 26) + " the" * (PROMPT - 2), 1)
            assert abs(prompt.prompt_tokens - PROMPT) <= 3 and prompt.cached_tokens <= 2, prompt
            rows[0].ours.append(prompt.pp_tps or 0)
            rows[1].ours.append(ask(chr(97 + number % 26), REPLY).tg_tps or 0)
    return rows


def first_tokens(side: Side, model: Path) -> list[float]:
    """Seconds from the start of the command to the first letter of the reply."""
    found = []
    command = [sys.executable, "-m", "localmix", "chat", str(model), "-p", "Where is Pausa's house?", "--no-save"]
    for _ in range(side.repeat):
        started = time.monotonic()
        with subprocess.Popen(
            [*command, "--threads", str(side.threads)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            os.read(process.stdout.fileno(), 1)
            found.append(time.monotonic() - started)
            process.communicate()
    return found


def build_models(side: Side) -> tuple[list[Path], Path]:
    """The large model in its types, and TinyMix in Q8_0."""
    sys.path.insert(0, str(ROOT))  # the tests' generator of models
    from gguf import GGMLQuantizationType

    from tests.random_model import write_random_model

    large = [side.folder / f"random-{kind}.gguf" for kind in TYPES]
    if not all(path.exists() for path in large):
        source = side.folder / "random-F16.gguf"
        shape = {"layers": 16, "hidden": 1024, "feed_forward": 2816, "embedding_rows": 32000}
        write_random_model(source, kind=GGMLQuantizationType.F16, **shape)
        for kind, path in zip(TYPES, large, strict=True):
            side.localmix("quantize", kind, source, "-o", path, "--no-imatrix")
        source.unlink()
    small = side.folder / "tinymix-Q8_0.gguf"
    if not small.exists():
        side.localmix("quantize", "Q8_0", TINYMIX, "-o", small, "--no-imatrix")
    return large, small


def report(found: Sequence[Pairs], first: Sequence[float], side: Side) -> str:
    """CHAT.md."""
    lines = [
        "# The chat beside llama-bench",
        "",
        f"A Mixtral of 1.2 G random weights (16 layers, 8 experts), {side.threads} threads, in turns; the median of the"
        " ratios counts, and the middle half of them shows the noise. localmix's figures are those of the chat's"
        " statistics, in its engine's process with the parent listening. `python bench/chat.py` measures it again.",
        "",
        f"Machine: {platform.machine()}, {psutil.cpu_count(logical=False)} cores.",
        "",
        "| work | against | theirs | localmix | ratio | middle half | pairs |",
        "|---|---|--:|--:|--:|---|--:|",
        *(row.line() for row in found),
        "",
        f"First token of `localmix chat -p`, TinyMix: {statistics.median(first):.2f} s after the command was started"
        f" (median of {len(first)}; {min(first):.2f} to {max(first):.2f} s).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write CHAT.md."""
    parser = options(__doc__ or "", "chat", "5 GB", "CHAT.md", repeat=7)
    asked = parser.parse_args()
    side = side_of(asked)
    large, small = build_models(side)
    found = [row for model in large for row in speed_rows(side, model)]
    text = report(found, first_tokens(side, small), side)
    print(text)
    asked.results.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
