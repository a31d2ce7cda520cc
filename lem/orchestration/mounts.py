"""What a container sees of this machine: folders at the paths they have here, so that any path named works inside."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.config.experiment_config import ExperimentConfig

__all__ = ["CONTAINER_HOME", "Mount", "local_mounts", "without_nested"]

# Every image lets every user write here; the user's own home folder is not there.
CONTAINER_HOME = "/tmp"  # noqa: S108 - inside a container

# Options that name a folder to write to.
_WRITTEN = frozenset({"engine_cache_dir", "download_dir"})

# No model has more files; a folder that has is somebody's home.
_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Mount:
    """A folder or file of this machine in a container.

    Attributes:
        source: absolute.
        target: where it is seen.
    """

    source: Path
    target: str
    is_read_only: bool = True

    @classmethod
    def in_place(cls, path: Path, *, is_read_only: bool = True) -> Mount:
        """A mount at the same absolute path."""
        return cls(path.absolute(), str(path.absolute()), is_read_only)

    def to_compose(self) -> dict[str, Any]:
        """The long form, in which a source that is not there is an error and no empty folder of root's."""
        return {
            "type": "bind",
            "source": str(self.source),
            "target": self.target,
            "read_only": self.is_read_only,
            "bind": {"create_host_path": False},
        }


def local_mounts(configs: Iterable[ExperimentConfig]) -> tuple[Mount, ...]:
    """A mount for each local folder or file that experiments name as a model or in an option of their backend.

    Of the file of an external meter it is the folder, since a file that is replaced would go on being seen as it was.
    A snapshot of a model hub is a folder of links to files that lie beside it, so what links lead to comes along.
    """
    configs = tuple(configs)
    named = {item for config in configs for item in _named_paths(config)}
    found: dict[Mount, None] = {}
    for name, is_written in sorted(named):
        path = Path(name).expanduser()
        if is_written:
            path.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.absolute() == Path("/"):
            continue
        target = f"{CONTAINER_HOME}/{name[2:]}" if name.startswith("~/") else str(path.absolute())
        found[Mount(path.absolute(), target, is_read_only=not is_written)] = None
        found.update(dict.fromkeys(_linked(path)))
    for config in configs:
        if config.measurement.external_csv is not None:
            name = config.measurement.external_csv
            folder = Path(name).expanduser().absolute().parent
            target = f"{CONTAINER_HOME}/{name[2:]}".rpartition("/")[0] if name.startswith("~/") else str(folder)
            found[Mount(folder, target)] = None
    return without_nested(found)


def without_nested(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """The mounts less those that another one shows already."""
    kept = list(dict.fromkeys(mounts))
    return tuple(item for item in kept if not any(_shows(other, item) for other in kept if other != item))


def _shows(outer: Mount, inner: Mount) -> bool:
    """Whether a mount shows all that another one does, at the same place."""
    if inner.target == outer.target:
        return inner.source == outer.source and not outer.is_read_only
    is_below = Path(inner.target).is_relative_to(outer.target)
    if not is_below or inner.is_read_only != outer.is_read_only:
        return False
    return outer.source / Path(inner.target).relative_to(outer.target) == inner.source


def _named_paths(config: ExperimentConfig) -> Iterator[tuple[str, bool]]:
    """Every text that may name a path, and whether it is written to."""
    document = config.to_dict()
    for section in (document.get("model"), document.get(config.backend)):
        yield from _texts(section, is_written=False)


def _texts(value: Any, *, is_written: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(value, str):
        if value.strip():
            yield value, is_written
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, is_written=key in _WRITTEN)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, is_written=is_written)


def _linked(folder: Path) -> Iterator[Mount]:
    """The folders that links in a folder lead to, outside of it."""
    if not folder.is_dir():
        return
    inside = folder.resolve()
    for path in sorted(itertools.islice(folder.rglob("*"), _LOOKED_AT)):
        if path.is_symlink() and path.exists():
            target = path.resolve()
            if not target.is_relative_to(inside):
                yield Mount.in_place(target if target.is_dir() else target.parent)
