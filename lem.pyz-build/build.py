#!/usr/bin/env python3
"""Build lem.pyz: the whole program in one file for any CPython 3.10 or newer. The build is reproducible.

Members are sorted and share one timestamp: SOURCE_DATE_EPOCH, or 1980-01-01, the earliest that a zip can hold. Modes
do not depend on the umask. Nothing is compressed, because different zlib implementations give different bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHEBANG = b"#!/usr/bin/env python3\n"
VENDOR_LIST = HERE / "vendor.txt"
ENTRY = HERE / "entry.py"

# A file with any other suffix is a mistake, such as an editor's backup or a model, and stops the build.
SHIPPED_SUFFIXES = frozenset(
    {".css", ".html", ".js", ".json", ".jsonl", ".md", ".py", ".txt", ".typed", ".yaml", ".yml"}
)

# Every machine downloads the wheel of this platform; see vendor.txt.
WHEEL_PLATFORM = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.10",
    "--abi=cp310",
    "--platform=manylinux2014_x86_64",
)
PIP_TIMEOUT_S = 600

# What lem/config/yamlfile.py reads files with: of PyYAML, neither the constructors nor all that writes.
YAML_MODULES = frozenset(
    f"yaml/{name}.py" for name in ("composer", "error", "events", "nodes", "parser", "reader", "scanner", "tokens")
)
YAML_INIT = '"""A part of PyYAML; see LICENSES/PyYAML.txt and LICENSES/vendor.txt."""\n'
VENDOR_INIT = '"""Third-party code, separate from the copies of an engine; see LICENSES/vendor.txt."""\n'


class BuildError(Exception):
    """The build cannot go on; the message is for the user."""


@dataclass(frozen=True)
class Pin:
    """One line of vendor.txt."""

    name: str
    version: str
    sha256: str


def main() -> int:
    """Build lem.pyz and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "lem.pyz", help="the file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "build" / "vendor",
        help="folder of downloaded wheels, reused while their hashes match vendor.txt (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        members = {**own_members(ROOT), **vendor_members(vendor_wheels(args.cache))}
        data = pack(members, timestamp(os.environ.get("SOURCE_DATE_EPOCH")))
        replace_file(args.output, data)
    except (BuildError, OSError) as error:
        print(f"lem.pyz: {error}", file=sys.stderr)
        return 1
    print(f"{hashlib.sha256(data).hexdigest()}  {args.output.name} ({len(members)} files, {len(data) / 1e6:.1f} MB)")
    return 0


def own_members(root: Path) -> dict[str, bytes]:
    """The project's own files by their name in the zip.

    Raises:
        BuildError: `lem` contains a file of an unknown kind.
    """
    members = {"__main__.py": ENTRY.read_bytes(), "LICENSE": (root / "LICENSE").read_bytes()}
    for path in sorted((root / "lem").rglob("*")):
        name = path.relative_to(root)
        is_left_out = any(part == "__pycache__" or part.startswith(".") for part in name.parts)
        if path.is_dir() or is_left_out or name.parts[:2] == ("lem", "_vendor"):
            continue
        if path.suffix not in SHIPPED_SUFFIXES:
            raise BuildError(
                f"{name}: unexpected kind of file; remove it, or add its suffix to SHIPPED_SUFFIXES in build.py"
            )
        members[name.as_posix()] = path.read_bytes()
    return members


def vendor_members(wheels: Mapping[str, Path]) -> dict[str, bytes]:
    """The vendored modules and their licences by their name in the zip."""
    members = {"lem/_vendor/__init__.py": VENDOR_INIT.encode(), "LICENSES/vendor.txt": VENDOR_LIST.read_bytes()}
    # PyYAML's own imports the whole package. Without the rest, no loader can be the C one of an engine's own PyYAML.
    members["lem/_vendor/yaml/__init__.py"] = YAML_INIT.encode()
    with zipfile.ZipFile(wheels["pyyaml"]) as wheel:
        for name in wheel.namelist():
            if name in YAML_MODULES:
                members[f"lem/_vendor/{name}"] = wheel.read(name)
            elif name.endswith(".dist-info/licenses/LICENSE"):
                members["LICENSES/PyYAML.txt"] = wheel.read(name)
    with zipfile.ZipFile(wheels["nvidia-ml-py"]) as wheel:
        source = wheel.read("pynvml.py")
    members["lem/_vendor/pynvml.py"] = source
    members["LICENSES/nvidia-ml-py.txt"] = leading_comment(source)
    missing = {"LICENSES/PyYAML.txt", *(f"lem/_vendor/{name}" for name in YAML_MODULES)} - set(members)
    if missing:
        raise BuildError(f"unexpected layout of the PyYAML wheel: missing {', '.join(sorted(missing))}")
    return members


