"""Data sets: aliases, local folders, and the hub through the `datasets` package."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lem.base import durable, variables
from lem.base.dataclass import dataclass, replace
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.config.sections import DATASET_ALIASES, DatasetConfig, HuggingFacePrompts
from lem.worker.datafiles import SUFFIXES, Row, files_of_split, prompts_error, read_rows, sliced, split_name
from lem.worker.prompts import ResolvedPrompts, as_measured, fingerprint, seed_of_draw, taken_from
from lem.worker.shapes import ROWS_TO_LOOK_AT, TEXT_COLUMNS, Prompt, prompt_of_record, usable_columns

_BY_HUB_NAME = {alias.path: alias for alias in DATASET_ALIASES.values()}
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
    columns: tuple[str, ...]  # () looks for one of the usual names
    sample_size: int | None = None  # None takes every row
    shuffle_seed: int | None = None  # None takes the first rows


def choice_of(config: ExperimentConfig) -> DatasetChoice:
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
    alias = DATASET_ALIASES.get(name) or _BY_HUB_NAME.get(name)
    given = () if column is None else (column,)
    if alias is None:
        return DatasetChoice(name, name, subset, split or "train", given)
    return DatasetChoice(name, alias.path, subset or alias.subset, split or alias.split, given or alias.columns)


def resolve_dataset(
    config: ExperimentConfig, environ: Mapping[str, str], secrets: Mapping[str, str], draw: int = 0
) -> ResolvedPrompts:
    """The prompts of an experiment's data set, with its source, revision and hash."""
    # Rows without a prompt are skipped and counted. Where there are fewer than `sample_size`, all of them are taken and
    # a warning says so: a repeated prompt would meet a warm prefix cache. LEM_DATASETS_DIR is read from `environ`; the
    # hub's own variables (HF_HOME, HF_HUB_OFFLINE) by its package. Raises EngineError: kind `prompts`; permanent unless
    # it may be the network's fault.
    choice = choice_of(config)
    rows: Iterable[Row]
    source: dict[str, Any]
    if files := find_files(choice, environ):
        rows = sliced(read_rows(files), choice.split)
        source = {"kind": "local", "path": ", ".join(str(file) for file in files), "revision": None}
    else:
        rows, revision = _load_from_hub(choice, secrets.get(variables.TOKEN_VARIABLE))
        source = {"kind": "hub", "revision": revision}
    drawn, warnings = _draw(rows, choice, draw)
    prompts = as_measured(drawn, config)
    names = ("name", "hub_name", "subset", "split", "shuffle_seed")
    chosen = {**{name: getattr(choice, name) for name in names}, "column": ", ".join(choice.columns) or None}
    contents = {"sha256": fingerprint(prompts), "count": len(prompts), **taken_from(prompts)}
    return ResolvedPrompts(prompts, {**source, **chosen, **contents}, warnings)


def check_dataset(config: ExperimentConfig, environ: Mapping[str, str], secrets: Mapping[str, str]) -> None:
    choice = choice_of(config)
    if find_files(choice, environ):
        resolve_dataset(config, environ, secrets)
    else:
        _load_from_hub(choice, secrets.get(variables.TOKEN_VARIABLE), is_check=True)


# Local files


