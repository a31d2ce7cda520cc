"""Data sets: aliases, the hub through `datasets`, local folders."""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.base.variables import DATASETS_VARIABLE, HUB_FOLDER_VARIABLE, TOKEN_VARIABLE
from lem.config.experiment import DATASET_ALIASES, DatasetConfig, ExperimentConfig, HuggingFacePrompts
from lem.worker.prompts import Prompt, ResolvedPrompts, fingerprint, shuffled, text_of_record

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


_logger = logging.getLogger(__name__)

# Looked for in this order when no column is named.
TEXT_COLUMNS = ("prompt", "text", "instruction", "question", "messages", "conversations", "input", "query", "content")

_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")


# The one file to read of a repository that holds several unlike ones.
DATA_FILES: Mapping[str, str] = MappingProxyType(
    {"anon8231489123/ShareGPT_Vicuna_unfiltered": "ShareGPT_V3_unfiltered_cleaned_split.json"}
)


@dataclass(frozen=True)
class DatasetChoice:
    """What to take from which data set.

    Attributes:
        name: as the experiment names it, an alias or a hub name.
        column: None looks for one of the usual names.
        sample_size: None takes every row.
        seed: of the shuffle; None shuffles differently each time.
    """

    name: str
    hub_name: str
    subset: str | None
    split: str
    column: str | None
    sample_size: int | None = None
    is_shuffled: bool = False
    seed: int | None = None


def choice_of(config: ExperimentConfig) -> DatasetChoice:
    """The data set an experiment asks for, aliases resolved; what it gives explicitly wins over the alias.

    Raises:
        ValueError: it asks for none.
    """
    chosen = config.dataset if config.dataset is not None else config.prompts
    if isinstance(chosen, HuggingFacePrompts):
        choice = choice_of_name(chosen.dataset, chosen.subset, chosen.split, chosen.column)
        return replace(choice, sample_size=chosen.sample_size, is_shuffled=chosen.shuffle, seed=chosen.seed)
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
    config: ExperimentConfig, environ: Mapping[str, str], secrets: Mapping[str, str]
) -> ResolvedPrompts:
    """The prompts of an experiment's data set, with its source, revision and hash.

    Without `shuffle` the first rows are taken. Rows without text are skipped and counted. Where there are fewer than
    `sample_size`, all of them are taken and a warning says so: a repeated prompt would meet a warm prefix cache.

    Args:
        environ: LEM_DATASETS_DIR is read from it; the hub's own variables (HF_HOME, HF_HUB_OFFLINE) by its package.
        secrets: HF_TOKEN, for data sets that ask for one.

    Raises:
        EngineError: kind `prompts`; permanent unless the network may be to blame.
    """
    choice = choice_of(config)
    files = find_files(choice, environ)
    if files:
        rows: Iterable[Row] = read_rows(files)
        source: dict[str, Any] = {"kind": "local", "path": ", ".join(str(file) for file in files), "revision": None}
    else:
        rows, revision = _load_from_hub(choice, secrets.get(TOKEN_VARIABLE))
        source = {"kind": "hub", "revision": revision}
    prompts, warnings = _draw(rows, choice)
    source.update(
        name=choice.name,
        hub_name=choice.hub_name,
        subset=choice.subset,
        split=choice.split,
        column=choice.column,
        shuffle_seed=choice.seed if choice.is_shuffled else None,
        sha256=fingerprint(prompts),
        count=len(prompts),
    )
    return ResolvedPrompts(prompts, source, warnings)


def find_files(choice: DatasetChoice, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The files of a data set that is a file or folder itself, or lies in the folder LEM_DATASETS_DIR; else ().

    Raises:
        EngineError: kind `prompts`, the variable names no folder, or one whose files cannot be told apart.
    """
    own = Path(choice.name)
    if choice.name == choice.hub_name and own.exists():
        return files_of(own, choice.subset, choice.split)
    setting = environ.get(DATASETS_VARIABLE)
    if not setting:
        return ()
    folder = Path(setting)
    if not folder.is_dir():
        raise dataset_error(
            f"{DATASETS_VARIABLE}={setting}: no such folder", "set it to a folder of data sets, or unset it"
        )
    return find_local(folder, tuple(dict.fromkeys((choice.name, choice.hub_name))), choice.subset, choice.split)


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
        raise dataset_error(
            f"data set {choice.name}: the `datasets` package is not installed in the engine's Python",
            f"pip install datasets there, or put a copy of {choice.hub_name} into the folder {DATASETS_VARIABLE} names",
        ) from error
    data_file = DATA_FILES.get(choice.hub_name)
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        loaded = datasets.load_dataset(
            choice.hub_name,
            choice.subset,
            split=choice.split,
            data_files=None if data_file is None else {choice.split: data_file},
            token=token,
        )
    except failures as error:
        # Told to stay offline, it would fail the same way again.
        may_pass = isinstance(error, ConnectionError) and not datasets.config.HF_HUB_OFFLINE
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise dataset_error(
            f"data set {choice.name} ({choice.hub_name}, split {choice.split}): {first_line}",
            f"check name, subset, split and network; or put a copy into the folder {DATASETS_VARIABLE} names",
            is_permanent=not may_pass,
        ) from error
    return loaded, _revision_of(loaded)


def _revision_of(loaded: Any) -> str | None:
    """The commit of a hub data set; `datasets` keeps it in the names of what it downloaded and of its cache."""
    names = [*(loaded.info.download_checksums or {}), *(item["filename"] for item in loaded.cache_files)]
    return next((found.group() for name in names if (found := _COMMIT.search(str(name)))), None)


def _draw(rows: Iterable[Row], choice: DatasetChoice) -> tuple[tuple[Prompt, ...], tuple[Reason, ...]]:
    texts: list[str] = []
    skipped = 0
    for row in rows:
        if not choice.is_shuffled and len(texts) == choice.sample_size:
            break
        text = _text_of(row, choice)
        if text is None:
            skipped += 1
        else:
            texts.append(text)
    if not texts:
        raise dataset_error(f"data set {choice.name}: no prompts in it", "choose another column or split")
    if choice.is_shuffled:
        texts = shuffled(texts, choice.seed)
    wanted = choice.sample_size
    chosen = tuple(Prompt(text) for text in texts[:wanted])
    warnings = []
    if skipped:
        warnings.append(Reason.of("rows_skipped", name=choice.name, skipped=skipped))
    if wanted is not None and len(chosen) < wanted:
        warnings.append(Reason.of("dataset_too_small", name=choice.name, wanted=wanted, found=len(chosen)))
    return chosen, tuple(warnings)


def _text_of(row: Row, choice: DatasetChoice) -> str | None:
    """The prompt in a row; None when there is no text in it."""
    if isinstance(row, str):
        return row if row.strip() else None
    column = choice.column or next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None or column not in row:
        wanted = f"no column {column!r}" if column else "no column that usually holds text"
        raise dataset_error(
            f"data set {choice.name}: {wanted}; it has {', '.join(sorted(row))}", "name one of them as dataset.column"
        )
    value = row[column]
    if value is None or value == "":
        return None
    key = column if column in ("messages", "conversations") else "prompt"
    if isinstance(value, list) and key == "prompt":
        raise dataset_error(
            f"data set {choice.name}: column {column!r} holds lists, not text", "name another as dataset.column"
        )
    try:
        return text_of_record({key: value})
    except ValueError as error:
        _logger.debug("data set %s: a row was skipped: %s", choice.name, error)
        return None
