"""Files of a sweep, wherever they are: what tells two versions apart, and a copy to work on.

A location is a path, or any URL that fsspec opens (`s3://`, `gs://`, `http://`, `file://`). The
engine maps files into memory, so a remote one is copied once per cache directory. fsspec is
imported only for a URL.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from aprcore.ground.errors import AprError, FormatError, PlanError, UnsupportedError

Value = TypeVar("Value")

# Read together with a model in one file, where its vocabulary is not inside it.
NEIGHBOURS = ("tokenizer.json", "tokenizer_config.json")

# What stores say of a file besides its size, any of which changes when its content does.
_MARKS = (
    "mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash", "Content-MD5",
    "Last-Modified", "checksum", "created",
)  # fmt: skip

# A store that answers with an error is asked again: a sweep runs for hours, a hiccup for seconds.
ATTEMPTS = 3
PAUSE_S = 0.5

# Names a copy by its content; 64 bits would do for every file that one machine ever sees.
_DIGEST_CHARACTERS = 32


def is_url(location: str) -> bool:
    """Whether a location is for fsspec and not a path."""
    return "://" in location


def base_name(location: str) -> str:
    """The last component of a path or URL: "model.gguf"."""
    return PurePosixPath(location.rstrip("/")).name or location


def fingerprint(location: str, *, is_model: bool = False) -> str | None:
    """What changes when the file or directory does: sizes and times, not a pass over the bytes.

    Args:
        location: A path or URL.
        is_model: Whether the tokenizer's files beside it belong to it.

    Returns:
        A digest in hexadecimal, or None where nothing can be seen from here.

    Raises:
        UnsupportedError: It is a URL, and fsspec is not installed.
    """
    if is_url(location):
        listing = _list_remote(location, is_model=is_model)
    else:
        listing = _list_local(Path(location), is_model=is_model)
    if not listing:
        return None
    return hashlib.sha256(repr(sorted(listing)).encode()).hexdigest()[:_DIGEST_CHARACTERS]


def _list_local(path: Path, *, is_model: bool) -> list[tuple[str, ...]]:
    """Name, size and time of every file.

    Of a directory, those that a model or a dump consists of: `/` is one, too.
    """
    # Unlike pathlib's, these do not raise where a name is too long or a folder may not be entered.
    if os.path.isdir(path):  # noqa: PTH112
        folders = [path, *path.glob("layer-*")]
        files = [file for folder in folders for file in _files_in(folder)]
        found = [(str(file.relative_to(path)), file) for file in files]
    else:
        found = [("", path)]
        if is_model:
            found += [(name, path.parent / name) for name in NEIGHBOURS]
    listing: list[tuple[str, ...]] = []
    for name, file in found:
        try:
            status = file.stat()
        except OSError:
            continue
        listing.append((name, str(status.st_size), str(status.st_mtime_ns)))
    # A neighbour alone is no model.
    return listing if os.path.exists(path) else []  # noqa: PTH110


def _files_in(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if file.is_file()]
    except OSError:  # no folder, or one that may not be looked into
        return []


def _list_remote(url: str, *, is_model: bool) -> list[tuple[str, ...]]:
    system, root = _open_system(url)
    try:
        files = _remote_files(system, root, is_model=is_model)
        return [
            (name, *(f"{key}={info[key]}" for key in ("size", *_MARKS) if info.get(key)))
            for name, info in ((name, system.info(path)) for name, path in files)
        ]
    except Exception:
        # Stores raise whatever they like. The machine that runs the case may see more than this
        # one, and if not, it says what is wrong.
        return []


def _remote_files(system: Any, root: str, *, is_model: bool) -> list[tuple[str, str]]:
    """The path below the root ("" for a single file) and the full path of every file."""
    # Whether a page is a directory cannot be asked over http; the slash says so.
    is_http = "http" in _protocols(system)
    if root.endswith("/") if is_http else system.isdir(root):
        prefix = root.rstrip("/") + "/"
        paths = [path for path in system.find(root) if path.startswith(prefix)]
        return [(path.removeprefix(prefix), path) for path in paths]
    parent = root.rpartition("/")[0]
    beside = [(name, f"{parent}/{name}") for name in NEIGHBOURS] if is_model else []
    return [("", root), *((name, path) for name, path in beside if system.exists(path))]


def _protocols(system: Any) -> tuple[str, ...]:
    names = system.protocol
    return (names,) if isinstance(names, str) else tuple(names)


def _open_system(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the path in it.

    Raises:
        UnsupportedError: fsspec, or what it needs for this kind of URL, is not installed.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UnsupportedError("a URL needs fsspec, which is not installed", where=url,
                               hint="pip install 'aprtui[cluster]'") from error  # fmt: skip
    try:
        system, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UnsupportedError(f"cannot be opened: {error}", where=url) from error
    return system, str(root)


def fetch(location: str, mark: str | None, cache: Path, *, is_model: bool = False) -> Path:
    """A path to the file or directory: itself, or a copy of what is behind a URL.

    A copy is made once per cache directory, by whichever process comes first; the others wait. One
    that is cut off is begun again.

    Args:
        location: A path or URL.
        mark: Its `fingerprint`, which names the copy.
        cache: The directory of copies.
        is_model: Whether the tokenizer's files beside it belong to it.

    Raises:
        FormatError: It cannot be copied.
        PlanError: It changed since the fingerprint was taken.
    """
    if not is_url(location):
        check_unchanged(location, mark, is_model=is_model)
        return Path(location)
    key = hashlib.sha256(f"{location}\n{mark}".encode()).hexdigest()[:_DIGEST_CHARACTERS]
    target = cache / key
    name = base_name(location)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{key}.lock"):
        if not target.exists():
            partial = cache / f"{key}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _again(location, lambda: _copy(location, partial / name, is_model=is_model))
            partial.rename(target)
    return target / name


def check_unchanged(location: str, mark: str | None, *, is_model: bool = False) -> None:
    """Hold a path against the fingerprint that its case was planned with, if it had one.

    Raises:
        PlanError: It is another file now, or here.
    """
    if mark is not None and fingerprint(location, is_model=is_model) != mark:
        raise PlanError("is not what it was when the sweep was planned", where=location,
                        hint="run the sweep again")  # fmt: skip


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process or thread at a time; the system frees the lock of one that is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _again(url: str, action: Callable[[], Value]) -> Value:
    """Do it, a few times where the store fails.

    Raises:
        FormatError: It failed every time, or there is nothing at this URL.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError as error:
            raise FormatError("no such file or directory", where=url) from error
        except AprError:
            raise
        except Exception as error:  # stores raise whatever they like
            if attempt == ATTEMPTS:
                reason = str(error) or type(error).__name__
                raise FormatError(f"cannot be copied: {reason}", where=url) from error
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
    raise AssertionError("either the last attempt returns or it raises")


def _copy(url: str, target: Path, *, is_model: bool) -> None:
    """Copy a file to `target` and its neighbours beside it, or a directory's files below it."""
    system, root = _open_system(url)
    files = _remote_files(system, root, is_model=is_model)
    if not files:
        raise FileNotFoundError(url)
    is_single = any(name == "" for name, _ in files)
    for name, path in files:
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/"):
            raise FormatError(f"lists {name!r}, which is outside of it", where=url)
        file = target if name == "" else (target.parent if is_single else target).joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(path, str(file))
