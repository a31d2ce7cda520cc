"""How this copy of lem is started in another process, under this Python or another one.

As a script (`python lem/base/launch.py worker`) it runs the lem that it lies in and leaves the import path
as it found it: an engine finds its own packages there and none of those that happen to lie beside lem.
"""

import runpy
import sys
from pathlib import Path

_SCRIPT = Path(__file__).absolute()


def own_command(python: str) -> "tuple[str, ...]":
    """The command that runs this copy of lem under `python`; arguments follow it."""
    archive = getattr(getattr(__spec__, "loader", None), "archive", None)  # lem.pyz; None when lem runs from a folder
    # -u: what an engine printed before it was killed is in the log.
    return (python, "-u", str(_SCRIPT) if archive is None else str(Path(archive).absolute()))


def _import_own_package() -> None:
    if sys.path and Path(sys.path[0]).absolute() == _SCRIPT.parent:
        del sys.path[0]
    sys.path.insert(0, str(_SCRIPT.parents[2]))
    import lem.base  # noqa: F401 - found now, and from here on through its own __path__

    del sys.path[0]


# multiprocessing imports the main script again in the processes it spawns, as `__mp_main__`.
if __name__ in ("__main__", "__mp_main__"):
    _import_own_package()

if __name__ == "__main__":
    runpy.run_module("lem", run_name="__main__")  # as `python -m lem` does
