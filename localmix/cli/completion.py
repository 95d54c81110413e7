"""`localmix completion`: the script that makes a shell ask `localmix` how to go on."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from localmix.cli.console import Console
from localmix.cli.parameters import examples, json_option


class ColonBashComplete(BashComplete):
    """Bash splits words at colons, and would hand us `tinymix:Q4_K_M` in three pieces.

    So the words come from the line itself, and what stands before the last colon is taken off the answers.
    """

    source_template = r"""
%(complete_func)s() {
    local IFS=$'\n' response completion type value words current before=
    local line="${COMP_LINE:0:COMP_POINT}"
    IFS=$' \t\n' read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current="${words[${#words[@]}-1]}"
    [[ $COMP_WORDBREAKS == *:* && $current == *:* ]] && before="${current%%:*}:"
    response=$(env COMP_WORDS="$line" COMP_CWORD=$((${#words[@]} - 1)) %(complete_var)s=bash_complete "$1")
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) COMPREPLY=(); compopt -o dirnames ;;
            file) COMPREPLY=(); compopt -o default ;;
            plain) COMPREPLY+=("${value#"$before"}") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    @staticmethod
    def _check_version() -> None:
        """Do not run bash to ask for its version: the script is for a shell that is there."""


SHELLS: dict[str, type[ShellComplete]] = {
    "bash": ColonBashComplete,
    "zsh": ZshComplete,
    "fish": FishComplete,
}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
@json_option
@examples(
    'bash:  eval "$(localmix completion bash)"            in ~/.bashrc',
    'zsh:   eval "$(localmix completion zsh)"             in ~/.zshrc',
    "fish:  localmix completion fish | source             in ~/.config/fish/config.fish",
)
def command(shell: str, json: bool) -> None:
    """Print the completion script for a shell; it completes commands, models and types."""
    from localmix.cli.main import COMPLETION_VARIABLE, group

    console = Console(json)
    script = SHELLS[shell](group, {}, "localmix", COMPLETION_VARIABLE).source()
    console.result({"shell": shell, "script": script}, lambda: console.raw(script))
