"""The Hugging Face hub: what a repository holds, and ranges of its files.

Names, sizes and checksums come from huggingface-hub, so that its own variables (HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, proxies) mean here what they mean everywhere. What the hub says is not believed: names of files that
would lead out of a folder are refused, and answers are compared with what was asked for.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from localmix import __version__
from localmix.errors import InputError, NetworkError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

# `org/name`, and `org/name:TYPE` for one of its GGUF files
_SPEC = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?::(?P<kind>[\w.-]+))?")

# A name of a file in a repository: folders with plain names, no drive, no device, nothing hidden.
_UNSAFE = r"/\\:*?\"<>|\x00-\x1f\x7f"
_PART = rf"[^.{_UNSAFE}][^{_UNSAFE}]*"
_FILE_NAME = re.compile(rf"(?:{_PART}/)*{_PART}")
_OF_WINDOWS = re.compile(r"(?:^|/)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.[^/]*)?(?:/|$)|[. ](?:/|$)", re.IGNORECASE)
# A file system takes 255 bytes, and `download` puts `.part.json.new` behind a name.
_LONGEST_PART = 200

# What a checkpoint needs, of the files at the top of a repository.
_OF_A_CHECKPOINT = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "README.md")
_BESIDE_A_CHECKPOINT = ("additional_chat_templates/*.jinja",)
_SECOND_COPIES = ("consolidated*", "optimizer*", "*.fp16.*", "*.fp32.*")

# What llama.cpp's converter called every model.
_NO_MODEL = ("ggml-model", "model")

# Seconds: until the first byte of an answer, and of silence in the middle of one.
TIMEOUT = 15.0
# A request that fails is made again after so many seconds, then after twice as many, and so on.
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
ATTEMPTS = 8
# Failures of a request that the next one has, too; by name, for huggingface-hub's client is httpx or its successor.
_FOR_GOOD = ("TooManyRedirects", "UnsupportedProtocol")
# Longer than this a server's Retry-After is told instead of waited for.
LONGEST_RETRY_AFTER = 600.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: with the folders in it, separated by `/`.
        sha256: in hex; empty for a small file, which git itself keeps.
        blob: git's own checksum of a small file, in hex.
    """

    name: str
    bytes: int
    sha256: str
    blob: str

    @property
    def checksum(self) -> str:
        """What identifies the content."""
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def model(self) -> str:
        """Its name without the organisation."""
        return self.name.rpartition("/")[2]


def parse_name(text: str) -> tuple[str, str] | None:
    """`org/name` or `org/name:TYPE` as the name and the type, which may be empty; None when it is no such name."""
    match = _SPEC.fullmatch(text)
    return (match["name"], match["kind"] or "") if match else None


def look_up(name: str, revision: str | None = None) -> Repository:
    """What a repository holds.

    Args:
        name: `org/name`.
        revision: a branch, tag or commit; `main` without it.

    Raises:
        NetworkError: the hub cannot be reached, or does not give it: unknown, private, gated.
        InputError: it holds a file whose name would lead elsewhere.
        UsageError: the name is none.
    """
    _check_endpoint()
    from huggingface_hub import HfApi, constants, errors

    # its telemetry is a request of its own, which can fail, and leaves a file that later runs trip over
    constants.HF_HUB_DISABLE_TELEMETRY = True
    if not _SPEC.fullmatch(name) or ":" in name:
        raise UsageError(f"{name!r} is no name of a repository.", "Such as mistralai/Mixtral-8x7B-v0.1.")
    api = HfApi(endpoint=constants.ENDPOINT, library_name="localmix", library_version=__version__)
    patience = Patience(name, Stop())
    while True:
        try:
            info = api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
            break
        except errors.HfHubHTTPError as error:
            if not _is_passing(error.response.status_code):
                raise _refusal(error, name, revision) from error
            patience.wait(_status_reason(error.response), _retry_after(error.response.headers))
        except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's base class
            # nothing has come yet: most likely there is no network, so it is said at once
            raise _unreachable(name, error) from error
        except UnicodeEncodeError as error:
            raise UsageError("HF_TOKEN holds a character that no token has.", "Copy it again.") from error
        except errors.HFValidationError as error:
            raise UsageError(f"{name!r} is no name of a repository.", "Such as mistralai/Mixtral-8x7B-v0.1.") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise NetworkError(f"The hub's answer about {name} cannot be understood.", _MIRROR) from error
    files = []
    for entry in info.siblings or ():
        lfs = entry.lfs
        size = lfs.size if lfs is not None else entry.size
        sha256, blob = (lfs.sha256 if lfs is not None else ""), entry.blob_id or ""
        if (
            not isinstance(entry.rfilename, str)
            or type(size) is not int
            or size < 0
            or not _is_checksum(sha256, 64)
            or not _is_checksum(blob, 40)
            or not (sha256 or (blob and lfs is None))
        ):
            raise NetworkError(f"The hub does not say what {entry.rfilename!r} of {name} is.", _MIRROR)
        files.append(HubFile(entry.rfilename, size, sha256, blob))
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{7,64}", info.sha):
        raise NetworkError(f"The hub does not say which commit of {name} it means.", _MIRROR)
    return Repository(name, info.sha, tuple(files))


