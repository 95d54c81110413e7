"""Texts that everybody measures on, known by name: fetched from the Hugging Face hub, kept in the user's cache.

What comes from the network is pinned by revision and SHA-256, the archive and the text in it; the copy in the cache
is checked each time it is used. Once it is there, no network is needed.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from localmix.errors import NetworkError


@dataclass(frozen=True)
class KnownCorpus:
    """Where a text lies on the hub.

    Attributes:
        repository, revision: of a dataset; the revision is a commit.
        archive: a zip file in it, and its SHA-256 in hex.
        member: the text in the archive, and its SHA-256.
    """

    repository: str
    revision: str
    archive: str
    archive_sha256: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The name that the text has in the cache, and in results."""
        return self.member.rpartition("/")[2]


KNOWN_CORPORA: Mapping[str, KnownCorpus] = {
    # the file that llama.cpp's scripts/get-wikitext-2.sh fetches, and its published perplexities are measured on
    "wikitext-2": KnownCorpus(
        repository="ggml-org/ci",
        revision="927b3642933080f1b0e811e2f916e14c292992f9",
        archive="wikitext-2-raw-v1.zip",
        archive_sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        member="wikitext-2-raw/wiki.test.raw",
        sha256="173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    ),
}


def fetch(name: str) -> tuple[Path, tuple[str, ...]]:
    """The file of a known corpus, from the cache or else from the hub.

    Returns:
        Its path, and sentences on what was done to get it.

    Raises:
        KeyError: the name is not in `KNOWN_CORPORA`.
        NetworkError: the hub cannot be reached, or sends something else than what is pinned.
        FileError, CapacityError: the cache cannot be read or written.
    """
    import platformdirs

    from localmix.output import file_error, write_atomically

    known = KNOWN_CORPORA[name]
    path = platformdirs.user_cache_path("localmix", appauthor=False) / "corpora" / name / known.file_name
    notes = []
    try:
        if path.exists():
            if _sha256(path.read_bytes()) == known.sha256:
                return path, ()
            path.unlink()
            notes.append(f"{path} was not the text it should be any more, so it was deleted and fetched again.")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, path, "use") from error
    text = _unpack(_download(known), known)
    write_atomically(path, text)
    notes.append(f"{known.file_name} came from the dataset {known.repository} of the hub; it stays at {path}.")
    return path, tuple(notes)


def _download(known: KnownCorpus) -> bytes:
    """The archive; nothing of it stays on the disk."""
    # read when the package is imported: a bar is the console's to draw, and 5 MB need no second way to come
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    from localmix.output import file_error

    repository, archive, revision = known.repository, known.archive, known.revision
    try:
        # asked once: hf_hub_download itself tries for half a minute where the hub cannot be reached
        get_hf_file_metadata(hf_hub_url(repository, archive, repo_type="dataset", revision=revision), token=False)
        with tempfile.TemporaryDirectory() as folder:
            file = hf_hub_download(
                repository, archive, repo_type="dataset", revision=revision, local_dir=folder, token=False
            )
            return Path(file).read_bytes()
    except errors.HfHubHTTPError as error:
        raise NetworkError(
            f"The hub does not give {archive} of the dataset {repository}: it answers {error.response.status_code}.",
            "Try again later, or give a copy of the text with --corpus FILE.",
        ) from error
    # the base class of what the hub's client raises
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno is not None:  # this machine's disk
            raise file_error(error, Path(tempfile.gettempdir()), "write to") from error
        reason = str(error).partition("\n")[0].rstrip(".")
        raise NetworkError(
            f"The hub cannot be reached for {archive}: {reason}.",
            f"Fetch it where there is a network, and give {known.file_name} with --corpus FILE.",
        ) from error


def _unpack(data: bytes, known: KnownCorpus) -> bytes:
    """The text out of the archive, both checked."""
    found = _sha256(data)
    if found != known.archive_sha256:
        raise NetworkError(
            f"{known.archive} from the hub is not the file it should be and was deleted: its sha256 is {found},"
            f" not {known.archive_sha256}.",
            "Something on the way may change downloads. Give the text itself with --corpus FILE.",
        )
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        text = archive.read(known.member)
    assert _sha256(text) == known.sha256  # the archive is the pinned one, so the pins contradict each other
    return text


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
