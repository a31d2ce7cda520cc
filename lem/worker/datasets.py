"""Data sets: aliases, local folders, and the hub through the `datasets` package."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lem.base import durable
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.base.variables import (
    DATASETS_VARIABLE,
    DOWNLOAD_ONCE,
    HUB_FOLDER_VARIABLE,
    TOKEN_VARIABLE,
    is_cache_read_only,
)
from lem.config.experiment import DATASET_ALIASES, DatasetConfig, ExperimentConfig, HuggingFacePrompts
from lem.worker.prompts import (
    TEXT_COLUMNS,
    Prompt,
    ResolvedPrompts,
    as_measured,
    fingerprint,
    prompt_of_record,
    seed_of_draw,
    taken_from,
)

Row = Mapping[str, Any] | str  # an object, or a line of a `.txt` file
# The one file to read of a repository that holds several unlike ones.
DATA_FILES: Mapping[str, str] = MappingProxyType(
    {"anon8231489123/ShareGPT_Vicuna_unfiltered": "ShareGPT_V3_unfiltered_cleaned_split.json"}
)

_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")


@dataclass(frozen=True)
class DatasetChoice:
    name: str  # as the experiment names it, an alias or a hub name
    hub_name: str
    subset: str | None
    split: str
    column: str | None  # None looks for one of the usual names
    sample_size: int | None = None  # None takes every row
    shuffle_seed: int | None = None  # None takes the first rows


def choice_of(config: ExperimentConfig) -> DatasetChoice:
    """The data set an experiment asks for. Raises ValueError: it asks for none."""
    chosen = config.dataset if config.dataset is not None else config.prompts
    if isinstance(chosen, HuggingFacePrompts):
        choice = choice_of_name(chosen.dataset, chosen.subset, chosen.split, chosen.column)
        return replace(choice, sample_size=chosen.sample_size, shuffle_seed=chosen.seed if chosen.shuffle else None)
    if isinstance(chosen, DatasetConfig):
        choice = choice_of_name(chosen.name, None, chosen.split, chosen.column)
        return replace(choice, sample_size=chosen.sample_size)
    raise ValueError("the experiment takes no prompts from a data set")


def choice_of_name(
    name: str, subset: str | None = None, split: str | None = None, column: str | None = None
) -> DatasetChoice:
    """All of a data set, by alias or hub name; what is given wins over the alias."""
    alias = DATASET_ALIASES.get(name)
    if alias is None:
        return DatasetChoice(name, name, subset, split or "train", column)
    return DatasetChoice(name, alias.path, subset or alias.subset, split or alias.split, column or alias.column)


def resolve_dataset(
    config: ExperimentConfig, environ: Mapping[str, str], secrets: Mapping[str, str], draw: int = 0
) -> ResolvedPrompts:
    """The prompts of an experiment's data set, with its source, revision and hash.

    Rows without text are skipped and counted. Where there are fewer than `sample_size`, all of them are taken and a
    warning says so: a repeated prompt would meet a warm prefix cache.
    LEM_DATASETS_DIR is read from `environ`; the hub's own variables (HF_HOME, HF_HUB_OFFLINE) by its package. Raises
    EngineError: kind `prompts`; permanent unless it may be the network's fault.
    """
    choice = choice_of(config)
    rows: Iterable[Row]
    source: dict[str, Any]
    if files := find_files(choice, environ):
        rows = read_rows(files)
        source = {"kind": "local", "path": ", ".join(str(file) for file in files), "revision": None}
    else:
        rows, revision = _load_from_hub(choice, secrets.get(TOKEN_VARIABLE))
        source = {"kind": "hub", "revision": revision}
    drawn, warnings = _draw(rows, choice, draw)
    prompts = as_measured(drawn, config)
    chosen = {item.name: getattr(choice, item.name) for item in fields(choice) if item.name != "sample_size"}
    contents = {"sha256": fingerprint(prompts), "count": len(prompts), **taken_from(prompts)}
    return ResolvedPrompts(prompts, {**source, **chosen, **contents}, warnings)


def _error(message: str, hint: str = "", *, is_permanent: bool = True) -> EngineError:
    return EngineError(message, hint, kind="prompts", is_permanent=is_permanent)


# Local files


def find_files(choice: DatasetChoice, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The files of a data set that is a file or folder itself, or lies in the folder LEM_DATASETS_DIR; else ().

    In that folder it is `<name>.<suffix>`, or a folder `<name>`. A hub name `owner/name` is also looked for as
    `owner__name`, `owner--name` and `name`. Raises EngineError: kind `prompts`, the variable names no folder, or it is
    not clear which file is the split.
    """
    own = Path(choice.name)
    if choice.name == choice.hub_name and own.exists():
        return _files_of(own, choice)
    setting = environ.get(DATASETS_VARIABLE)
    if not setting:
        return ()
    folder = Path(setting)
    if not folder.is_dir():
        raise _error(f"{DATASETS_VARIABLE}={setting}: no such folder", "set it to a folder of data sets, or unset it")
    for name in dict.fromkeys((choice.name, choice.hub_name)):
        forms = (name, name.replace("/", "__"), name.replace("/", "--"), name.rpartition("/")[2])
        for form in dict.fromkeys(forms):
            if files := _files_of(folder / form, choice):
                return files
            for file in (folder / f"{form}{suffix}" for suffix in _READERS):
                if file.is_file():
                    return (file,)
    return ()


