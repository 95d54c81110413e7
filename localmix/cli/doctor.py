"""`localmix doctor`: see `localmix.diagnosis`."""

from __future__ import annotations

import click

from localmix.cli.console import Console
from localmix.cli.parameters import examples, json_option


@click.command()
@json_option
@examples("localmix doctor")
def command(json: bool) -> int:
    """Check the installation: engine, devices, memory, tools, and the command that mends what is missing.

    Ends with 3 when something is missing that a command needs.
    """
    from localmix.diagnosis import diagnose
    from localmix.errors import InputError
    from localmix.presentation.table import size

    console = Console(json)
    found = diagnose()

    def draw() -> None:
        console.fields(
            {
                "localmix": f"{found.version}, Python {found.python}, {found.system}",
                **{name: version or "missing" for name, version in found.packages.items()},
                **{
                    f"device {device.name}": device.description
                    + (f", {size(device.free)} of {size(device.total)} free" if device.total else "")
                    for device in found.devices
                },
                "kernels": found.kernels.description if found.kernels else "missing",
                "cores": f"{found.physical_cores} physical, {found.usable_cores} usable",
                "memory": f"{size(found.available.bytes)} of {size(found.memory)} available,"
                f" limited by {found.available.limit}",
                "library": f"{found.library}, {found.models} model{'s' * (found.models != 1)},"
                f" {size(found.disk)} free on its disk",
                "llama.cpp's tools": str(found.tools or "not built (make vendor); tests and benchmarks use them"),
            }
        )
        console.line()
        for problem in found.problems:
            console.line(f"✗ {problem.what}", "red")
            console.line(f"  {problem.command}")
        if not found.problems:
            console.line("✓ Everything is there.", "green")

    console.result(found, draw)
    return InputError.exit_code if found.problems else 0
