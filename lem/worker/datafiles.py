"""Files of a data set on this machine: which are those of a split, and their rows.

A folder is read as the `datasets` package (5.2) reads it, or refused: a layout that it would read in another way is an
error that names the files.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.errors import EngineError
from lem.worker.prompts import PACKED, list_of_json, suffix_of, unpacked
from lem.worker.shapes import json_of

Row = Mapping[str, Any] | str  # an object, or a line of a `.txt` file
prompts_error = functools.partial(EngineError, kind="prompts", is_permanent=True)

# Which files are a split's, by a word in the name of a folder, else of the file.
_WORDS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
_BREAK = "[-._ 0-9]"
_OF_FOLDER = {split: re.compile(f"(?:^|{_BREAK})(?:{words})(?:$|{_BREAK})") for split, words in _WORDS.items()}
_OF_FILE = {split: re.compile(f"(?:^|{_BREAK})(?:{words}){_BREAK}") for split, words in _WORDS.items()}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_SPLIT = re.compile(r"(\w+(?:\.\w+)*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_NOT_DATA = ("readme.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_DOCUMENTS = (".txt", ".md", ".toml")  # which `datasets` counts as data
_UNCERTAIN = "?"
_OTHER_FORMATS = (".arrow", ".tsv", ".zip", ".tar", ".xml", ".hdf5", ".h5", ".tgz", ".zst", ".bz2", ".xz")
_NO_PROMPTS = re.compile("licen[cs]e|copying|notice|readme|changelog|requirements|authors", re.IGNORECASE)
# The lines of `configs` in the card of a data set that lem understands: a key with or without a value, or a value.
_CARD_LINE = re.compile(r"\s*(- )?\s*(?:(config_name|default|data_files|split|path):(?: +|$))?(.*)")
_PATTERN = re.compile(
    r"(?![/~]|[./]+$)(?!.*(?:\.\.|://|\*\*[^/]|[^/]\*\*))[^\[\]{}&|>!#:]+"
)  # of files, below the folder
_NAME_ONE = "name the file: `dataset: FOLDER/FILE`"


def split_name(split: str) -> str:
    """`train` of `train[:2]`; EngineError: neither a split nor a slice of one."""
    found = _SPLIT.fullmatch(split)
    if found is None:
        raise prompts_error(f"split {split!r}: expected a name, or a slice such as train[:100] or train[:10%]")
    return found[1]


def sliced(rows: Iterable[Row], split: str) -> Iterable[Row]:
    found = _SPLIT.fullmatch(split)
    if found is None or "[" not in split:
        return rows
    whole = list(rows)
    is_percent = "%" in split

    def bound(text: str | None) -> int | None:
        number = None if text is None else int(text.rstrip("%"))
        return round(number * len(whole) / 100) if is_percent and number is not None else number

    return whole[bound(found[2]) : bound(found[3])]


def files_of_split(place: Path, split: str, subset: str | None, usual: tuple[str, str | None]) -> tuple[Path, ...]:
    wanted, (usual_split, usual_subset) = split_name(split), usual
    if place.is_file():
        if suffix_of(place) not in _READERS:
            raise prompts_error(f"{place}: not a data file", f"supported: {', '.join(_READERS)}")
        if wanted not in ("train", usual_split) or subset not in (None, usual_subset):
            asked = f"split {wanted!r}" if wanted not in ("train", usual_split) else f"subset {subset!r}"
            raise prompts_error(f"{place}: a single file has no {asked}", "remove it, or name a folder with the splits")
        return (place,)
    described = _splits_of_card(place, subset)
    if described is not None:
        splits = described
    elif subset is None or (subset == usual_subset and not (place / subset).is_dir()):
        splits = _splits_in(place)
    elif (place / subset).is_dir():
        splits = _splits_in(place / subset)
    else:
        raise prompts_error(f"{place}: no subset {subset!r}", "remove subset, or choose a folder in it")
    formats = {split: _format_of_split(files) for split, files in splits.items()}
    empty = [split for split, found in formats.items() if not found]
    if empty or not formats:
        of_splits = f" for the split {', '.join(empty)}" if empty else ""
        raise prompts_error(f"{place}: no data files{of_splits}", "add train.jsonl (or .json, .csv, .txt, .parquet)")
    if wanted not in splits:
        message = f"{place}: no data file for the split {wanted!r}; it has {', '.join(splits)}"
        raise prompts_error(message, "choose one of these splits, or " + _NAME_ONE)
    if _UNCERTAIN in formats.values() or len(set(formats.values())) > 1:
        listed = ", ".join(file.name for files in splits.values() for file in files[:4])
        raise prompts_error(f"{place}: files of several formats, or of one that lem does not read: {listed}", _NAME_ONE)
    return _whole([file for file in splits[wanted] if _FAMILY.get(_format_of(file)) == formats[wanted]])


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    shown = (file for file in sorted(folder.rglob("*")) if _is_shown(file, folder))
    files = {file: file.relative_to(folder).parts for file in shown if file.name.lower() not in _NOT_DATA}
    found: dict[str, list[Path]] = {}
    for file, at in files.items():
        if len(at) == 2 and at[0] == "data" and (part := _PART.match(at[1])):
            found.setdefault(part[1], []).append(file)
    if found:
        return found
    for words, where in ((_OF_FOLDER, slice(-1)), (_OF_FILE, slice(-1, None))):
        for split, word in words.items():
            if chosen := [file for file, at in files.items() if any(map(word.search, at[where]))]:
                found[split] = chosen
        if found:
            return found
    return {"train": list(files)} if files else {}


def _is_shown(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)


def _format_of(file: Path) -> str:
    suffix = suffix_of(file)
    if suffix in _FAMILY and file.name.endswith((suffix, f"{suffix}{PACKED}")):  # not in capitals
        return suffix
    suffixes = [f".{part}" for part in file.name.lower().split(".")[1:]]
    return _UNCERTAIN if any(item in _FAMILY or item in _OTHER_FORMATS for item in suffixes) else ""


def _format_of_split(files: Iterable[Path]) -> str:
    """The one format of the data files of a split; "" if there are none, `_UNCERTAIN` if there are several."""
    # Documents beside other data are not counted, as long as they are not more.
    counts = Counter(filter(None, map(_format_of, files)))
    documents = {suffix: counts.pop(suffix) for suffix in _DOCUMENTS if suffix in counts}
    found = {_FAMILY.get(suffix, suffix) for suffix in counts} or set(documents)
    if len(found) > 1 or (counts and max(documents.values(), default=0) > max(counts.values())):
        return _UNCERTAIN
    return next(iter(found), "") if found <= {*_READERS} else _UNCERTAIN


def _whole(chosen: Sequence[Path]) -> tuple[Path, ...]:
    doubtful = next((file for file in chosen if _format_of(file) == ".txt" and _NO_PROMPTS.match(file.name)), None)
    if doubtful is not None:
        raise prompts_error(f"{doubtful}: expected prompts, found a document", _NAME_ONE)
    parts = {file.name: found for file in chosen if (found := _PART.match(file.name))}
    for name, found in parts.items():
        there = {other[2] for other in parts.values() if (other[1], other[3]) == (found[1], found[3])}
        missing = [number for number in range(int(found[3])) if f"{number:05}" not in there]
        if missing:
            message = f"{chosen[0].parent}: {name} is one of {int(found[3])} parts, and part {missing[0]:05} is missing"
            raise prompts_error(message, "download the missing files, or " + _NAME_ONE)
    return tuple(chosen)


def _splits_of_card(folder: Path, subset: str | None) -> dict[str, list[Path]] | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        patterns, usual = _configs_of(card)
    except (OSError, ValueError) as error:
        raise prompts_error(f"{card}: cannot be read: {error}", _NAME_ONE) from error
    if not patterns:
        return None
    chosen = subset or usual or ("default" if "default" in patterns or len(patterns) > 1 else next(iter(patterns)))
    if chosen not in patterns:
        names = ", ".join(patterns)
        message = f"{folder}: no subset {subset!r}; it has {names}" if subset else f"{folder}: it has subsets: {names}"
        raise prompts_error(message, "choose one of them, with type: huggingface and subset")
    return {
        split: sorted({file for pattern in named for file in folder.glob(pattern) if _is_shown(file, folder)})
        for split, named in patterns[chosen].items()
    }


def _configs_of(card: Path) -> tuple[dict[str, dict[str, list[str]]], str | None]:
    with durable.open_text(card) as stream:
        lines = [line.rstrip() for line in stream]
    top = itertools.takewhile(lambda line: line != "---", lines[1:]) if lines[:1] == ["---"] else ()
    body = itertools.dropwhile(lambda line: not line.startswith("configs:"), top)
    found: dict[str, dict[str, list[str]]] = {}
    usual: str | None = None
    subset = split = ""
    for line in itertools.takewhile(lambda line: line.startswith(("-", " ", "configs:")) or not line, body):
        dash, key, text = _CARD_LINE.fullmatch(line).groups()  # type: ignore[union-attr] # it matches every line
        value = text.strip("'\"")
        if dash and key == "config_name" and value:
            subset, split = value, "train"
            found[subset] = {}
        elif dash and key == "split" and subset and value:
            split = value
        elif not dash and key == "default" and subset:
            usual = subset if value == "true" else usual
        elif subset and _PATTERN.fullmatch(value) and (dash is None) == (key in ("data_files", "path")):
            found[subset].setdefault(split, []).append(value)
        elif line not in ("", "configs:") and (dash or value or key not in ("data_files", "path")):
            raise prompts_error(f"{card}: `configs` has a line that lem does not understand: {line.strip()}", _NAME_ONE)
    return found, usual


# Rows


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        try:
            yield from _READERS[suffix_of(file)](file)
        except OSError as error:  # noqa: PERF203 (a few files, and each error names its own)
            raise prompts_error(f"{file}: cannot be read: {error.strerror or error}") from error
        except (ValueError, EOFError, csv.Error, zlib.error) as error:
            message = f"{file}: not a valid {suffix_of(file).lstrip('.')} file: {error}"
            raise prompts_error(message, "repair or remove the file") from error


@contextlib.contextmanager
def _open(file: Path, newline: str) -> Iterator[io.TextIOWrapper]:
    with durable.open_regular(file) as stream, unpacked(stream, file) as content:
        yield io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)


def _read_lines(file: Path) -> Iterator[Row]:
    # Not universal newlines: text may hold characters that splitlines() would take for the end of a line.
    with _open(file, "\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield _row(json_of(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _read_json(file: Path) -> Iterator[Row]:
    with _open(file, "\n") as stream:
        listed = list_of_json(stream.read())
    return _read_lines(file) if listed is None else map(_row, listed)


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a prompt may be longer than the 128 KiB that csv takes by default
    with _open(file, "") as stream:
        for row in csv.DictReader(stream, strict=True):
            yield {str(key): value for key, value in row.items() if key is not None}


def _read_text(file: Path) -> Iterator[Row]:
    with _open(file, "\n") as stream:
        for line in stream:
            yield line.rstrip("\r\n")


def _read_parquet(file: Path) -> Iterator[Row]:
    # Not through `datasets`, whose cache knows a file by its path and time stamp only.
    try:
        import pyarrow.parquet
    except ImportError as error:
        message = f"{file}: Parquet files need the package pyarrow, which is not installed in this Python"
        raise prompts_error(message, "pip install pyarrow (`datasets` does too), or convert it to .jsonl") from error
    with durable.open_regular(file) as stream:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches():
            yield from batch.to_pylist()


def _row(value: Any) -> Row:
    if not isinstance(value, (dict, str)):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


_READERS = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(f"{suffix}{packed}" for suffix in _READERS for packed in ("", PACKED))
# Suffixes of one format, which may be side by side; `datasets` would read documents as one of its own.
_FAMILY = {suffix: suffix for suffix in (*_READERS, *_DOCUMENTS)} | {".jsonl": ".json", ".ndjson": ".json"}
