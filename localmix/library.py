"""Models on this machine: where their files lie, what a name means, and which one was used last.

A model is a folder of the library, `<model>/<model>-<TYPE>.gguf`, with its importance matrix beside it as
`<model>/<model>.imatrix.gguf`; a checkpoint that came from the hub is the folder `<model>/<model>`. The library is
the user's data folder, or `LOCALMIX_HOME`. Names are looked up without opening a model, so that shell completion
stays fast.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localmix.errors import FileError, InputError, LocalmixError, UsageError

FLOAT_TYPES = ("BF16", "F16", "F32")
IMATRIX_SUFFIX = ".imatrix.gguf"
# in a model's folder: shards on their way through `quantize REPO`
DOWNLOADS = ".download"

_STATE_FILE = "state.json"
# begins what a model of the hub was made from, as `remember` notes it
HUB = "hub:"
# how the field names files, `Mixtral-8x7B-v0.1.Q4_K_M.gguf`; a preset of ours may end with its month, one that was made
# with an importance matrix with `-im`, and a mixture is called after its target
_TYPED_NAME = re.compile(
    r"^(?P<model>.+?)(?:[-.](?P<type>(?:(?:I?Q|TQ)\d\w*|BF16|F16|F32|MXFP4\w*)(?:-\d{4}-\d\d|-im(?:at(?:rix)?)?)?)"
    r"|-(?P<target>\d+\.\d+(?:bpw|[KMG]i?B)|\d{6,}B))$",
    re.IGNORECASE,
)
# of a split file, as llama.cpp names them
_PART = re.compile(r"-\d{5}(-of-\d{5}\.gguf)$")
_PART_SUFFIX = re.compile(r"-(?P<number>\d{5})-of-\d{5}(?=\.gguf$)")
_MODEL_NAME = re.compile(r"^[^\W_][\w.+ -]*$")


class Purpose(enum.Enum):
    """What a model is wanted for; decides which of its files is meant when no type is named."""

    CHECKPOINT = "checkpoint"  # the folder that a model was converted from
    SOURCE = "source"  # full precision: a BF16, F16 or F32 file, or the checkpoint it came from
    PRECISE = "precise"  # the most precise GGUF file
    MEASURE = "measure"  # the GGUF file used last, else the most precise one
    ANY = "any"  # whatever was meant: a folder, or as MEASURE
    RUN = "run"  # the quantization used last, else the largest that fits into memory


# what these want is read by localmix itself, not by llama.cpp
_FOR_SOURCES = (Purpose.CHECKPOINT, Purpose.SOURCE, Purpose.ANY)


@dataclass(frozen=True)
class ModelFile:
    """One GGUF file of the library; of a split one the first part, with the bytes of all."""

    model: str
    type: str
    path: Path
    bytes: int
    parts: int = 1

    @property
    def name(self) -> str:
        """What the user types."""
        return f"{self.model}:{self.type}"

    @property
    def full_precision(self) -> bool:
        """Whether it can be quantized."""
        return self.type in FLOAT_TYPES


@dataclass(frozen=True)
class Model:
    """A folder of the library.

    Attributes:
        checkpoint: what it was made from; one that came from the hub lies in the library.
        pulled_bytes: what came from the hub and is no GGUF file: a checkpoint, and what stopped runs left.
    """

    name: str
    folder: Path
    files: tuple[ModelFile, ...]
    imatrix: Path | None
    checkpoint: Path | None
    pulled_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files) + self.pulled_bytes


def home() -> Path:
    """The library's folder; it may not exist yet."""
    chosen = os.environ.get("LOCALMIX_HOME")
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    import platformdirs

    return platformdirs.user_data_path("localmix", appauthor=False)


