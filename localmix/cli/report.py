"""`localmix report`: see `report`, `plots` and `result_document` in `localmix.presentation`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from localmix.cli.console import Console
from localmix.cli.parameters import FILE, examples, json_option


@click.command()
@click.argument("result", metavar="RESULT", type=FILE)
@click.option("--html", type=FILE, help="Write a page with the table and the plots.")
@click.option("--plot", type=FILE, help="Write the plots as FILE.png or FILE.svg.")
@click.option("--title", metavar="TEXT", help="A title of your own.")
@json_option
@examples(
    "localmix ppl --set chinese-mixtral --corpus heldout.txt --json > result.json",
    "localmix report result.json --html report.html --plot report.svg",
)
def command(result: Path, html: Path | None, plot: Path | None, title: str | None, json: bool) -> None:
    """Make a page or plots from RESULT, a file that `ppl --json` wrote, without measuring again."""
    from localmix.errors import UsageError
    from localmix.output import check_outputs
    from localmix.presentation import plots
    from localmix.presentation.report import write_html
    from localmix.presentation.result_document import read_result

    console = Console(json)
    outputs = [path for path in (html, plot) if path is not None]
    if not outputs:
        raise UsageError("There is nothing to write.", "Name a page with --html FILE or a picture with --plot FILE.")
    check_outputs([(path, 0) for path in outputs], [result])
    if plot is not None:
        plots.check(plot)
    report = read_result(result)
    if title is not None:
        report = replace(report, title=title)
    if html is not None:
        write_html(html, report)
    if plot is not None:
        plots.write_plot(plot, report)

    def draw() -> None:
        for path in outputs:
            console.line(f"Wrote {path}")

    console.result({"html": html, "plot": plot}, draw)
