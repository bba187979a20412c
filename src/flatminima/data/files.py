"""Where data files are found: `FLATMINIMA_DATA`, then the user's cache, then a verified download into the cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from flatminima.data.splits import DataError

VARIABLE = "FLATMINIMA_DATA"
TIMEOUT = 60.0  # seconds without a byte before a download counts as failed


@dataclass(frozen=True)
class DataFile:
    """One file of a data set: its path inside a data folder, its checksum `algorithm:hex`, where it can be had."""

    path: str
    checksum: str
    urls: tuple[str, ...] = ()


def data_folder() -> Path | None:
    """The folder named by `FLATMINIMA_DATA`, or None when the variable is unset or empty."""
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{VARIABLE} names {named!r}, which is not a folder: expected a folder with one folder per data set"
        )
    return folder


def cache_folder() -> Path:
    """The folder downloads go to; it need not exist yet."""
    return Path(platformdirs.user_cache_dir("flatminima"))


def locate(*candidates: DataFile) -> Path:
    """The verified path of the first candidate found, downloading one if there is none.

    The candidates are interchangeable files, preferred first. All are looked for in `FLATMINIMA_DATA`, then all in the
    cache; then the first that has addresses is downloaded. A file that is found but has another checksum is refused,
    never passed over: the next place could hold other data under the same name.

    Raises:
        DataError: a checksum differs, or the file is nowhere and cannot be downloaded.
    """
    named = data_folder()
    for folder in (named, cache_folder()):
        for candidate in candidates:
            if folder is not None and (folder / candidate.path).is_file():
                verify(folder / candidate.path, candidate.checksum)
                return folder / candidate.path
    for candidate in candidates:
        if candidate.urls:
            return download(candidate, cache_folder())
    raise DataError(missing([candidate.path for candidate in candidates]))


def missing(paths: list[str]) -> str:
    """The error for files that only a folder named by the user can provide."""
    named = os.environ.get(VARIABLE)
    searched = f"the folder {named!r} named by {VARIABLE}" if named else f"no folder ({VARIABLE} is not set)"
    return (
        f"{' or '.join(paths)} not found in {searched}, and there is no automatic download: "
        f"get the data from its authors and set {VARIABLE} to the folder that holds it"
    )


def verify(path: Path, checksum: str, *, source: str | None = None) -> None:
    """Refuse the file unless its checksum is the expected `algorithm:hex`; `source` names it in the error."""
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected:
        raise DataError(
            f"{source or path} is corrupt, truncated or another file ({path.stat().st_size} bytes): "
            f"expected {algorithm} {expected}, found {found}; delete it and get it again"
        )


def download(file: DataFile, folder: Path) -> Path:
    """Fetch the file into the folder from the first of its addresses that delivers it with the right checksum.

    Written to a temporary `.part` beside the target, verified, then renamed: the target is complete or absent,
    also when several processes download at once or one of them is killed.
    """
    target = folder / file.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to the cache folder {target.parent}: {error}") from error
    failures = []
    for url in file.urls:
        try:
            _fetch(url, target, file.checksum)
            return target
        except (OSError, http.client.HTTPException, DataError) as error:
            failures.append(f"{url}: {error}")
    raise DataError(
        f"{file.path} is neither in {VARIABLE} nor in the cache and could not be downloaded:\n  "
        + "\n  ".join(failures)
        + f"\nSet {VARIABLE} to a folder that holds {file.path}, or put the file at {target}"
    )


def _fetch(url: str, target: Path, checksum: str) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "flatminima"})
    descriptor, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out, urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            shutil.copyfileobj(response, out, 1 << 20)
        verify(part, checksum, source=f"the download of {target.name}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