def _is_checksum(text: object, digits: int) -> bool:
    """Whether it is so many digits in hex, or none."""
    return isinstance(text, str) and re.fullmatch(rf"(?:[0-9a-f]{{{digits}}})?", text) is not None


def _check_endpoint() -> None:
    """Check HF_ENDPOINT before huggingface-hub is imported, which fails on an address that is none."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        parts = urllib.parse.urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if endpoint and not usable:
        raise UsageError(f"HF_ENDPOINT is {endpoint!r}, no address.", "Such as https://huggingface.co, or unset it.")


_MIRROR = "If HF_ENDPOINT names a mirror, try the hub itself."


def select(repository: Repository, include: Sequence[str] = (), kind: str = "") -> list[HubFile]:
    """The files that are meant.

    Args:
        include: patterns such as `*.gguf`, searched in the whole name; `*` stands for folders too.
        kind: a type such as `Q4_K_M`: the GGUF files whose name tells it.

    Without either it is the checkpoint, or the only GGUF file where there is none.

    Raises:
        InputError: a name that leads out of the folder, weights that only Python's pickle reads, or a GGUF file of
            which the repository lacks parts or pieces.
        UsageError: nothing matches, or the repository has several GGUF files and none was named.
    """
    files = [file for file in repository.files if not _is_hidden(file.name)]
    ggufs = [file for file in files if is_gguf(file.name)]
    if kind:
        # Q4_K means Q4_K_M, as everywhere
        for wanted in (kind.upper(), f"{kind.upper()}_M"):
            chosen = [file for file in ggufs if gguf_type(file.name).upper() == wanted]
            if chosen:
                return _checked_whole(repository, chosen)
        raise UsageError(f"{repository.name} has no GGUF file of type {kind}.", _types_there(repository, ggufs))
    if include:
        chosen = [file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in include)]
        if not chosen:
            some = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
            raise UsageError(f"No file of {repository.name} matches {', '.join(include)}.", f"It has {some}.")
        return _checked(repository, chosen)
    chosen = [file for file in files if _is_of_checkpoint(file.name)]
    weights = [file for file in chosen if file.name.endswith(".safetensors")]
    if not weights and ggufs:
        if len({gguf_type(file.name) for file in ggufs}) > 1:
            raise UsageError(f"{repository.name} has several GGUF files.", _types_there(repository, ggufs))
        return _checked_whole(repository, ggufs)
    if not weights:
        pickled = [file.name for file in files if file.name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickled:
            raise InputError(
                f"{repository.name} holds its weights only as {pickled[0]}: reading pickled files can run whatever"
                " code they contain, so they are refused.",
                "Take a revision with .safetensors files.",
            )
        if not any(file.name == "config.json" for file in chosen):
            raise InputError(f"{repository.name} holds no model: neither safetensors nor GGUF files.", "")
    return _checked(repository, chosen)


def gguf_type(name: str) -> str:
    """The type that the name of a GGUF file tells, as the library reads it; its stem when it tells none."""
    from localmix.library import split_file_name

    model, kind = split_file_name(_whole(name))
    return kind or model


def gguf_model(repository: Repository, name: str) -> str:
    """The model that a GGUF file of a repository is one of, as the library calls it."""
    from localmix.library import clean_name, split_file_name

    model, kind = split_file_name(_whole(name))
    if not kind or model.lower() in _NO_MODEL:
        model = re.sub(r"[-.]gguf$", "", repository.model, flags=re.IGNORECASE)
    return clean_name(model)


def is_gguf(name: str) -> bool:
    """Whether a file is a GGUF file, or a piece of one that was cut."""
    return _whole(name).lower().endswith(".gguf")


def is_piece(name: str) -> bool:
    """Whether a file is a piece of a GGUF file that was cut, which nothing loads."""
    return _whole(name) != name.rpartition("/")[2]


def whole_file(name: str) -> str:
    """The name, with its folders, of the GGUF file that a file is, or is a part or a piece of."""
    from localmix.library import part_suffix

    folder, slash, _ = name.rpartition("/")
    whole = _whole(name)
    return f"{folder}{slash}{whole.replace(part_suffix(whole), '')}"


def _whole(name: str) -> str:
    from localmix.sources.joined import whole_name

    return whole_name(name.rpartition("/")[2])


def _is_hidden(name: str) -> bool:
    return any(re.match(r"\.[^.\\]", part) for part in name.split("/"))


def _is_of_checkpoint(name: str) -> bool:
    if "/" in name:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in _BESIDE_A_CHECKPOINT)
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in _OF_A_CHECKPOINT)
    return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _SECOND_COPIES)


def _types_there(repository: Repository, ggufs: Sequence[HubFile]) -> str:
    from localmix.sizes import size

    sizes: dict[str, int] = {}
    for file in ggufs:
        kind = gguf_type(file.name)
        sizes[kind] = sizes.get(kind, 0) + file.bytes
    if not sizes:
        return "It has no GGUF file at all."
    listed = ", ".join(f"{kind} ({size(taken)})" for kind, taken in sizes.items())
    for kind in sizes:
        if parse_name(f"{repository.name}:{kind}"):
            return f"Name one, such as {repository.name}:{kind}. It has {listed}."
    return f"Choose one with --include. It has {listed}."


def _checked_whole(repository: Repository, ggufs: Sequence[HubFile]) -> list[HubFile]:
    """As `_checked`; that a part or a piece is missing is told before the others come."""
    from localmix.sources.documents import listed

    checked = _checked(repository, ggufs)
    by_file: dict[str, list[str]] = {}
    for file in checked:
        by_file.setdefault(whole_file(file.name), []).append(file.name)
    for whole, names in by_file.items():
        if missing := _missing(names):
            raise InputError(
                f"{repository.name} holds only a part of {whole}; it lacks {listed(missing)}.",
                "Take it from another repository, or fetch what is there with --include.",
            )
    return checked


def _missing(names: Sequence[str]) -> list[str]:
    """The parts or pieces, without folders, that one GGUF file's lack; `names` are those that are there."""
    from localmix.library import part_suffix
    from localmix.sources.joined import sort_pieces

    here = {name.rpartition("/")[2] for name in names}
    first = min(here)
    if part := part_suffix(first):
        count = part[-5:]
        every = (first.replace(part, f"-{number:05d}-of-{count}") for number in range(1, int(count) + 1))
        return [name for name in every if name not in here]
    return sort_pieces(first, here)[1] if is_piece(first) else []


