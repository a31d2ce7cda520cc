"""The base image, made by debootstrap: no registry is asked."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.lab.packages import debian_mirror
from tests.lab.places import BASE_IMAGE, LABEL, Places, digest
from tests.lab.steps import answer, must, step

BUILD_TIMEOUT_S = 900
SUITE = "bookworm"
# libnuma1 is what the CPU build of vLLM links to; torch.compile, which vLLM uses unless told otherwise, writes C++ that
# includes Python.h.
INCLUDED = ("python3", "libnuma1", "ca-certificates", "g++", "libpython3-dev")
LEFT_OUT = ("./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*", "./var/log/*")
# Raise it when the way the image is made changes.
REVISION = "1"
RECIPE = digest(REVISION, SUITE, *INCLUDED, *LEFT_OUT)


def image_recipe() -> str | None:
    """The recipe that the engine's base image was made by; None when there is no such image."""
    text = answer(["docker", "image", "inspect", BASE_IMAGE, "--format", "{{json .Config.Labels}}"])
    labels = json.loads(text) if text else None
    return (labels or {}).get(LABEL)


def provide_image(places: Places) -> None:
    """Have the base image in the engine, from the kept tarball where there is one."""
    with step(f"base image {BASE_IMAGE}") as current:
        if image_recipe() == RECIPE:
            return current.skip(f"recipe {RECIPE}")
        tarball = places.tarball(RECIPE)
        origin = "imported from the kept tarball" if tarball.is_file() else "made by debootstrap"
        if not tarball.is_file():
            bootstrap(tarball, SUITE, INCLUDED)
        command = ["docker", "import", "--change", f"LABEL {LABEL}={RECIPE}", str(tarball), BASE_IMAGE]
        must(command, timeout_s=BUILD_TIMEOUT_S)
        current.outcome = f"{origin}, {tarball.stat().st_size / 1e6:.0f} MB"
    return None


def remove_image() -> None:
    """Take the base image from an engine that stays."""
    with step(f"base image {BASE_IMAGE}") as current:
        if image_recipe() is None:
            return current.skip("none is there")
        must(["docker", "image", "rm", "--force", BASE_IMAGE], timeout_s=BUILD_TIMEOUT_S)
        current.outcome = "removed"
    return None


def bootstrap(tarball: Path, suite: str, included: Sequence[str]) -> None:
    """Make a tarball of a release of Debian, complete or not at all, and remove the others in its folder."""
    mirror, _ = debian_mirror()
    tarball.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="debootstrap-", dir=tarball.parent))
    partial = tarball.with_suffix(".part")
    try:
        root = scratch / "root"
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(included)}", suite, str(root), mirror]
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        must(command, timeout_s=BUILD_TIMEOUT_S, env={**os.environ, "PATH": path})
        left_out = [f"--exclude={pattern}" for pattern in LEFT_OUT]
        must(
            ["tar", "--create", "--numeric-owner", f"--file={partial}", *left_out, f"--directory={root}", "."],
            timeout_s=BUILD_TIMEOUT_S,
        )
        for outdated in tarball.parent.glob("*.tar"):
            outdated.unlink()
        partial.replace(tarball)
    finally:
        partial.unlink(missing_ok=True)
        shutil.rmtree(scratch)
