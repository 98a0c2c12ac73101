"""The results file: one CSV row per metric of a finished run, appended whole or not at all."""

import csv
import fcntl
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hfkd.errors import InputError, RunError


COLUMNS = (
    "recipe",
    "arm",
    "dataset",
    "n_train",
    "n_test",
    "seed",
    "metric",
    "value",
    "wall_s",
    "hardware",
    "versions",
)
Row = dict[str, str]


def read_csv(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of `path`, none where it does not exist. Raises `InputError` for a file with other columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise InputError(
            f"{path}: has the columns {reader.fieldnames} instead of {', '.join(columns)}: name another file."
        )
    return rows


def append_csv(path: Path, columns: Sequence[str], rows: Sequence[Row], key: Sequence[str] = ()) -> None:
    """Add `rows` to `path` so that a kill at any moment leaves either all of them or none.

    The new file is written beside the old one and renamed over it, under a lock on the folder. With `key`, rows that
    agree in these columns with one that is already there are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent, wait=True):
        present = {tuple(row[name] for name in key) for row in read_csv(path, columns) if key}
        before = path.read_text(encoding="utf-8") if path.exists() else ",".join(columns) + "\n"
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writerows(row for row in rows if tuple(row[name] for name in key) not in present)
        write_atomically(path, before + text.getvalue())


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def exclusive(folder: Path, *, wait: bool = False) -> Iterator[int]:
    """Hold `folder` alone, for as long as this block or a child that got the yielded file descriptor lives.

    Raises:
        RunError: another process holds it, and `wait` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunError(
                f"{folder}: another process, perhaps a run that a killed study left behind, still works here; "
                "wait for it or end it."
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)