def find_files(choice: DatasetChoice, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The files of a data set that is a file or folder itself, or is in the folder LEM_DATASETS_DIR; else ()."""
    # In that folder it is `<name>.<suffix>`, or a folder `<name>`. A hub name `owner/name` is also looked for as
    # `owner__name`, `owner--name` and `name`. Raises EngineError: kind `prompts`, the variable names no folder, or it
    # is not certain which files are the split.
    alias = DATASET_ALIASES.get(choice.name) or _BY_HUB_NAME.get(choice.name)
    usual = ("train", None) if alias is None else (alias.split, alias.subset)
    own = durable.in_home(choice.name)
    if choice.name == choice.hub_name and _is_there(own):
        return files_of_split(own, choice.split, choice.subset, usual)
    setting = environ.get(variables.DATASETS_VARIABLE)
    if not setting:
        return ()
    folder = Path(setting)
    if not folder.is_dir():
        hint = "set it to a folder of data sets, or unset it"
        raise prompts_error(f"{variables.DATASETS_VARIABLE}={setting}: no such folder", hint)
    names = (choice.name, choice.hub_name)
    forms = [name.replace("/", mark) for name in names for mark in ("/", "__", "--")]
    forms += [name.rpartition("/")[2] for name in names]
    places = dict.fromkeys(folder / f"{form}{suffix}" for form in forms for suffix in ("", *SUFFIXES))
    found = [place for place in places if _is_there(place)]
    if len(found) > 1:
        both = f"found {found[0]} and {found[1]}"
        raise prompts_error(f"data set {choice.name}: {both}", "rename or remove one of them")
    return files_of_split(found[0], choice.split, choice.subset, usual) if found else ()


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - False also for a name too long


# The hub


def is_in_hub_cache(choice: DatasetChoice, environ: Mapping[str, str]) -> bool:
    cache_home = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(environ.get(variables.HUB_FOLDER_VARIABLE) or Path(cache_home) / "huggingface")
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    return any((cache / f"datasets--{choice.hub_name.replace('/', '--')}" / "snapshots").glob("*/*"))


def _load_from_hub(
    choice: DatasetChoice, token: str | None, *, is_check: bool = False
) -> tuple[Iterable[Row], str | None]:
    try:
        import datasets
    except ImportError as error:
        message = f"data set {choice.name}: the `datasets` package is not installed in the engine's Python"
        folder = f"the folder of {variables.DATASETS_VARIABLE}"
        hint = f"pip install datasets there, or put a copy of {choice.hub_name} into {folder}"
        raise prompts_error(message, hint) from error
    name, split = choice.hub_name, choice.split
    files = {split_name(split): DATA_FILES[name]} if name in DATA_FILES else None
    with _writable_cache(Path(datasets.config.HF_DATASETS_CACHE), datasets.config.HF_HUB_OFFLINE) as cache:
        where = {"data_files": files, "token": token, "cache_dir": cache}
        found: Any = None
        loaded: Any = None
        try:
            if is_check:
                found = datasets.load_dataset_builder(name, choice.subset, **where)
            else:
                loaded = datasets.load_dataset(name, choice.subset, split=split, **where)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            # In offline mode it would fail the same way again.
            may_pass = isinstance(error, ConnectionError) and not datasets.config.HF_HUB_OFFLINE
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            message = f"data set {choice.name} ({name}, split {split}): {first_line}"
            check = (
                variables.DOWNLOAD_ONCE if variables.is_cache_read_only() else "check name, subset, split and network"
            )
            hint = f"{check}; or put a copy into the folder of {variables.DATASETS_VARIABLE}"
            raise prompts_error(message, hint, is_permanent=not may_pass) from error
    if is_check:
        _check_split(choice, found.info.splits or found.config.data_files)
        return (), None
    # `datasets` keeps the commit in the names of what it downloaded and of its cache.
    names = [*(loaded.info.download_checksums or {}), *(item["filename"] for item in loaded.cache_files)]
    return loaded, next((found.group() for file in names if (found := _COMMIT.search(str(file)))), None)


def _check_split(choice: DatasetChoice, found: Iterable[Any] | None) -> None:
    known = sorted(found or ())
    for name in (re.split(r"[\[(]", part)[0] for part in choice.split.split("+")):
        if known and name not in (*known, "all"):
            place = f"data set {choice.name} ({choice.hub_name}, split {choice.split})"
            message = f"{place}: it has no split {name}; it has {', '.join(map(str, known))}"
            raise prompts_error(message, "check name, subset and split", is_permanent=True)


@contextlib.contextmanager
def _writable_cache(folder: Path, is_offline: bool) -> Iterator[str | None]:
    """None, or a folder in place of the cache of `datasets`, which locks what it reads, if that is read-only."""
    # Offline it holds links to what was prepared; online, data sets are prepared again from what the hub's cache holds.
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
    rows = iter(rows)
    first = list(itertools.islice(rows, ROWS_TO_LOOK_AT))
    usual = usable_columns(first)
    for row in itertools.chain(first, rows):
        if choice.shuffle_seed is None and len(found) == choice.sample_size:
            break
        try:
            found.append(_prompt_of(row, choice, usual))
        except ValueError as error:
            skipped.append(str(error))
    if not found:
        why = f": {skipped[0]}" if skipped else ""
        raise prompts_error(f"data set {choice.name}: no prompts found{why}", "choose another column or split")
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


def _prompt_of(row: Row, choice: DatasetChoice, usual: Sequence[str]) -> Prompt:
    if not isinstance(row, str) and not any(name in row for name in choice.columns[:1] or ("body", *usual)):
        wanted = f"no column {choice.columns[0]!r}" if choice.columns else "no column that usually holds text"
        full = ", ".join(name for name in TEXT_COLUMNS if name in row and not choice.columns)
        why = f" (not counting {full}, which ends with the answer)" if full else ""
        message = f"data set {choice.name}: {wanted}{why}; it has {', '.join(sorted(row))}"
        raise prompts_error(message, "set dataset.column to one of them")
    return prompt_of_record(row, choice.columns, usual)
