"""The real command line as a subprocess, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """A finished run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class CommandLine:
    """Runs `localmix` with a library of its own.

    Attributes:
        home: LOCALMIX_HOME.
        folder: where the commands run.
    """

    home: Path
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "LOCALMIX_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **self.variables,
        }

    def popen(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a run; the caller ends it."""
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "encoding": "utf-8",
            "cwd": self.folder,
            "env": self.environment,
        }
        return subprocess.Popen([sys.executable, "-m", "localmix", *map(str, arguments)], **settings | options)

    def __call__(self, *arguments: str | Path, expect: int = 0, stdin: str | None = None, **options: Any) -> Run:
        """Run to the end; anything but the expected exit code fails the test, and so does a traceback."""
        if stdin is not None:
            options["stdin"] = subprocess.PIPE
        process = self.popen(*arguments, **options)
        out, err = process.communicate(stdin, timeout=120)
        assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return Run(process.returncode, out, err)

    def fails(self, *arguments: str | Path, expect: int, **options: Any) -> str:
        """Run what must fail with this code, and nothing on stdout; the sentence that it says."""
        run = self(*arguments, expect=expect, **options)
        assert run.out == ""
        assert run.err.startswith("Error: ")
        return run.err
