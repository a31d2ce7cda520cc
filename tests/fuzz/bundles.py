"""Bundles: their manifest, their sums, and the names of their files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lem import __version__
from tests.fuzz.mutation import bytes_near, json_near
from tests.fuzz.trial import Outcome, Surface, run_lem

_FILES = {"pyz/lem.pyz": b"PK", "models/gpt/weights": b"weights", "wheels/a-1-py3-none-any.whl": b"wheel"}
_MANIFEST = {
    "schema_version": 1,
    "lem_version": __version__,
    "images": [],
    "models": ["gpt"],
    "debs": [],
    "wheels": ["a-1-py3-none-any.whl"],
}


def _write(files: dict[str, bytes], sums: bytes | None = None) -> None:
    shutil.rmtree("bundle", ignore_errors=True)
    for name, content in files.items():
        path = Path("bundle", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    lines = (f"{hashlib.sha256(content).hexdigest()}  ".encode() + os.fsencode(name) for name, content in files.items())
    Path("bundle", "SHA256SUMS").write_bytes(b"".join(line + b"\n" for line in lines) if sums is None else sums)


def _verify() -> Outcome:
    code = run_lem("bundle", "verify", "bundle").code
    run_lem("bundle", "verify", "bundle", "--json")
    return Outcome.ACCEPTED if code == 0 else Outcome.REFUSED


def try_manifest(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """The manifest of a bundle, with the right sum."""
    del folder, is_thorough
    _write({**_FILES, "manifest.json": data})
    return _verify()


def try_sums(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """The sums of a bundle."""
    del folder, is_thorough
    _write({**_FILES, "manifest.json": json.dumps(_MANIFEST).encode()}, data)
    return _verify()


def try_name(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """The name of a file in a model: what is made of it is a bundle that can be verified, or refused at once."""
    del folder, is_thorough
    shutil.rmtree("model", ignore_errors=True)
    shutil.rmtree("made", ignore_errors=True)
    path = Path("model", os.fsdecode(data.replace(b"\0", b"").replace(b"/", b"")[:200]))
    if path.name in ("", ".", "..", "model"):
        return Outcome.REFUSED
    path.parent.mkdir()
    path.write_bytes(b"x")
    if run_lem("bundle", "make", "made", "--model", "model").code:
        return Outcome.REFUSED
    run_lem("bundle", "verify", f"made/lem-airgap-{__version__}", expected=(0,))
    return Outcome.ACCEPTED


def _sums() -> st.SearchStrategy[bytes]:
    files: dict[str, Any] = {**_FILES, "manifest.json": json.dumps(_MANIFEST).encode()}
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    extra = [f"{'0' * 64}  {name}\n" for name in ("../../etc/passwd", "/etc/passwd", "models/gpt", ".")]
    return bytes_near("".join(lines).encode(), *("".join([*lines, line]).encode() for line in extra))


def _names() -> st.SearchStrategy[bytes]:
    return bytes_near(b"weights", b"a\nb", "a\u2028b\u202e".encode(), b"\xff", b" x ", b"\\x", b"-x", b"\x1b[31m")


SURFACES = (
    Surface("bundle", lambda: json_near(_MANIFEST), try_manifest, in_suite=60),
    Surface("bundle-sums", _sums, try_sums, in_suite=60),
    Surface("bundle-name", _names, try_name, in_suite=20),
)
