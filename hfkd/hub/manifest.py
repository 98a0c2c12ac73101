"""Folders that are whole or not there: a manifest of every file, and a save that ends with one rename.

A checkpoint is written to a temporary folder beside its place, flushed to disk, closed with a manifest (name, size,
sha256 of each file), and renamed. A run killed at any moment therefore leaves the old folder, the new one or none,
and what it leaves behind has a name that no reader takes for a checkpoint.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from hfkd.errors import InputError


MANIFEST_NAME = "manifest.json"
_WRITING = ".tmp-"
_REPLACED = ".old-"


def file_sha256(path: Path | str) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path | str) -> Path:
    """Flush every file under `folder` to disk, then list them (name, size in bytes, sha256) in its manifest.

    Call it last: files written later are not covered. Returns the manifest's path.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    for path in [*paths, *(path for path in folder.rglob("*") if path.is_dir())]:
        _flush(path)
    entries = [
        {"name": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    ]
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps({"version": 1, "files": entries}, indent=1) + "\n", encoding="utf-8")
    _flush(manifest)
    _flush(folder)
    return manifest


def verify_manifest(folder: Path | str) -> None:
    """Compare every file of the manifest with the folder. Files that it does not list are none of its business.

    Raises:
        InputError: there is no manifest, it cannot be read, or a file that it lists is missing or altered.
    """
    folder = Path(folder)
    for name, size, sha256 in _entries(folder):
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing, though {MANIFEST_NAME} lists it; use another checkpoint")
        if path.stat().st_size != size:
            found = path.stat().st_size
            raise InputError(
                f"{path}: has {found} bytes instead of the {size} that were saved; use another checkpoint"
            )
        if file_sha256(path) != sha256:
            raise InputError(f"{path}: its content is not what was saved (sha256 differs); use another checkpoint")


def is_valid(folder: Path | str) -> bool:
    """Whether `verify_manifest` would pass."""
    try:
        verify_manifest(folder)
    except InputError:
        return False
    return True


@contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `target`, with a manifest, when the block ends without an error.

    An older `target` is replaced as a whole, and only once the new one is complete. On an error what was written is
    removed and `target` stays as it was.

    Raises:
        OSError: the disk is full or the place cannot be written to; also where safetensors says so in its own way.
    """
    target = Path(target)
    temporary = target.parent / f"{_WRITING}{target.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        write_manifest(temporary)
        _move_into_place(temporary, target)
    except SafetensorError as error:
        raise OSError(" ".join(str(error).split())) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep_leftovers(parent: Path | str) -> list[Path]:
    """Clean up after runs that were killed while they saved into `parent`; returns what was removed or restored.

    Unfinished folders are removed. A folder whose replacement was cut off between its two renames gets its name back.
    To be called by the one process that saves there, before its first save.
    """
    swept = []
    for path in sorted(Path(parent).glob(f"{_REPLACED}*")):
        target = path.with_name(path.name.removeprefix(_REPLACED).rpartition("-")[0])
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
        swept.append(path)
    for path in sorted(Path(parent).glob(f"{_WRITING}*")):
        shutil.rmtree(path, ignore_errors=True)
        swept.append(path)
    return swept


def _move_into_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    else:
        # A rename cannot replace a folder that has content, so the old one steps aside first.
        replaced = temporary.with_name(_REPLACED + temporary.name.removeprefix(_WRITING))
        target.rename(replaced)
        temporary.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    _flush(target.parent)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX opens folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[tuple[str, int, str]]:
    manifest = folder / MANIFEST_NAME
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        entries = [(str(entry["name"]), int(entry["size"]), str(entry["sha256"])) for entry in listed]
    except FileNotFoundError:
        raise InputError(f"{folder}: no {MANIFEST_NAME}, so its save never ended; use another checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{manifest}: not a manifest ({type(error).__name__}); use another checkpoint") from None
    for name, _, _ in entries:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{manifest}: lists {name!r}, which lies outside the folder; use another checkpoint")
    return entries