def _checked(repository: Repository, files: Sequence[HubFile]) -> list[HubFile]:
    """The files, when every name is one inside a folder, on every system."""
    seen: set[str] = set()
    folders = {parent.lower() for file in files for parent in _parents(file.name)}
    for file in files:
        if not _is_plain(file.name) or file.name.lower() in seen | folders:
            raise InputError(
                f"{repository.name} holds a file {file.name[:80]!r}, which is no name that a file may have here.",
                "Nothing was fetched; take the model from a source that you trust.",
            )
        seen.add(file.name.lower())
    return list(files)


def _is_plain(name: str) -> bool:
    return (
        _FILE_NAME.fullmatch(name) is not None
        and _OF_WINDOWS.search(name) is None
        and all(len(part.encode(errors="replace")) <= _LONGEST_PART for part in name.split("/"))
    )


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


class Patience:
    """How long a request that fails is made again: waits grow, and start over when something came.

    Args:
        what: the thing that is asked for, for messages.
        stop: set from another thread to end a wait.
    """

    def __init__(self, what: str, stop: Stop) -> None:
        self._what = what
        self._stop = stop
        self._failures = 0

    def encourage(self) -> None:
        """Something came: the next failure is a first one again."""
        self._failures = 0

    def wait(self, reason: str, seconds: float | None = None) -> None:
        """Wait before the next try.

        Args:
            reason: what went wrong, to end a sentence with.
            seconds: what the server asks for.

        Raises:
            NetworkError: it failed too often, or the server asks for too long a wait.
            Stopped: another thread ended the run.
        """
        self._failures += 1
        again = "The same command goes on where this one stopped."
        if seconds is not None and seconds > LONGEST_RETRY_AFTER:
            raise NetworkError(f"The hub asks to wait {seconds / 60:.0f} minutes before {self._what} comes.", again)
        if self._failures >= ATTEMPTS:
            raise NetworkError(f"{self._what} does not come, after {self._failures} tries: {reason}.", again)
        pause = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self._failures - 1))
        if self._stop.wait(max(pause, seconds or 0)):
            raise Stopped


