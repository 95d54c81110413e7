"""Entry point of the command line, and the only error boundary: what a run ends with, and its exit code.

Our own errors and click's usage errors become a sentence and a next step on stderr. With `--json` the same
is also written to stdout as `{"error": {"message", "hint", "exit_code"}}`, so that a program that asked for
JSON gets one document in every case. Everything else is a bug: it keeps its traceback and ends with 70.
"""

from __future__ import annotations

# Little, and nothing slow: Ctrl-C is a traceback of Python's until `main` runs.
import errno
import io
import os
import sys

from localmix.cli.signals import ignore_signals, raise_on_signals
from localmix.errors import CapacityError, FileError, Interrupted, LocalmixError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BUG = 70

_DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EIO,
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; `arguments` are those after the program's name."""
    words: list[str] = []
    try:
        raise_on_signals()
        words += sys.argv[1:] if arguments is None else arguments
        _prepare_streams()
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _report(Interrupted("Stopped."), words)
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing is wrong, and there is nobody to tell.
        _drop_output()
        return 0
    except LocalmixError as error:
        return _report(error, words)
    except OSError as error:
        told = _file_system_error(error)
        return _report(told, words) if told else _report_bug()
    except MemoryError:
        return _report(CapacityError("There is not enough memory left to go on."), words)
    except Exception:
        return _report_bug()


def _run(words: list[str]) -> int:
    import click

    from localmix.cli.main import COMPLETION_VARIABLE, group

    if COMPLETION_VARIABLE in os.environ:
        try:
            group.main(args=words, prog_name="localmix", complete_var=COMPLETION_VARIABLE)
        except (LocalmixError, OSError):
            return 0  # somebody is typing: a message would land in the middle of the line
    try:
        # Not `group.main`: it turns Ctrl-C and broken pipes into exit code 1 before we see them.
        with group.make_context("localmix", words) as context:
            code = group.invoke(context)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "localmix"
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            return UsageError.exit_code
        raise UsageError(error.format_message(), f"See `{command} --help`.") from error
    except click.ClickException as error:
        raise UsageError(error.format_message()) from error


def _file_system_error(error: OSError) -> LocalmixError | None:
    """The error as a sentence when it is the file system's doing and names the file; else None: a bug."""
    if error.errno in _DISK_FULL:
        where = f" for {error.filename}" if error.filename else ""
        return CapacityError(f"The disk is full: there is no room{where}.", "Free some space and run it again.")
    if error.errno in _REFUSED and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
        return FileError(f"{name}: {(error.strerror or 'refused').lower()}.")
    return None


def _report(error: LocalmixError, words: Sequence[str]) -> int:
    ignore_signals()
    from localmix.cli.console import Console

    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        Console(as_json).error(error)
        sys.stdout.flush()
    except OSError:
        _drop_output()  # stdout is full or gone; stderr has been told first
    if {"-v", "--verbose"} & set(words[:1]):
        import traceback

        traceback.print_exception(error)
    return error.exit_code


def _drop_output() -> None:
    """Let what stdout still holds go nowhere: at the exit Python would fail over it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug() -> int:
    import traceback

    traceback.print_exc()
    print("This is a bug in localmix. Please report it with the lines above.", file=sys.stderr)
    return BUG


def _prepare_streams() -> None:
    """Stand-ins for streams that the parent closed, and no traceback from a terminal without UTF-8."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # else the next file that is opened takes the number, and a child writes its messages into it
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor <= number:
                os.set_inheritable(descriptor, True)
            else:
                os.close(descriptor)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # '?' instead


if __name__ == "__main__":
    sys.exit(main())
