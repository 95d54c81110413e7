"""merge: adapters become part of a checkpoint, written again in the same shards.

The folder appears when it is complete. What a killed run left, `.NAME.partial` beside it, is gone on with by the same
command, shard by shard, and swept by another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localmix import __version__
from localmix.architectures import ARCHITECTURES
from localmix.errors import CapacityError, FileError, InputError
from localmix.native.devices import default_threads
from localmix.output import OutputFile, file_error, lock_for
from localmix.sizes import size as readable
from localmix.sources.adapter import Adapter, Lora, is_embedding
from localmix.sources.checkpoint import CONFIG, INDEX, list_folder, open_adapters, open_shards, tokenizer_folder
from localmix.sources.documents import DOCUMENT_LIMIT, read_object, shown
from localmix.sources.lora import describe, lay_over
from localmix.sources.low_rank import MergedTensor
from localmix.sources.positional import read_whole
from localmix.sources.safetensors import DTYPE_BITS, Shard, StoredTensor

Progress = Callable[[int, int, str], None]

# Bytes of a tensor that are copied, and weights that are merged, at once by one thread.
_COPIED_BYTES = 8 << 20
_MERGED_WEIGHTS = 1 << 20

_RECIPE = ".recipe"

# What is copied beside the weights: configuration, tokenizer, templates, licence.
_DOCUMENTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_TEMPLATES = "additional_chat_templates"

# Of these an adapter with a vocabulary of its own brings all that it has, and the checkpoint's are left out.
_TOKENIZER = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)


@dataclass(frozen=True)
class Merged:
    """The finished folder.

    Attributes:
        merged: tensors that an adapter changed.
        bytes: of all shards.
    """

    path: Path
    shards: int
    tensors: int
    merged: int
    bytes: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor that one thread writes: rows of a merged one, bytes of any other."""

    tensor: StoredTensor
    start: int
    stop: int
    position: int

    @property
    def bytes(self) -> int:
        """How many it takes in the shard."""
        return _bytes(self.tensor) * (self.stop - self.start) // max(1, _units(self.tensor))

    def read(self) -> memoryview:
        """What is to be written."""
        if isinstance(self.tensor, MergedTensor):
            return np.ascontiguousarray(self.tensor.read_rows(self.start, self.stop)).reshape(-1).view(np.uint8).data
        return memoryview(self.tensor.file.read(self.tensor.offset + self.start, self.stop - self.start))