class Stop(threading.Event):
    """Ends a run from another thread: waits are over, and connections are cut, which may be silent for long."""

    def __init__(self) -> None:
        super().__init__()
        self._sockets: set[socket.socket] = set()
        self._changing = threading.Lock()

    def set(self) -> None:
        super().set()
        with self._changing:
            for connected in self._sockets:
                _cut(connected)

    @contextmanager
    def cutting(self, response: Any) -> Iterator[None]:
        """Cut the connection of an answer when it is set in the meantime."""
        connected = response.extensions["network_stream"].get_extra_info("socket")
        with self._changing:
            self._sockets.add(connected)
            if self.is_set():
                _cut(connected)
        try:
            yield
        finally:
            with self._changing:
                self._sockets.discard(connected)


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed
        # past TLS, whose goodbye would wait
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


class Stopped(Exception):
    """Another thread ended the run; nobody is told."""


class Passing(Exception):
    """A failure that may pass: a dropped connection, a busy server.

    Args:
        reason: to end a sentence with.
        seconds: what the server asks to wait, or None.
    """

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.seconds = seconds


@dataclass(frozen=True)
class Answer:
    """The bytes of a file from some offset on.

    Attributes:
        start: the offset; 0 when the server sends the whole file although a part was asked for.
        validator: a strong ETag of the answering server, or empty.
        blocks: the bytes as they come; raises `Passing` when the connection breaks.
    """

    start: int
    validator: str
    blocks: Iterator[bytes]


