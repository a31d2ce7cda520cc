"""Bring up and take down what the container tests run on: `python3 -m tests.lab up`.

On a bare Debian 12, as root: Docker Engine, Compose v2, a base image, a CPU environment for each backend, two small
models. Nothing but the standard library is needed to run it. Every step looks at what is there first, so a second `up`
takes seconds; `down` ends what `up` started and keeps what took long to make.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from lem.base.errors import UserError
from tests.lab.engine import engine_version, own_engine, remove_containers, remove_data, start_engine, stop_engine
from tests.lab.environments import provide_environment, provide_gguf, provide_model, remove_folder
from tests.lab.image import RECIPE, image_recipe, provide_image, remove_image
from tests.lab.packages import install_packages, provide_compose, remove_compose
from tests.lab.places import LAB_COMPOSE_FILES, MODELS, Places
from tests.lab.state import lacking, report

ENGINE_PACKAGES = ("docker.io", "iptables")
IMAGE_PACKAGES = ("debootstrap",)
ENVIRONMENT_PACKAGES = ("python3-venv",)
PARTS = ("engine", "image", "pytorch", "llamacpp", "models", "vllm")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a step failed or (for status) something is missing."""
    options = _parse(argv)
    places = Places.of()
    # Whatever is made here is read by containers that run as other users.
    os.umask(0o022)
    try:
        code: int = options.run(places, options)
    except UserError as error:
        print(f"lab: {error.message}" + (f"\n    {error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m tests.lab", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="up, down, status, env")
    up = commands.add_parser("up", help="bring up what is missing; run it again at any time")
    up.add_argument("parts", nargs="*", metavar="PART", help=f"only these: {', '.join(PARTS)}")
    up.set_defaults(run=_up)
    down = commands.add_parser("down", help="remove containers and networks, end the engine that `up` started")
    down.add_argument("--purge", action="store_true", help="remove images, environments, models and caches too")
    down.set_defaults(run=_down)
    commands.add_parser("status", help="what is there, what is missing").set_defaults(run=_status)
    commands.add_parser("env", help='what `eval "$(python3 -m tests.lab env)"` sets').set_defaults(run=_env)
    options = parser.parse_args(argv)
    if unknown := set(getattr(options, "parts", ())) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    return options


def _up(places: Places, options: argparse.Namespace) -> int:
    started = time.monotonic()
    parts = options.parts or PARTS
    makers: dict[str, Callable[[Places], None]] = {
        "engine": _provide_engine,
        "image": _provide_image,
        "pytorch": lambda where: _provide_environment(where, "pytorch"),
        "llamacpp": lambda where: _provide_environment(where, "llamacpp"),
        "models": _provide_models,
        "vllm": lambda where: _provide_environment(where, "vllm"),
    }
    with _alone(places):
        for part in PARTS:
            if part in parts:
                makers[part](places)
    print(f"lab: up after {time.monotonic() - started:.0f} s")
    return 0


def _provide_engine(places: Places) -> None:
    # An engine that answers is used as it is, whatever it was installed from.
    if engine_version() is None:
        install_packages(ENGINE_PACKAGES)
    provide_compose(places)
    start_engine(places)


def _provide_image(places: Places) -> None:
    if not places.tarball(RECIPE).is_file() and image_recipe() != RECIPE:
        install_packages(IMAGE_PACKAGES)
    provide_image(places)


def _provide_environment(places: Places, backend: str) -> None:
    install_packages(ENVIRONMENT_PACKAGES)
    provide_environment(places, backend)


def _provide_models(places: Places) -> None:
    for size in MODELS:
        provide_model(places, size)
        provide_gguf(places, size)


def _down(places: Places, options: argparse.Namespace) -> int:
    with _alone(places):
        remove_containers(places)
        is_purged = options.purge
        if is_purged and own_engine(places) is None and engine_version() is not None:
            remove_image()
        stop_engine(places)
        if is_purged:
            remove_data(places)
            remove_compose(places)
            for name in ("base", "environments", "models", "compose"):
                remove_folder(name, places.folder / name)
    print("lab: down")
    return 0


def _status(places: Places, _options: argparse.Namespace) -> int:
    for line in report(places):
        print(line)
    missing = lacking(places)
    for line in missing:
        print(f"missing: {line}")
    print("lab: down" if missing else "lab: up")
    return 1 if missing else 0


def _env(places: Places, _options: argparse.Namespace) -> int:
    for name, value in places.variables().items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"export COMPOSE_FILE={shlex.quote(':'.join(map(str, LAB_COMPOSE_FILES)))}")
    return 0


@contextlib.contextmanager
def _alone(places: Places) -> Iterator[None]:
    """Wait for another `up` or `down` on this machine to end."""
    places.folder.mkdir(parents=True, exist_ok=True)
    with (places.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("lab: waiting for another up or down", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