def _files_of(place: Path, choice: DatasetChoice) -> tuple[Path, ...]:
    """The files of a split in a data set's own folder, or the one file the data set is; () where nothing is.

    In a folder (or its `<subset>`, or `data` in either, as a copy of a hub repository has it) they are
    `<split>.<suffix>`, the parts `<split>-*.<suffix>`, or the only data file.
    """
    if place.is_file():
        if place.suffix.lower() not in _READERS:
            raise _error(f"{place}: not a data file", f"supported: {', '.join(_READERS)}")
        return (place,)
    if not place.is_dir():
        return ()
    split = choice.split
    folders = [place / choice.subset, place / choice.subset / "data"] if choice.subset is not None else []
    for folder in (*folders, place, place / "data"):
        found = sorted(file for file in folder.glob("*") if file.suffix.lower() in _READERS and file.is_file())
        exact = [file for file in found if file.stem == split]
        parts = [file for file in found if file.stem.startswith(f"{split}-")]
        if exact or parts:
            return tuple(exact[:1] or parts)
        if len(found) == 1:
            return (found[0],)
        if found:
            names = ", ".join(file.name for file in found[:8])
            message = f"{folder}: no data file for the split {split!r}; found {names}"
            raise _error(message, f"rename one to {split}.jsonl, or choose another split")
    raise _error(f"{place}: no data files", f"add {split}.jsonl (or .json, .csv, .txt, .parquet)")


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        try:
            yield from _READERS[file.suffix.lower()](file)
        except OSError as error:  # noqa: PERF203 (a few files, and each error names its own)
            raise _error(f"{file}: cannot be read: {error.strerror or error}") from error
        except (ValueError, csv.Error) as error:
            message = f"{file}: not a valid {file.suffix.lstrip('.')} file: {error}"
            raise _error(message, "repair or remove the file") from error