@contextmanager
def open_range(
    repository: Repository, file: HubFile, ended: Stop, start: int = 0, stop: int | None = None, validator: str = ""
) -> Iterator[Answer]:
    """Ask for the bytes `[start:stop)` of a file; one request, redirects included.

    Args:
        ended: set from another thread to cut the connection.
        validator: what an earlier `Answer` had; a file that is another one by now comes whole.

    Raises:
        Passing: try again.
        NetworkError: the hub refuses.
    """
    from huggingface_hub import constants, errors, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # documented there

    url = hf_hub_url(repository.name, file.name, revision=repository.commit, endpoint=constants.ENDPOINT)
    headers = build_hf_headers(library_name="localmix", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # compressed bytes have no offsets
    partly = start > 0 or stop is not None
    if partly:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if validator:
            headers["If-Range"] = validator
    try:
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            code = response.status_code
            if _is_passing(code):
                raise Passing(_status_reason(response), _retry_after(response.headers))
            if code == 416:
                raise NetworkError(f"{file.name} of {repository.name} is shorter than the hub says.", _MIRROR)
            if code >= 400:
                response.read()
                raise _refusal_of_file(code, response.headers, file, repository)
            came = start if code == 206 and _begins_at(response.headers, start, file.bytes) else 0
            if code == 206 and start and not came:
                raise NetworkError(f"The server sends another part of {file.name} than it was asked for.", _MIRROR)
            etag = response.headers.get("etag", "")
            with ended.cutting(response):
                yield Answer(came, "" if etag.startswith("W/") else etag, response.iter_raw())
    except errors.OfflineModeIsEnabled as error:
        raise _unreachable(file.name, error) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        if type(error).__name__ in _FOR_GOOD:
            raise NetworkError(f"The hub leads nowhere for {file.name}: {_reason(error)}.", _MIRROR) from error
        raise Passing(_reason(error)) from error


def _begins_at(headers: Mapping[str, str], start: int, size: int) -> bool:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", ""))
    return match is not None and int(match[1]) == start and match[2] in ("*", str(size))


def read_range(repository: Repository, file: HubFile, start: int, stop: int, ended: Stop) -> bytes:
    """The bytes `[start:stop)` of a file, in memory.

    Args:
        ended: set from another thread to end a wait.

    Raises:
        NetworkError: they do not come.
        Stopped: `ended` was set.
    """
    patience = Patience(file.name, ended)
    found = b""
    while len(found) < stop - start:
        try:
            with open_range(repository, file, ended, start + len(found), stop) as answer:
                if answer.start != start + len(found):  # the whole file: what is before it is passed over
                    found = _passing_over(answer, start, stop)
                else:
                    found += _at_most(answer.blocks, stop - start - len(found))
            if len(found) < stop - start:
                patience.wait("the connection is closed early")
        except Passing as error:
            patience.wait(error.reason, error.seconds)
    return found


def _at_most(blocks: Iterator[bytes], count: int) -> bytes:
    parts: list[bytes] = []
    for block in blocks:
        parts.append(block[:count])
        count -= len(parts[-1])
        if not count:
            break
    return b"".join(parts)


def _passing_over(answer: Answer, start: int, stop: int) -> bytes:
    skipped = 0
    kept = bytearray()
    for block in answer.blocks:
        kept += block[max(0, start - skipped) : max(0, stop - skipped)]
        skipped += len(block)
        if skipped >= stop:
            break
    return bytes(kept)


def _is_passing(code: int) -> bool:
    return code in (408, 429) or code >= 500


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        import email.utils
        import time

        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _status_reason(response: Any) -> str:
    if response.status_code == 429:
        return "the hub asks for fewer requests (429); with a token in HF_TOKEN it allows more"
    return f"the server answers {response.status_code}"


def _reason(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _unreachable(what: str, error: BaseException) -> NetworkError:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return NetworkError(
            f"The hub is not asked for {what}: HF_HUB_OFFLINE is set.", "Unset it, or give a folder or file."
        )
    return NetworkError(
        f"The hub {constants.ENDPOINT} cannot be reached for {what}: {_reason(error)}.",
        "Check the network; HF_ENDPOINT chooses another hub.",
    )


def _refusal(error: HfHubHTTPError, name: str, revision: str | None) -> NetworkError:
    """Why the hub does not say what a repository holds."""
    from huggingface_hub import errors

    code = error.response.status_code
    if isinstance(error, errors.RevisionNotFoundError):
        return NetworkError(f"{name} has no revision {revision}.", "Name a branch, a tag or a commit of it.")
    if isinstance(error, errors.DisabledRepoError):
        return NetworkError(f"The hub has disabled {name}.")
    if isinstance(error, errors.GatedRepoError) or code == 403:
        return _closed(name)
    if code in (401, 404):
        near = _near_names(name)
        meant = f"Did you mean {', '.join(near)}? " if near else ""
        token = "the token in use may not see it" if _has_token() else "a private one needs a token in HF_TOKEN"
        return NetworkError(f"The hub has no model {name}, or it is private.", f"{meant}Check the name; {token}.")
    return NetworkError(f"The hub does not give {name}: it answers {code}.", "Try again later.")


def _refusal_of_file(code: int, headers: Mapping[str, str], file: HubFile, repository: Repository) -> NetworkError:
    if code in (401, 403) or headers.get("x-error-code") == "GatedRepo":
        return _closed(repository.name)
    return NetworkError(
        f"The hub does not give {file.name} of {repository.name}: it answers {code}.", "Try again later."
    )


def _closed(name: str) -> NetworkError:
    from huggingface_hub import constants

    told = "The token in use does not do" if _has_token() else "Then put a token into HF_TOKEN"
    return NetworkError(
        f"{name} is gated: the hub gives it only to those who accepted its licence.",
        f"Accept it at {constants.ENDPOINT}/{name}. {told}: {constants.ENDPOINT}/settings/tokens.",
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _near_names(name: str) -> list[str]:
    """Repositories with a similar name; none when the hub does not say."""
    import difflib

    from huggingface_hub import HfApi, constants, errors

    organisation, _, model = name.partition("/")
    found: list[str] = []
    with contextlib.suppress(errors.HTTPError, OSError, ValueError, TypeError):  # type: ignore[attr-defined]
        api = HfApi(endpoint=constants.ENDPOINT)
        found += [str(entry.id) for entry in api.list_models(search=model, limit=50)]
        found += [str(entry.id) for entry in api.list_models(author=organisation, limit=50)]
    return difflib.get_close_matches(name, list(dict.fromkeys(found)), n=3, cutoff=0.6)
