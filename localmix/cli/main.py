"""The `localmix` command: a table of commands, each imported only when it is called.

A command named `convert` lives in `localmix.cli.convert` as `command`. Adding one is a row here and a module.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import click

from localmix import __version__

COMPLETION_VARIABLE = "_LOCALMIX_COMPLETE"

# name: what `localmix --help` says about it, in the order of the work
COMMANDS: Mapping[str, str] = {
    "pull": "Fetch a model of the Hugging Face hub, and check it.",
    "convert": "Make a GGUF file from a checkpoint folder.",
    "merge": "Write a checkpoint with LoRA adapters merged into it.",
    "plan": "Show size, bits per weight and memory need of each type, before anything is written.",
    "fit": "Show which types of a model fit into memory, with which context.",
    "imatrix": "Measure which weights matter, on a calibration text.",
    "sensitivity": "Measure which classes of tensors a model needs most precise.",
    "quantize": "Make smaller models: one type, several, or a whole table.",
    "ppl": "Measure perplexity, and print the quantization table.",
    "compare": "Compare two models: size, perplexity, divergence, and a verdict.",
    "report": "Make a page or plots from what ppl measured.",
    "bench": "Measure how fast models read prompts and generate.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve models to programs and browsers: an OpenAI-compatible API, and a chat page.",
    "worker": "Lend this machine to a model that another machine runs.",
    "export": "Write a Modelfile, with which Ollama runs a model.",
    "verify": "Check that files are whole, the right ones, and hold numbers only.",
    "info": "Show what a GGUF file or a checkpoint holds.",
    "ls": "List the models of the library.",
    "rm": "Delete a model, or one file of it, from the library.",
    "doctor": "Check the installation: engine, devices, memory, tools.",
    "completion": "Print the shell completion script for bash, zsh or fish.",
}


class CommandTable(click.Group):
    """A click group whose commands are rows of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"localmix.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            meant = f" Did you mean `{near[0]}`?" if near else ""
            ctx.fail(f"There is no command {name!r}.{meant}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        # click's own would import every command to read its help
        names = [CompletionItem(name, help=about) for name, about in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.command(
    cls=CommandTable,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Models are given as a path, as a library name (tinymix, tinymix:Q4_K_M), or not at all: "
    "then it is the model used last.",
)
@click.version_option(__version__, message="localmix %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback behind an error sentence.")
def group(verbose: bool) -> None:
    """The best quantized model this laptop can run, with the numbers that prove it.

    \b
    localmix convert examples/tinymix        checkpoint -> GGUF
    localmix quantize Q4_K                   GGUF -> a quarter of the size
    localmix ppl --corpus heldout.txt        what it cost in quality
    localmix chat                            talk to it
    """  # noqa: D301 (click takes the backspace for "do not wrap", so it must be one)
