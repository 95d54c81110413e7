"""`localmix doctor`: see `localmix.diagnosis`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from localmix.cli.console import Console
from localmix.cli.parameters import FILE, examples, json_option

if TYPE_CHECKING:
    from localmix.serving.server_binary import ServerBinary


@click.command()
@click.option("--build-server", is_flag=True, help="Build llama.cpp's tools, llama-server among them, if need be.")
@click.option(
    "--backend", type=click.Choice(["cpu", "cuda", "metal", "vulkan"]), help="With --build-server: what to build for."
)
@click.option("--sdist", type=FILE, metavar="FILE", help="With --build-server: a copy of the source archive.")
@click.option("--rebuild", is_flag=True, help="With --build-server: build again what is there.")
@json_option
@examples("localmix doctor", "localmix doctor --build-server", "localmix doctor --build-server --backend cuda")
def command(build_server: bool, backend: str | None, sdist: Path | None, rebuild: bool, json: bool) -> int:
    """Check the installation: engine, devices, memory, tools, and the command that mends what is missing.

    Ends with 3 when something is missing that a command needs.
    """
    from localmix.diagnosis import diagnose
    from localmix.errors import InputError, UsageError
    from localmix.sizes import size

    console = Console(json)
    if build_server:
        from localmix.serving.server_binary import build_tools

        folder = build_tools(backend, sdist, rebuild)
        console.result({"tools": folder}, lambda: console.line(str(folder)))
        return 0
    for option, value in (("--backend", backend), ("--sdist", sdist), ("--rebuild", rebuild)):
        if value:
            raise UsageError(f"{option} needs --build-server.")
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
                "llama-server": _describe(found.server),
                "llama.cpp's tools": str(found.tools or "not built; tests and benchmarks use them"),
            }
        )
        console.line()
        for problem in found.problems:
            console.line(f"✗ {problem.what}", "red")
            console.line(f"  {problem.command}")
        if not found.problems:
            console.line("✓ Everything is there." if found.server else "✓ All else is there.", "green")

    console.result(found, draw)
    return InputError.exit_code if found.problems else 0


def _describe(server: ServerBinary | None) -> str:
    """The row about the program of `localmix serve` and its abilities."""
    if server is None:
        return "not here (localmix doctor --build-server); serve and worker need it"
    if not server.built:
        return f"{server.path}, of this system"
    page = "with its chat page" if server.web_page else "without a chat page: there was no npm"
    return f"{server.path}, {page}, {'for several machines too' if server.rpc else 'for one machine'}"
