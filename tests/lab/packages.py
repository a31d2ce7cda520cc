"""What the lab takes from Debian: packages of this machine, and Compose v2 from the next release."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lem.base.errors import UserError
from tests.lab.places import Places
from tests.lab.steps import answer, must, step

APT_TIMEOUT_S = 900
COMPOSE_SUITE = "trixie"
COMPOSE_PACKAGE = "docker-compose"
COMPOSE_IN_PACKAGE = Path("usr/libexec/docker/cli-plugins/docker-compose")
# One of the folders that every docker command looks in, and that no package writes to.
PLUGIN = Path("/usr/local/lib/docker/cli-plugins/docker-compose")
COMPOSE_OLDEST = (2, 17)
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# A path each package brings, by which its presence is seen without asking dpkg.
PACKAGES = {
    "docker.io": Path("/usr/sbin/dockerd"),
    "iptables": Path("/usr/sbin/iptables"),
    "debootstrap": Path("/usr/sbin/debootstrap"),
    "python3-venv": Path("/usr/lib/python3.11/ensurepip/__init__.py"),
}
POLICY = Path("/usr/sbin/policy-rc.d")


def install_packages(names: tuple[str, ...]) -> None:
    with step(f"packages {', '.join(names)}") as current:
        missing = [name for name in names if not PACKAGES[name].exists()]
        if not missing:
            return current.skip("installed")
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise UserError(f"missing: {' '.join(missing)}", "install them, or run this as root on Debian 12")
        with _no_service_started():
            must(["apt-get", "update", "-q"], timeout_s=APT_TIMEOUT_S)
            command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
            must(command, timeout_s=APT_TIMEOUT_S, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        current.outcome = f"installed {' '.join(missing)}"
    return None


@contextlib.contextmanager
def _no_service_started() -> Iterator[None]:
    """While packages are installed, their services stay off: the lab starts an engine of its own."""
    is_mine = not POLICY.exists()
    if is_mine:
        POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if is_mine:
            POLICY.unlink()


def debian_mirror() -> tuple[str, str]:
    """The address this machine takes the Debian archive itself from, and the codename of its release."""
    wanted = "$(CODENAME) $(COMPONENT) $(REPO_URI)"
    for line in (answer(["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"]) or "").splitlines():
        codename, component, address = line.split(maxsplit=2)
        if component == "main" and "-" not in codename:
            return address, codename
    raise UserError("apt has no source for Debian's main archive", "apt-get indextargets shows what it has")


def provide_compose(places: Places) -> None:
    with step("Compose v2") as current:
        version = compose_version()
        if version is not None:
            return current.skip(f"version {version}")
        kept = places.folder / "compose" / "docker-compose"
        if not kept.is_file():
            _download_compose(kept)
        PLUGIN.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, PLUGIN)
        PLUGIN.chmod(0o755)
        if (version := compose_version()) is None:
            raise UserError(f"{PLUGIN} is there, but `docker compose version` gives no version from 2.17 on")
        current.outcome = f"version {version}"
    return None


def compose_version() -> str | None:
    """The version of the Compose plugin; None when it is not there or older than lem understands."""
    text = answer(["docker", "compose", "version", "--short"]) or ""
    numbers = tuple(int(part) for part in text.removeprefix("v").split(".")[:2] if part.isdigit())
    return text if numbers >= COMPOSE_OLDEST else None


def remove_compose(places: Places) -> None:
    """Take the plugin away when it is the one that the lab put there."""
    kept = places.folder / "compose" / "docker-compose"
    if kept.is_file() and PLUGIN.is_file() and kept.read_bytes() == PLUGIN.read_bytes():
        PLUGIN.unlink()


def _download_compose(target: Path) -> None:
    """The plugin out of Debian 13's package, which needs nothing but libc; the package is not installed."""
    mirror, _ = debian_mirror()
    with tempfile.TemporaryDirectory(prefix="lem-lab-") as scratch_name:
        scratch = Path(scratch_name)
        # Sources, lists and caches apart from the machine's own, so that nothing else comes from that release.
        options = [f"Dir::Etc::sourcelist={scratch / 'sources.list'}", "Dir::Etc::sourceparts=-"]
        options += [
            f"Dir::State::lists={scratch / 'lists'}",
            f"Dir::Cache={scratch / 'cache'}",
            "APT::Sandbox::User=root",
        ]
        source = f"deb [signed-by={KEYRING}] {mirror} {COMPOSE_SUITE} main\n"
        (scratch / "sources.list").write_text(source, encoding="utf-8")
        for folder in ("lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True)
        apt = ["apt-get", "-q", *(word for option in options for word in ("-o", option))]
        must([*apt, "update"], timeout_s=APT_TIMEOUT_S)
        must([*apt, "download", COMPOSE_PACKAGE], timeout_s=APT_TIMEOUT_S, cwd=scratch)
        (package,) = scratch.glob("*.deb")
        must(["dpkg-deb", "--extract", str(package), str(scratch / "unpacked")], timeout_s=APT_TIMEOUT_S)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        shutil.copyfile(scratch / "unpacked" / COMPOSE_IN_PACKAGE, partial)
        partial.replace(target)