def _read_jsonl(file: Path) -> Iterator[Row]:
    # Not universal newlines: text may hold characters that splitlines() would take for the end of a line.
    with durable.open_text(file, "\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield _row(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _read_json(file: Path) -> Iterator[Row]:
    document = json.loads(durable.read_bytes(file).decode("utf-8-sig"))
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError("expected a list of objects, or an object with one such list")
        document = lists[0]
    if not isinstance(document, list):
        raise ValueError("expected a list of objects")
    return map(_row, document)


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a prompt may be longer than the 128 KiB that csv takes by default
    with durable.open_text(file, "") as stream:
        for row in csv.DictReader(stream, strict=True):
            yield {str(key): value for key, value in row.items() if key is not None}


def _read_text(file: Path) -> Iterator[Row]:
    with durable.open_text(file, "\n") as stream:
        for line in stream:
            yield line.rstrip("\r\n")


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        message = f"{file}: Parquet files need the `datasets` package, which is not installed in this Python"
        raise _error(message, "pip install datasets, or convert the file to .jsonl") from error
    yield from datasets.Dataset.from_parquet(str(file))


def _row(value: Any) -> Row:
    if not isinstance(value, (dict, str)):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


# The hub


def is_in_hub_cache(choice: DatasetChoice, environ: Mapping[str, str]) -> bool:
    """Whether files of a hub data set lie in the hub's cache (HF_HUB_CACHE, HF_HOME), so that no network is needed."""
    cache_home = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(environ.get(HUB_FOLDER_VARIABLE) or Path(cache_home) / "huggingface")
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    return any((cache / f"datasets--{choice.hub_name.replace('/', '--')}" / "snapshots").glob("*/*"))


def _load_from_hub(choice: DatasetChoice, token: str | None) -> tuple[Iterable[Row], str | None]:
    try:
        import datasets
    except ImportError as error:
        message = f"data set {choice.name}: the `datasets` package is not installed in the engine's Python"
        hint = f"pip install datasets there, or put a copy of {choice.hub_name} into the folder of {DATASETS_VARIABLE}"
        raise _error(message, hint) from error
    name, split = choice.hub_name, choice.split
    files = {split: DATA_FILES[name]} if name in DATA_FILES else None
    with _writable_cache(Path(datasets.config.HF_DATASETS_CACHE), datasets.config.HF_HUB_OFFLINE) as cache:
        try:
            loaded = datasets.load_dataset(
                name, choice.subset, split=split, data_files=files, token=token, cache_dir=cache
            )
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            # In offline mode it would fail the same way again.
            may_pass = isinstance(error, ConnectionError) and not datasets.config.HF_HUB_OFFLINE
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            message = f"data set {choice.name} ({name}, split {split}): {first_line}"
            check = DOWNLOAD_ONCE if is_cache_read_only() else "check name, subset, split and network"
            hint = f"{check}; or put a copy into the folder of {DATASETS_VARIABLE}"
            raise _error(message, hint, is_permanent=not may_pass) from error
    # `datasets` keeps the commit in the names of what it downloaded and of its cache.
    names = [*(loaded.info.download_checksums or {}), *(item["filename"] for item in loaded.cache_files)]
    return loaded, next((found.group() for file in names if (found := _COMMIT.search(str(file)))), None)


@contextlib.contextmanager
def _writable_cache(folder: Path, is_offline: bool) -> Iterator[str | None]:
    """None, or a folder in place of the cache of `datasets`, which locks what it reads, if that is read-only.

    Offline it holds links to what was prepared; online, data sets are prepared again from what the hub's cache holds.
    """
    if not folder.is_dir() or os.access(folder, os.W_OK):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="lem-datasets-", ignore_cleanup_errors=True) as scratch:
        for item in folder.iterdir() if is_offline else ():
            Path(scratch, item.name).symlink_to(item)
        yield scratch


# Rows


def _draw(rows: Iterable[Row], choice: DatasetChoice, draw: int) -> tuple[tuple[Prompt, ...], tuple[Reason, ...]]:
    found: list[Prompt] = []
    skipped: list[str] = []
    for row in rows:
        if choice.shuffle_seed is None and len(found) == choice.sample_size:
            break
        try:
            found.append(_prompt_of(row, choice))
        except ValueError as error:
            skipped.append(str(error))
    if not found:
        why = f": {skipped[0]}" if skipped else ""
        raise _error(f"data set {choice.name}: no prompts found{why}", "choose another column or split")
    if choice.shuffle_seed is not None:
        shuffle(found, seed_of_draw(choice.shuffle_seed, draw))
    wanted = choice.sample_size
    chosen = tuple(found[:wanted])
    warnings = [Reason.of("rows_skipped", name=choice.name, skipped=len(skipped))] if skipped else []
    if wanted is not None and len(chosen) < wanted:
        warnings.append(Reason.of("dataset_too_small", name=choice.name, wanted=wanted, found=len(chosen)))
    return chosen, tuple(warnings)


def shuffle(items: list[Any], seed: int | str) -> None:
    """Bring the items into another order (Fisher and Yates), the same for the same seed in every Python."""
    rng = random.Random(seed)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]


def _prompt_of(row: Row, choice: DatasetChoice) -> Prompt:
    """The prompt in a row; ValueError: there is none in it."""
    if isinstance(row, str):
        return prompt_of_record(row)
    column = choice.column or next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None or column not in row:
        wanted = f"no column {column!r}" if column else "no column that usually holds text"
        message = f"data set {choice.name}: {wanted}; it has {', '.join(sorted(row))}"
        raise _error(message, "set dataset.column to one of them")
    return prompt_of_record(row, (column,))