def leading_comment(source: bytes) -> bytes:
    """The comment at the top of a module; nvidia-ml-py has its licence there.

    Raises:
        BuildError: the comment contains no licence.
    """
    lines = []
    for line in source.decode("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").removeprefix(" ").rstrip())
    text = "\n".join(lines).strip("\n") + "\n"
    if "Copyright" not in text:
        raise BuildError("nvidia-ml-py no longer begins with its licence; find the licence before you ship the module")
    return text.encode("utf-8")


def vendor_wheels(cache: Path) -> dict[str, Path]:
    """The wheel for each line of vendor.txt, downloaded unless the cache has a file with that hash.

    Raises:
        BuildError: a wheel cannot be downloaded, or does not match vendor.txt.
    """
    pins = read_pins(VENDOR_LIST.read_text(encoding="utf-8"))
    found = find_wheels(pins, cache)
    if len(found) < len(pins):
        cache.mkdir(parents=True, exist_ok=True)
        command = [*pip_command(cache), "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", *WHEEL_PLATFORM, f"--dest={cache}", f"--requirement={VENDOR_LIST}"]
        try:
            code = subprocess.run(command, check=False, timeout=PIP_TIMEOUT_S).returncode
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"pip did not finish within {PIP_TIMEOUT_S} s") from error
        if code != 0:
            raise BuildError("pip could not download the wheels in vendor.txt; see its message above")
        found = find_wheels(pins, cache)
    if len(found) < len(pins):
        raise BuildError(f"{cache} does not hold all the wheels in vendor.txt; remove the folder and try again")
    return found


def find_wheels(pins: tuple[Pin, ...], folder: Path) -> dict[str, Path]:
    """The files in `folder` whose hash matches a pin, by the pin's name."""
    by_hash = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob("*.whl"))}
    return {pin.name: by_hash[pin.sha256] for pin in pins if pin.sha256 in by_hash}


def read_pins(text: str) -> tuple[Pin, ...]:
    """The pins in a vendor list.

    Raises:
        BuildError: a line does not pin a version and a hash.
    """
    pins = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.]+) --hash=sha256:([0-9a-f]{64})", line)
        if match is None:
            raise BuildError(f"vendor.txt:{number}: expected NAME==VERSION --hash=sha256:…, got {line!r}")
        name, version, sha256 = match.groups()
        pins.append(Pin(name.lower(), version, sha256))
    return tuple(pins)


def pip_command(cache: Path) -> list[str]:
    """The pip of this Python, or one in a new environment: Debian's Python has no pip.

    Raises:
        BuildError: there is no pip and it cannot be installed.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    folder = cache / "pip-env"
    if not (folder / "bin" / "pip").exists():
        # In a subprocess: Debian's venv module exits the interpreter when ensurepip is missing.
        command = [sys.executable, "-m", "venv", "--clear", str(folder)]
        if subprocess.run(command, check=False, timeout=PIP_TIMEOUT_S).returncode != 0:
            raise BuildError("pip is required to download the wheels in vendor.txt: apt-get install python3-venv")
    return [str(folder / "bin" / "python"), "-m", "pip"]


def timestamp(source_date_epoch: str | None) -> tuple[int, int, int, int, int, int]:
    """The timestamp of every member: SOURCE_DATE_EPOCH in UTC, or else the earliest that a zip can hold.

    Raises:
        BuildError: SOURCE_DATE_EPOCH is not an integer.
    """
    first = (1980, 1, 1, 0, 0, 0)
    if not source_date_epoch:
        return first
    try:
        moment = time.gmtime(int(source_date_epoch))
    except ValueError as error:
        raise BuildError(f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {source_date_epoch!r}") from error
    return max(first, (moment.tm_year, moment.tm_mon, moment.tm_mday, moment.tm_hour, moment.tm_min, moment.tm_sec))


def pack(members: Mapping[str, bytes], date_time: tuple[int, int, int, int, int, int]) -> bytes:
    """The executable zip."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, date_time)
            info.create_system = 3  # Unix: external_attr holds the mode
            info.external_attr = 0o100644 << 16
            archive.writestr(info, members[name])
    return buffer.getvalue()


def replace_file(path: Path, data: bytes) -> None:
    """Replace `path` atomically: a running lem.pyz keeps the file it was started from."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            os.fchmod(descriptor, 0o755)  # whatever the umask
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


if __name__ == "__main__":
    sys.exit(main())