def models() -> list[Model]:
    """Every model of the library, by name.

    Raises:
        FileError: the library's folder cannot be read.
    """
    try:
        folders = sorted(entry for entry in home().iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError(f"The library {home()} cannot be read: {error.strerror}.") from error
    sources = _sources(_state())
    found = (_model(folder, sources.get(folder.name)) for folder in folders)
    return [model for model in found if model.files or model.imatrix or model.pulled_bytes]


def pulled_folder(name: str) -> Path:
    """Where a checkpoint that comes from the hub lies."""
    return home() / name / name


def _model(folder: Path, source: str | None) -> Model:
    files: dict[str, ModelFile] = {}
    for path in sorted(folder.glob("*.gguf")):
        model, kind = split_name(path)
        if kind and model == folder.name and not path.name.endswith(IMATRIX_SUFFIX):
            with contextlib.suppress(OSError):  # a link that leads nowhere
                first = files.get(kind)
                if first and part_suffix(path.name):
                    size = first.bytes + path.stat().st_size
                    files[kind] = replace(first, bytes=size, parts=first.parts + 1)
                else:
                    files[kind] = ModelFile(folder.name, kind, path, path.stat().st_size)
    imatrix = folder / f"{folder.name}{IMATRIX_SUFFIX}"
    pulled = folder / folder.name
    checkpoint = Path(source) if source and Path(source).is_dir() else None
    if checkpoint is None and (pulled / "config.json").is_file():
        checkpoint = pulled
    return Model(
        folder.name,
        folder,
        tuple(sorted(files.values(), key=lambda file: -file.bytes)),
        imatrix if imatrix.is_file() else None,
        checkpoint,
        sum(path.lstat().st_size for path in (*_pulled_files(pulled), *_unfinished_files(folder))),
    )


def _unfinished_files(folder: Path) -> list[Path]:
    """What a stopped `pull`, or a stopped `quantize` of a model of the hub, left in a model's folder."""
    downloads = folder / DOWNLOADS
    below = () if downloads.is_symlink() else downloads.rglob("*")
    coming = [path for path in below if path.is_file() or path.is_symlink()]
    made = [*folder.glob(".*.partial"), *folder.glob(".*.journal")] if coming else []
    return [*coming, *made, *folder.glob(".*.part")]


def _pulled_files(folder: Path) -> list[Path]:
    """What came from the hub into a checkpoint's folder, unfinished files and stand-ins too."""
    from localmix.downloads.pull_record import RECORD, read_record

    if folder.is_symlink() or not folder.is_dir():
        return []
    record = read_record(folder)
    found = [folder / place for place in record]
    found += [path for name in (f"**/{RECORD}", "**/.*.part", "**/.*.part.json") for path in folder.glob(name)]
    root = folder.resolve()
    return [
        path
        for path in dict.fromkeys(found)
        # a link in the folder may lead out of it
        if path.is_file() and not path.is_symlink() and path.resolve().is_relative_to(root)
    ]


def split_file_name(name: str) -> tuple[str, str]:
    """The model's name and the type that a GGUF file's name tells, wherever it lies; the type may be empty."""
    stem = re.sub(r"\.gguf$", "", _PART_SUFFIX.sub("", name), flags=re.IGNORECASE)
    match = _TYPED_NAME.match(stem)
    return (match["model"], match["target"] or match["type"].upper()) if match else (stem, "")


def part_suffix(name: str) -> str:
    """`-00001-of-00003` of a split file's name; empty for a whole one."""
    match = _PART_SUFFIX.search(name)
    return match[0] if match else ""


def split_name(path: Path) -> tuple[str, str]:
    """The model's name and the type that a path tells: `tinymix-Q4_K_M.gguf` is ("tinymix", "Q4_K_M").

    A folder, and a file whose name tells no type, have the type "". In the library the folder is the model,
    so that any name of a type can be told there.
    """
    absolute = Path(os.path.abspath(path))  # not resolve(): the name that the user gave counts, not the link's
    if ".gguf" in absolute.name and absolute.suffix != ".gguf":
        from localmix.sources.joined import whole_name

        absolute = absolute.with_name(whole_name(absolute.name))
    name = _PART_SUFFIX.sub("", absolute.name).removesuffix(".gguf") or "model"
    if absolute.suffix != ".gguf":
        return name, ""
    folder = absolute.parent
    if folder.parent == home() and name.startswith(f"{folder.name}-"):
        return folder.name, name.removeprefix(f"{folder.name}-")
    match = _TYPED_NAME.match(name)
    return (match["model"], match["target"] or match["type"].upper()) if match else (name, "")


def model_name(path: Path) -> str:
    """The name under which the library files what is made from `path`."""
    inside = _inside(path)
    return clean_name(inside.model if inside else split_name(path)[0])


def clean_name(name: str) -> str:
    """The name without what no folder of the library has in its name."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-._+") or "model"


def find(name: str) -> Model | None:
    """The model of that name, or None."""
    return next((model for model in models() if model.name == name), None)


def is_name(text: str) -> bool:
    """Whether the text means a library name; with a separator, a `.gguf` or at the file system it is a path."""
    model, _, _ = text.partition(":")
    bare = not (os.sep in text or (os.altsep and os.altsep in text)) and not text.endswith(".gguf")
    return bare and text not in (".", "..") and find(model) is not None


def is_there(text: str) -> bool:
    """Whether the text names a model of the library or something at the file system."""
    return is_name(text) or os.path.exists(text)


def resolve(wanted: str | Path | None, purpose: Purpose, fits: Callable[[ModelFile], bool] | None = None) -> Path:
    """The file or checkpoint folder that is meant.

    Args:
        wanted: a path, a library name (`tinymix`, `tinymix:Q4_K_M`), or None for the model used last. A bare
            name that the library knows wins over a file of that name in the current folder; `./NAME` is the path.
        purpose: which file of a model is meant when no type is named.
        fits: for RUN without a type: whether a file fits into memory; the largest quantization that does is taken.

    Raises:
        UsageError: the name or type is unknown, or there is no model yet.
        InputError: the model has no file for this purpose.
        FileError: the path does not exist.
    """
    if wanted is None:
        return _last(purpose, fits)
    text = os.fspath(wanted)
    if isinstance(wanted, str) and is_name(text):
        name, _, kind = text.partition(":")
        model = find(name)
        assert model is not None
        return _of_type(model, kind) if kind else _choose(model, purpose, fits)
    path = Path(text)
    if path.exists():
        return _checked(path, purpose)
    ours = _made_from(text)
    wanted_whole = purpose in (Purpose.SOURCE, Purpose.CHECKPOINT)
    if ours is not None and (ours.files or wanted_whole or _pulled_from(text) is not None):
        return _choose(ours, purpose, fits)
    if find_repository(text):
        raise FileError(
            f"{text} does not exist here, and a model of the hub must come first.",
            f"Run `localmix pull {text}`, or `localmix quantize TYPE {text}` to fetch and quantize it in one go.",
        )
    name, _, _ = text.partition(":")
    if os.sep in text or text.endswith(".gguf"):
        raise FileError(f"{text} does not exist.", _what_there_is())
    raise UsageError(f"There is no model {name!r} in the library, and no file of that name.", _what_there_is())


def find_repository(text: str) -> str:
    """The text when it names a repository of the hub (`org/name`, `org/name:TYPE`) and nothing here; else empty."""
    from localmix.downloads.hub import parse_name

    if parse_name(text) is None or text.endswith(".gguf") or os.path.exists(text) or _pulled_from(text) is not None:
        return ""
    return text


def _made_from(text: str) -> Model | None:
    """The model of the library that came from the repository `text`, or was made from it."""
    model = find(clean_name(text.rpartition("/")[2])) if text.count("/") == 1 else None
    return model if model is not None and _origin(model.name) == HUB + text else None


def _pulled_from(text: str) -> Model | None:
    """The same, when it is here in full precision: its checkpoint as a whole, or a GGUF file."""
    model = _made_from(text)
    if model is None:
        return None
    folder = pulled_folder(model.name)
    is_whole = model.checkpoint == folder and not any(folder.glob(".*.part"))
    return model if is_whole or any(file.full_precision for file in model.files) else None


def _last(purpose: Purpose, fits: Callable[[ModelFile], bool] | None) -> Path:
    state = _state()
    path = Path(str(state.get("file", "")))
    model = find(str(state.get("model", "")))
    if model is None and state.get("file") and path.is_file():
        return _checked(path, purpose)
    if model is None:
        known = models()
        if not known:
            raise UsageError(
                "No model was named, and the library is empty.",
                "Make one with `localmix convert FOLDER`, or give the path of a GGUF file.",
            )
        if len(known) > 1:
            raise UsageError("No model was named, and none was used before.", _what_there_is())
        model = known[0]
    used = _inside(path)
    if used and used.model == model.name and path.exists():
        wanted = (Purpose.MEASURE, Purpose.ANY) if used.full_precision else (Purpose.MEASURE, Purpose.ANY, Purpose.RUN)
        if purpose in wanted:
            return path
    return _choose(model, purpose, fits)


def _choose(model: Model, purpose: Purpose, fits: Callable[[ModelFile], bool] | None) -> Path:
    """The file of a model that serves the purpose best."""
    full = [file for file in model.files if file.full_precision]
    if purpose is Purpose.CHECKPOINT:
        if model.checkpoint:
            return model.checkpoint
        raise InputError(f"The checkpoint that {model.name} was made from is not known, or gone.", "Give its folder.")
    if purpose is Purpose.SOURCE:
        if full:
            return full[0].path
        if model.checkpoint:
            return model.checkpoint
        origin = _origin(model.name)
        again = f"Name {origin.removeprefix(HUB)}" if origin.startswith(HUB) else "Run `localmix convert FOLDER` again"
        raise InputError(
            f"{model.name} has no file in full precision, and its checkpoint is gone: {_types(model)}.",
            f"{again}, or name a BF16, F16 or F32 file.",
        )
    if not model.files:
        if purpose is Purpose.ANY and model.checkpoint == pulled_folder(model.name):
            return model.checkpoint
        raise InputError(
            f"{model.name} has no GGUF file in the library.", "Make one with `localmix convert` or `quantize`."
        )
    if purpose is not Purpose.RUN:
        return model.files[0].path
    quantized = [file for file in model.files if not file.full_precision]
    for file in quantized or full:
        if fits is None or fits(file):
            return file.path
    return (quantized or full)[-1].path  # nothing fits: the smallest, and the memory check says the rest


def _of_type(model: Model, kind: str) -> Path:
    wanted = kind.upper()
    for spelled in (wanted, f"{wanted}_M"):  # Q4_K means Q4_K_M, as in llama.cpp
        for file in model.files:
            if file.type.upper() == spelled:
                return file.path
    raise UsageError(
        f"{model.name} has no file of type {wanted}; it has {_types(model)}.",
        f"Make it with `localmix quantize {wanted} {model.name}`.",
    )


def _checked(path: Path, purpose: Purpose) -> Path:
    if path.is_dir() and purpose not in _FOR_SOURCES:
        raise UsageError(
            f"{path} is a folder, and a GGUF file is needed here.", f"Run `localmix convert {path}` first."
        )
    # any part means the whole; llama.cpp opens the first one only
    first = path.with_name(_PART.sub(r"-00001\1", path.name)) if path.name else path
    if ".gguf" in path.name and path.suffix != ".gguf":
        from localmix.sources.joined import find_pieces, whole_name

        pieces: list[Path] = []
        with contextlib.suppress(LocalmixError):  # told when it is opened
            pieces = find_pieces(path)
        first = next(iter(pieces), first)
        # a single one may be whole: wget calls a second copy `model.gguf.1`
        if whole_name(path.name) != path.name and len(pieces) != 1 and purpose not in _FOR_SOURCES:
            raise InputError(
                f"{path} is a piece of a file that was cut, which llama.cpp does not load.",
                f"Run `localmix convert {path}`: it joins them.",
            )
    return first if first.exists() else path


def _types(model: Model) -> str:
    return ", ".join(file.type for file in model.files) or "no files"


def _what_there_is() -> str:
    known = models()
    if not known:
        return "The library is empty: `localmix convert FOLDER` makes the first model."
    return "The library has " + "; ".join(f"{model.name} ({_types(model)})" for model in known) + "."


def _inside(path: Path) -> ModelFile | None:
    """The path as a file of the library, or None when it lies elsewhere."""
    absolute = Path(os.path.abspath(path))
    model, kind = split_name(absolute)
    if absolute.parent.parent != home() or absolute.parent.name != model or not kind:
        return None
    return ModelFile(model, kind, absolute, 0)


def output_path(source: Path, kind: str) -> Path:
    """Where the library files the model `source` in type `kind`.

    Raises:
        UsageError: the library holds another model of that name.
    """
    check_name_is_free(source)
    name = model_name(source)
    return home() / name / f"{name}-{kind}.gguf"


def repository_output_path(name: str, repository: str, kind: str) -> Path:
    """Where the library files a model of the hub in type `kind`.

    Raises:
        UsageError: the library holds another model of that name.
    """
    check_repository(name, repository)
    return home() / name / f"{name}-{kind}.gguf"


def imatrix_output_path(source: Path) -> Path:
    """Where the library files the importance matrix of `source`.

    Raises:
        UsageError: the library holds another model of that name.
    """
    check_name_is_free(source)
    name = model_name(source)
    return home() / name / f"{name}{IMATRIX_SUFFIX}"


def make_room(path: Path) -> Path:
    """The path of an output, its folder made if it is one of the library; other folders are the user's to make.

    Raises:
        FileError: the folder cannot be made.
    """
    if path.parent.parent == home():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            from localmix.output import file_error

            raise file_error(error, path.parent, "make") from error
    return path


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """`make_room` for as long as an output is made: when that fails, no empty folder stays in the library."""
    make_room(path)
    try:
        yield
    except BaseException:
        if path.parent.parent == home():
            with contextlib.suppress(OSError):  # it has files
                path.parent.rmdir()
        raise


def is_newer(path: Path, inputs: Sequence[Path]) -> bool:
    """Whether the file is there, and not older than any of the files it is made from."""
    try:
        made = path.stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return all(made >= entry.stat().st_mtime_ns for entry in inputs)


def find_imatrix(source: Path) -> Path | None:
    """The importance matrix of a model: in the library, unless that one is another model's, or beside its file."""
    name = model_name(source)
    beside = Path(os.path.abspath(source)).parent
    for folder in (beside,) if _other_source(source) else (home() / name, beside):
        path = folder / f"{name}{IMATRIX_SUFFIX}"
        if path.is_file():
            return path
    return None


def check_name_is_free(source: Path) -> None:
    """Refuse to file something under a name that the library uses for another model.

    Raises:
        UsageError: the library holds a model of that name that was made from something else.
    """
    earlier = _other_source(source)
    if earlier:
        name = model_name(source)
        raise UsageError(
            f"The library has another {name}, made from {earlier}.",
            f"Remove it with `localmix rm {name}`, or name the output with -o.",
        )


def check_repository(name: str, repository: str) -> None:
    """Refuse to file a repository of the hub under a name that the library uses for another model.

    Raises:
        UsageError: it does.
    """
    from localmix.downloads.pull_record import read_record

    earlier, model = _origin(name), find(name)
    own = model is not None and any(file.path.name not in read_record(model.folder) for file in model.files)
    if (earlier or own) and earlier != HUB + repository and model is not None:
        told = f", made from {earlier.removeprefix(HUB)}" if earlier else ""
        raise UsageError(
            f"The library has another {name}{told}.", f"Remove it with `localmix rm {name}`, or use another library."
        )


def _origin(name: str) -> str:
    """What the library's model of that name was made from: a path, or `HUB` and a repository; empty if not known."""
    from localmix.downloads.pull_record import read_record

    record = read_record(pulled_folder(name))
    if record:
        return HUB + next(iter(record.values())).repository
    return _sources(_state()).get(name, "")


def _other_source(source: Path) -> str:
    """What the library's model of the same name was made from, if that is known and something else; else empty."""
    name = model_name(source)
    if _inside(source) or Path(os.path.abspath(source)) == pulled_folder(name):
        return ""
    earlier = _origin(name)
    model = find(name) if earlier else None
    if not earlier or model is None or Path(earlier) == source.resolve():
        return ""
    for path in (Path(earlier), *(file.path for file in model.files)):
        with contextlib.suppress(OSError):
            if path.samefile(source):
                return ""
    return earlier.removeprefix(HUB)


def remember(paths: Path | Sequence[Path], source: Path | None = None, repository: str = "") -> None:
    """Note the model used last, and what a model of the library was made from.

    Args:
        paths: the files used. Of several in the library none is the one used last, the model as a whole is.
            Elsewhere nothing knows a model as a whole: then the first is.
        source: the checkpoint or GGUF file that they were made from.
        repository: the one of the hub that they were made from, when nothing of it stays here.
    """
    from localmix.output import write_atomically

    files = [Path(os.path.abspath(path)) for path in ([paths] if isinstance(paths, Path) else paths)]
    inside = _inside(files[0])
    # a convenience: the command that was asked for has done its work
    with contextlib.suppress(OSError, LocalmixError), _locked_state() as state:
        whole = inside is not None and len(files) > 1
        state.update(model=inside.model if inside else "", file="" if whole else str(files[0]))
        if repository and inside is not None:
            state["checkpoints"] = {**_sources(state), inside.model: HUB + repository}
        elif source is not None and inside is not None and _inside(source) is None:
            state["checkpoints"] = {**_sources(state), inside.model: str(source.resolve())}
        # escapes: a path need not be UTF-8
        write_atomically(home() / _STATE_FILE, json.dumps(state, indent=2).encode("ascii"))


def remember_checkpoint(folder: Path) -> None:
    """Note that this model, whose checkpoint came from the hub, was used last."""
    from localmix.output import write_atomically

    with contextlib.suppress(OSError, LocalmixError), _locked_state() as state:
        state.update(model=folder.name, file="")
        write_atomically(home() / _STATE_FILE, json.dumps(state, indent=2).encode("ascii"))


@contextlib.contextmanager
def _locked_state() -> Iterator[dict[str, Any]]:
    """What `remember` noted, to be changed: another run that notes something waits, so that neither is lost."""
    home().mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # folders cannot be locked there
        yield _state()
        return
    import fcntl

    descriptor = os.open(home(), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _state()
    finally:
        os.close(descriptor)


def _state() -> dict[str, Any]:
    """What `remember` noted; empty when there is nothing, or nothing that can be read."""
    try:
        state = json.loads((home() / _STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _sources(state: dict[str, Any]) -> dict[str, str]:
    """By model of the library: the checkpoint, or the GGUF file elsewhere, that it was made from."""
    known = state.get("checkpoints")
    entries = known.items() if isinstance(known, dict) else ()
    return {name: path for name, path in entries if isinstance(path, str)}


@dataclass(frozen=True)
class Removal:
    """What `rm` would delete: files, and the folder when nothing else is in it."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    bytes: int


def plan_removal(name: str) -> Removal:
    """What deleting `tinymix` or `tinymix:Q4_K_M` means; nothing is deleted yet.

    Only files that localmix makes or fetches are meant: GGUF files, the importance matrix, a checkpoint that came
    from the hub, and leftovers of stopped runs.

    Raises:
        UsageError: the name is unknown, or a path.
    """
    from localmix.downloads.pull_record import RECORD

    model_part, _, kind = name.partition(":")
    if not _MODEL_NAME.match(model_part) or os.path.basename(model_part) != model_part:
        raise UsageError(f"{name!r} is not a name of the library.", _what_there_is())
    model = find(model_part)
    if model is None:
        raise UsageError(f"There is no model {model_part!r} in the library.", _what_there_is())
    if model.folder.is_symlink() or model.folder.resolve().parent != home().resolve():
        raise UsageError(f"{model.folder} leads out of the library.", "Remove the link by hand.")
    if kind:
        wanted = _of_type(model, kind)
        part = part_suffix(wanted.name)
        files = sorted(model.folder.glob(wanted.name.replace(part, "-?????" + part[6:]))) if part else [wanted]
    else:
        files = [
            path
            for path in sorted(model.folder.iterdir())
            if path.name.startswith((f"{model.name}-", f"{model.name}.", f".{model.name}"))
            and path.name.endswith((".gguf", ".partial", ".journal", ".part", ".part.json"))
            and (path.is_file() or path.is_symlink())
        ]
        files += [path for path in (model.folder / RECORD,) if path.is_file()]
        files += _pulled_files(pulled_folder(model.name))
        files += _unfinished_files(model.folder)
        files = list(dict.fromkeys(files))
    return Removal(name, model.folder, tuple(files), sum(path.lstat().st_size for path in files))


def remove(removal: Removal) -> None:
    """Delete what `plan_removal` named.

    Raises:
        FileError: a file cannot be deleted.
    """
    from localmix.output import file_error

    for path in removal.files:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise file_error(error, path, "delete") from error
    inside = {folder for path in removal.files for folder in path.parents if removal.folder in folder.parents}
    downloads = removal.folder / DOWNLOADS
    if not downloads.is_symlink():
        inside |= {downloads, *(path for path in downloads.rglob("*") if path.is_dir())}
    for folder in (*sorted(inside, reverse=True), removal.folder):
        with contextlib.suppress(OSError):  # somebody else's files are in it: they stay
            folder.rmdir()


def complete(incomplete: str) -> Sequence[tuple[str, str]]:
    """Library names that begin so, each with what it is: for the shell's completion."""
    choices: list[tuple[str, str]] = []
    for model in models():
        choices.append((model.name, _types(model)))
        choices += [(file.name, f"{file.bytes / 2**30:.2f} GiB") for file in model.files]
    return [choice for choice in choices if choice[0].startswith(incomplete)]
