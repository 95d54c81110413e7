"""`localmix merge`: see `localmix.merge`."""

from __future__ import annotations

from pathlib import Path

import click

from localmix.cli.console import BYTES, Console
from localmix.cli.parameters import FILE, MODEL, examples, json_option, lora_option, threads_option


@click.command()
@click.argument("model", metavar="BASE", type=MODEL)
@lora_option
@click.option("-o", "--output", type=FILE, metavar="DIR", required=True, help="The folder to make.")
@threads_option
@json_option
@examples(
    "localmix merge ~/models/Mixtral-8x7B-v0.1 --lora ~/chinese-mixtral-lora -o ~/models/chinese-mixtral",
    "localmix merge examples/tinymix --lora ~/adapters/style=0.5 --lora ~/adapters/facts -o tinymix-tuned",
)
def command(model: str, loras: tuple[str, ...], output: Path, threads: int | None, json: bool) -> None:
    """Write a checkpoint with LoRA adapters merged into it.

    BASE is a checkpoint folder. The new one has the same shards and types, and PEFT is not needed. An adapter that
    holds embeddings of its own brings its tokenizer.

    To make a GGUF file or a quantized one no merged checkpoint is needed: `localmix convert` and `localmix quantize`
    take --lora too.
    """
    from localmix import library
    from localmix.errors import UsageError
    from localmix.merge import merge
    from localmix.sizes import size
    from localmix.sources.adapter import parse_lora

    console = Console(json)
    if not loras:
        raise UsageError("No adapter was named.", "Name one with --lora DIR.")
    base = library.resolve(model, library.Purpose.CHECKPOINT)
    with console.progress(BYTES) as progress:
        merged = merge(base, [parse_lora(lora) for lora in loras], output, threads=threads, progress=progress)
    for note in merged.notes:
        console.note(note)
    console.result(
        merged,
        lambda: console.fields(
            {
                "folder": str(merged.path),
                "model": f"{merged.merged} of {merged.tensors} tensors are merged",
                "size": f"{size(merged.bytes)} in {merged.shards} {'shard' if merged.shards == 1 else 'shards'}"
                f", {merged.seconds:.1f} s",
            }
        ),
    )