@dataclass(frozen=True)
class _Layout:
    """One shard as it will be: its head, and its tensors with their places, in the order of the data."""

    name: str
    header: bytes
    places: Sequence[tuple[StoredTensor, int]]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(_bytes(tensor) for tensor, _ in self.places)

    def pieces(self) -> Iterator[_Piece]:
        """All of its data, cut up."""
        for tensor, position in self.places:
            units = _units(tensor)
            size = _bytes(tensor)
            per_unit = size // max(1, units)
            if isinstance(tensor, MergedTensor):
                step = max(1, _MERGED_WEIGHTS // max(1, math.prod(tensor.shape[1:])))
            else:
                step = _COPIED_BYTES
            for start in range(0, units, step):
                yield _Piece(tensor, start, min(start + step, units), position + start * per_unit)


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8


def _units(tensor: StoredTensor) -> int:
    """What pieces are counted in: rows of a merged tensor, bytes of any other."""
    return tensor.shape[0] if isinstance(tensor, MergedTensor) else _bytes(tensor)


def merge(
    base: Path,
    loras: Sequence[Lora],
    output: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write a checkpoint with adapters merged into it.

    The new folder has the shards, the order of tensors and the dtypes of the old one. Each changed weight is computed
    in float32 and rounded once. An adapter that holds embeddings of its own brings its tokenizer; config.json then
    says the new size of the vocabulary.

    Args:
        base: a checkpoint folder; of any architecture, the names of tensors are all that counts.
        loras: the adapters; each one's change is that of the base's own weights.
        output: the folder to make; it may exist if it is empty.
        threads: defaults to the cores at hand.
        progress: called with (bytes done, bytes in all, shard's name).

    Raises:
        InputError: the checkpoint or an adapter is broken, quantized, or they do not fit each other; a sum is NaN.
        CapacityError, FileError: the disk is too small or refuses, or the folder is not empty.
    """
    started = time.monotonic()
    named, output = output, Path(os.path.abspath(output))
    with ExitStack() as opened:
        names = list_folder(base)
        if CONFIG not in names:
            raise InputError(f"{base} has no {CONFIG}, so it is not a checkpoint.", "Give the folder of the model.")
        config = read_object(base / CONFIG)
        if config.get("quantization_config"):
            raise InputError(
                f"{base / CONFIG}: the checkpoint is already quantized.",
                "Take the one in bf16, f16 or f32; `localmix quantize --lora` makes a small model of it.",
            )
        shards = open_shards(base, names, opened)
        if not shards:
            raise InputError(f"{base} has no weights to merge anything into.", "Download its safetensors files too.")
        adapters = open_adapters(base, loras, shards, opened)
        tensors, added = _overlaid(base, config, shards, adapters)
        layouts = [_layout(shard, tensors, added if number == 0 else ()) for number, shard in enumerate(shards)]
        documents = _documents(base, config, shards, adapters, tensors, layouts, added)
        _check_output(output)
        opened.callback(lock_for(output).release)
        sources = [shard.path for shard in (*shards, *(adapter.shard for adapter in adapters))]
        _check_room(output, sum(layout.bytes for layout in layouts) + sum(map(len, documents.values())))
        with _folder(output, _fingerprint(sources, adapters, layouts, documents)) as partial:
            _write(partial, layouts, threads or default_threads(), progress)
            for shard in (*shards, *(adapter.shard for adapter in adapters)):
                shard.file.check_unchanged()
            for name, content in documents.items():
                _write_document(partial / name, content)
    return Merged(
        named,
        len(layouts),
        sum(len(layout.places) for layout in layouts),
        sum(isinstance(tensor, MergedTensor) for tensor in tensors.values()),
        sum(layout.bytes for layout in layouts),
        time.monotonic() - started,
        tuple(describe(adapters, tensors)),
    )


def _overlaid(
    base: Path, config: Mapping[str, Any], shards: Sequence[Shard], adapters: Sequence[Adapter]
) -> tuple[dict[str, StoredTensor], tuple[StoredTensor, ...]]:
    """All tensors by the name they have in the shards, and those that no shard has."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    rename = row.rename if row is not None else str
    own: dict[str, str] = {}
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            renamed = rename(name)
            if renamed in stored:
                raise InputError(f"{base}: tensor {shown(name)} is there twice.", "Download the checkpoint again.")
            stored[renamed] = tensor
            own[renamed] = name
    laid = lay_over(base, stored, adapters, rename)
    added = tuple(tensor for name, tensor in laid.items() if name not in own)
    return {own.get(name, name): tensor for name, tensor in laid.items()}, added


def _layout(shard: Shard, tensors: Mapping[str, StoredTensor], added: Sequence[StoredTensor]) -> _Layout:
    """A shard with the same names in the same order, of data too; what no shard has comes last."""
    members = {name: tensors[name] for name in shard.tensors} | {tensor.name: tensor for tensor in added}
    placed = sorted(shard.tensors, key=lambda name: shard.tensors[name].offset) + [tensor.name for tensor in added]
    offsets: dict[str, int] = {}
    end = 0
    for name in placed:
        offsets[name] = end
        end += _bytes(members[name])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    for name, tensor in members.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], offsets[name] + _bytes(tensor)],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return _Layout(shard.path.name, head, [(members[name], len(head) + offsets[name]) for name in placed])


def _documents(
    base: Path,
    config: dict[str, Any],
    shards: Sequence[Shard],
    adapters: Sequence[Adapter],
    tensors: Mapping[str, StoredTensor],
    layouts: Sequence[_Layout],
    added: Sequence[StoredTensor],
) -> dict[str, bytes]:
    """The small files of the new folder, by name."""
    folder = tokenizer_folder(base, adapters)
    found = {
        name: read_whole(base / name, DOCUMENT_LIMIT)
        for name in _small_files(base)
        if folder == base or not _is_tokenizer(name)
    }
    if folder != base:
        found |= {
            name: read_whole(folder / name, DOCUMENT_LIMIT) for name in _small_files(folder) if _is_tokenizer(name)
        }
    changed = _changed_config(config, shards, tensors, added)
    if changed != config:
        found[CONFIG] = _json(changed)
    if INDEX in found:
        found[INDEX] = _changed_index(found[INDEX], layouts)
    return found


def _is_tokenizer(name: str) -> bool:
    return name in _TOKENIZER or name.startswith(_TEMPLATES)


def _small_files(folder: Path) -> list[str]:
    """Names of the regular files that are copied, those of a folder of templates included."""
    paths = [*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja")]
    return sorted(
        path.relative_to(folder).as_posix()
        for path in paths
        if (path.suffix in _DOCUMENTS or path.name.upper().startswith(_LICENCES))
        and not path.name.startswith((".", "adapter_"))
        and path.is_file()
    )


def _changed_config(
    config: Mapping[str, Any],
    shards: Sequence[Shard],
    tensors: Mapping[str, StoredTensor],
    added: Sequence[StoredTensor],
) -> dict[str, Any]:
    """config.json with the size of a vocabulary that an adapter brought, and with an output of its own."""
    changes: dict[str, Any] = {}
    for name, tensor in ((name, tensor) for shard in shards for name, tensor in shard.tensors.items()):
        if is_embedding(name) and tensors[name].shape != tensor.shape:
            changes["vocab_size"] = tensors[name].shape[0]
    if added:
        changes["tie_word_embeddings"] = False
    section = config.get("text_config")
    if isinstance(section, dict):  # of a model that sees or hears, too
        inner = {name: value for name, value in changes.items() if name in section or name not in config}
        changes = {name: value for name, value in changes.items() if name in config or name not in inner}
        return {**config, **changes, "text_config": {**section, **inner}}
    return {**config, **changes}


def _changed_index(old: bytes, layouts: Sequence[_Layout]) -> bytes:
    """The index of the new shards; the old one's bytes where nothing in it changes."""
    index = json.loads(old.decode("utf-8-sig"))
    placed = {tensor: layout.name for layout in layouts for tensor in (place[0].name for place in layout.places)}
    total = sum(layout.bytes - len(layout.header) for layout in layouts)
    metadata = index.get("metadata") if isinstance(index.get("metadata"), dict) else {}
    known = index["weight_map"]
    if metadata.get("total_size") == total and len(known) == len(placed):
        return old
    fresh = {name: shard for name, shard in placed.items() if name not in known}
    return _json({**index, "metadata": {**metadata, "total_size": total}, "weight_map": {**known, **fresh}})


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _check_output(output: Path) -> None:
    if not output.parent.is_dir():
        raise FileError(f"The folder {output.parent} does not exist.", f"Make it with `mkdir -p {output.parent}`.")
    try:
        kept = os.listdir(output)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise FileError(f"{output} is a file, and a merged checkpoint is a folder.", "Name another with -o.") from error
    except OSError as error:
        raise file_error(error, output, "write") from error
    if kept or output.is_symlink():
        raise FileError(f"{output} is not empty.", "Name a folder that does not exist with -o, or delete that one.")


def _check_room(output: Path, size: int) -> None:
    """Refuse before any work what the disk does not hold; what a killed run left is used again, or freed."""
    partial = output.with_name(_partial_name(output))
    needed = size - (sum(path.lstat().st_size for path in partial.iterdir()) if partial.is_dir() else 0)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise CapacityError(
            f"{output.parent} has {readable(free)} free, and {output.name} takes {readable(needed)}.",
            "Free some space, or choose another folder with -o.",
        )


def _partial_name(output: Path) -> str:
    return f".{output.name}.partial"


def _fingerprint(
    sources: Iterable[Path], adapters: Sequence[Adapter], layouts: Sequence[_Layout], documents: Mapping[str, bytes]
) -> str:
    """What the folder depends on; one of another fingerprint is not gone on with."""
    digest = hashlib.sha256(f"{__version__} {_MERGED_WEIGHTS}".encode())
    for adapter in adapters:
        digest.update(adapter.recipe.encode())
    for layout in layouts:
        digest.update(layout.header)
    for name, content in documents.items():
        digest.update(name.encode() + content)
    for path in sources:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _folder(output: Path, fingerprint: str) -> Iterator[Path]:
    """A folder that gets the output's name when the block is done; it goes when the block fails."""
    partial = output.with_name(_partial_name(output))
    recipe = partial / _RECIPE
    try:
        if partial.is_symlink() or not partial.is_dir():
            partial.unlink(missing_ok=True)
        elif not _same_recipe(recipe, fingerprint):
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        recipe.write_text(fingerprint, "ascii")
    except OSError as error:
        raise file_error(error, output, "write") from error
    try:
        yield partial
        recipe.unlink()
        _sync(partial)
        with contextlib.suppress(FileNotFoundError):
            output.rmdir()
        os.replace(partial, output)
        _sync(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise file_error(error, output, "write") from error
        raise


def _same_recipe(recipe: Path, fingerprint: str) -> bool:
    try:
        return stat.S_ISREG(recipe.lstat().st_mode) and recipe.read_text("ascii") == fingerprint
    except (OSError, ValueError):
        return False


def _sync(folder: Path) -> None:
    """Make names durable; Windows cannot open folders and orders renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_document(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write(partial: Path, layouts: Sequence[_Layout], threads: int, progress: Progress | None) -> None:
    """Write the shards that an earlier, killed run did not finish, one after the other."""
    missing = [layout for layout in layouts if not _is_there(partial / layout.name, layout.bytes)]
    total = sum(layout.bytes for layout in layouts)
    done = total - sum(layout.bytes for layout in missing)
    with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
        for layout in missing:
            with OutputFile(partial / layout.name, layout.bytes) as file:
                file.write(0, layout.header)
                done += len(layout.header)
                for count in _spread(pool, layout.pieces(), file, threads):
                    done += count
                    if progress is not None:
                        progress(done, total, layout.name)
                file.commit()


def _is_there(path: Path, size: int) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _spread(pool: ThreadPoolExecutor, pieces: Iterator[_Piece], file: OutputFile, threads: int) -> Iterator[int]:
    """Keep the threads busy with a short queue; yields the bytes of each piece that is written."""

    def place(piece: _Piece) -> int:
        file.write(piece.position, piece.read())
        return piece.bytes

    waiting: set[Future[int]] = set()
    try:
        while True:
            while len(waiting) < 2 * threads and (piece := next(pieces, None)) is not None:
                waiting.add(pool.submit(place, piece))
            if not waiting:
                return
            # a timeout lets Ctrl-C through on Windows, where a wait for ever is deaf
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BaseException:
        for future in waiting:
            future.cancel()
        wait(waiting)
        raise
