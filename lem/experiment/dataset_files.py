"""Data sets in a folder of one's own: found by name, read with the standard library (parquet with `datasets`)."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.errors import EngineError

__all__ = ["Row", "dataset_error", "files_of", "find_local", "read_rows"]


Row = Mapping[str, Any] | str

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet")


def dataset_error(message: str, hint: str = "", *, is_permanent: bool = True) -> EngineError:
    """An error of kind `prompts`."""
    return EngineError(message, hint, kind="prompts", is_permanent=is_permanent)


def find_local(folder: Path, names: Sequence[str], subset: str | None, split: str) -> tuple[Path, ...]:
    """The files of a data set in a folder; () when it is not there.

    For a name it is `<name>.<suffix>`, or in a folder `<name>` (or its `<subset>`, or `data` in either, as a copy of a
    hub repository has it) `<split>.<suffix>`, the parts `<split>-*.<suffix>`, or the only data file. A hub name
    `owner/name` is also looked for as `owner__name`, `owner--name` and `name`.

    Raises:
        EngineError: kind `prompts`, a folder of that name in which no file can be told to be the split.
    """
    for name in names:
        for form in _forms(name):
            files = files_of(folder / form, subset, split)
            if files:
                return files
            for suffix in SUFFIXES:
                file = folder / f"{form}{suffix}"
                if file.is_file():
                    return (file,)
    return ()


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """The rows of data files in their order: objects, or texts of a `.txt` file, one a line.

    Raises:
        EngineError: kind `prompts`, a file that cannot be read or is not what its name says.
    """
    for file in files:
        try:
            yield from _READERS[file.suffix.lower()](file)
        except OSError as error:  # noqa: PERF203 (a few files, and each error names its own)
            raise dataset_error(f"{file}: cannot be read: {error.strerror or error}") from error
        except (ValueError, csv.Error) as error:
            raise dataset_error(f"{file}: not what its name says: {error}", "mend the file or take it away") from error


def _forms(name: str) -> tuple[str, ...]:
    if "/" not in name:
        return (name,)
    return (name, name.replace("/", "__"), name.replace("/", "--"), name.rsplit("/", 1)[1])


def files_of(place: Path, subset: str | None, split: str) -> tuple[Path, ...]:
    """The files of a split in a data set's own folder, or the one file the data set is; () where nothing is.

    Raises:
        EngineError: kind `prompts`, no file in the folder can be told to be the split, or the file is of no known kind.
    """
    if place.is_file():
        if place.suffix.lower() not in SUFFIXES:
            raise dataset_error(f"{place}: not a data file", f"known are {', '.join(SUFFIXES)}")
        return (place,)
    return _split_in(place, subset, split) if place.is_dir() else ()


def _split_in(folder: Path, subset: str | None, split: str) -> tuple[Path, ...]:
    places = [folder / subset, folder / subset / "data"] if subset is not None else []
    places += [folder, folder / "data"]
    for place in places:
        found = sorted(file for file in place.glob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        exact = [file for file in found if file.stem == split]
        parts = [file for file in found if file.stem.startswith(f"{split}-")]
        if exact or parts:
            return tuple(exact[:1] or parts)
        if len(found) == 1:
            return (found[0],)
        if found:
            names = ", ".join(file.name for file in found[:8])
            raise dataset_error(
                f"{place}: none of its data files is the split {split!r}: {names}",
                f"name one {split}.jsonl, or choose a split",
            )
    raise dataset_error(f"{folder}: no data file in it", f"put {split}.jsonl (or .json, .csv, .txt, .parquet) there")


def _read_jsonl(file: Path) -> Iterator[Row]:
    # Not universal newlines: text may hold characters that splitlines() would take for the end of a line.
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield _row(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _read_json(file: Path) -> Iterator[Row]:
    document = json.loads(file.read_text(encoding="utf-8-sig"))
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError("a list of objects is due, or an object with one such list")
        document = lists[0]
    if not isinstance(document, list):
        raise ValueError("a list of objects is due")
    return (_row(item) for item in document)


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a prompt may be longer than the 128 KiB that csv takes by default
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream, strict=True):
            yield {str(key): value for key, value in row.items() if key is not None}


def _read_text(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        for line in stream:
            yield line.rstrip("\r\n")


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise dataset_error(
            f"{file}: parquet needs the `datasets` package, which this Python does not have",
            "pip install datasets, or convert the file to .jsonl",
        ) from error
    yield from datasets.Dataset.from_parquet(str(file))


def _row(value: Any) -> Row:
    if not isinstance(value, (dict, str)):
        raise ValueError(f"an object is due, got {type(value).__name__}")
    return value


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
