"""A bundle is whole and signed, or it is refused: one changed byte is enough."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lem.base.errors import UserError
from lem.orchestration.bundle import Contents, Signer, make_bundle, verify_bundle

needs_ssh = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="no ssh-keygen on this machine (apt-get install openssh-client)"
)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEM_CACHE_DIR", str(tmp_path / "cache"))
    model = tmp_path / "snapshot"
    (model / "deep").mkdir(parents=True)
    (tmp_path / "blob").write_text("weights")
    (model / "deep" / "weights").symlink_to(tmp_path / "blob")
    wheel = tmp_path / "a-1-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    return make_bundle(tmp_path / "made", Contents(models=(model,), wheels=(wheel,)))


def test_a_bundle_holds_the_program_and_what_was_named(bundle: Path) -> None:
    manifest = verify_bundle(bundle, None)
    assert bundle.name.startswith("lem-airgap-")
    assert (manifest["models"], manifest["wheels"]) == (["snapshot"], ["a-1-py3-none-any.whl"])
    assert (bundle / "models" / "snapshot" / "deep" / "weights").read_text() == "weights"
    assert not (bundle / "models" / "snapshot" / "deep" / "weights").is_symlink()
    assert (bundle / "pyz" / "lem.pyz").stat().st_size > 100_000
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=bundle, check=True)
    with pytest.raises(UserError, match="already exists"):
        make_bundle(bundle.parent, Contents())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "models/snapshot/deep/weights").write_text("weighty"), "since it was made: models/"),
        (lambda folder: (folder / "pyz" / "lem.pyz").unlink(), "missing pyz/lem.pyz"),
        (lambda folder: (folder / "debs" / "more.deb").write_text(""), "debs/more.deb is not listed"),
        (lambda folder: (folder / "link").symlink_to("/etc/passwd"), "link is a link"),
        (lambda folder: (folder / "SHA256SUMS").write_text("nonsense\n"), "invalid line in SHA256SUMS"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "no such file"),
        (lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\n"), "invalid line in SHA256SUMS"),
        (lambda folder: _replace(folder, b"{"), "invalid manifest.json"),
        (lambda folder: _replace(folder, b"[]"), "invalid manifest.json: expected an object"),
    ],
)
def test_damage_is_found(bundle: Path, damage, said: str) -> None:
    damage(bundle)
    with pytest.raises(UserError, match=said):
        verify_bundle(bundle, None)


def test_what_is_named_and_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        make_bundle(tmp_path / "made", Contents(models=(tmp_path / "none",)))
    assert list((tmp_path / "made").iterdir()) == []


def _replace(folder: Path, manifest: bytes) -> None:
    """Another manifest, with the sum of it."""
    before = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_bytes(manifest)
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(sums.replace(before, hashlib.sha256(manifest).hexdigest()))


CONFIG = [{"Config": "blobs/sha256/c0ffee"}]
INDEX = {"manifests": [{"digest": "sha256:abc"}]}


def _save_images_as(folder: Path, monkeypatch: pytest.MonkeyPatch, **documents: str) -> None:
    """A `docker` whose `save` writes these documents."""
    saved = folder / "saved.tar"
    with tarfile.open(saved, "w") as archive:
        for name, text in documents.items():
            member = tarfile.TarInfo(f"{name}.json")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (folder / "bin").mkdir()
    command = folder / "bin" / "docker"
    command.write_text(f'#!/bin/sh\n[ "$1 $2" = "save --output" ] && exec cp {shlex.quote(str(saved))} "$3"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LEM_CACHE_DIR", str(folder / "cache"))


@pytest.mark.parametrize(
    ("index", "digest"), [(json.dumps(INDEX), "sha256:abc"), (None, None), ('{"manifests": []}', None), ("[]", None)]
)
def test_an_image_is_known_by_what_the_engine_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str | None, digest: str | None
) -> None:
    more = {} if index is None else {"index": index}
    _save_images_as(tmp_path, monkeypatch, manifest=json.dumps(CONFIG), **more)
    folder = make_bundle(tmp_path / "made", Contents(images=("img:1",)))
    (image,) = verify_bundle(folder, None)["images"]
    assert image["ids"] == {"overlay2": "sha256:c0ffee", "containerd": digest}


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", "[7]", '[{"Config": 7}]'])
def test_an_image_that_is_saved_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: str
) -> None:
    _save_images_as(tmp_path, monkeypatch, manifest=manifest)
    with pytest.raises(UserError, match=r"unexpected output of `docker save`: manifest\.json"):
        make_bundle(tmp_path / "made", Contents(images=("img:1",)))
    assert list((tmp_path / "made").iterdir()) == []


def _key(folder: Path, name: str) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return folder / name


@needs_ssh
def test_a_signature_holds_for_its_signer_and_its_sums_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEM_CACHE_DIR", str(tmp_path / "cache"))
    key, other = _key(tmp_path, "lab"), _key(tmp_path, "other")
    folder = make_bundle(tmp_path / "made", Contents(), sign_key=key)
    signer = Signer(tmp_path / "allowed_signers", "lab@example.org")
    for public, sums, is_valid in (
        (other.with_suffix(".pub"), str, False),
        (key.with_suffix(".pub"), str, True),
        (key.with_suffix(".pub"), lambda text: text.replace("0", "1"), False),
    ):
        signer.allowed_signers.write_text(f"lab@example.org {public.read_text()}")
        (folder / "SHA256SUMS").write_text(sums((folder / "SHA256SUMS").read_text()))
        if is_valid:
            assert verify_bundle(folder, signer)["schema_version"] == 1
            continue
        with pytest.raises(UserError, match=r"no valid signature of lab@example\.org"):
            verify_bundle(folder, signer)


@needs_ssh
def test_an_unsigned_bundle_is_refused_where_a_signer_is_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not signed"):
        verify_bundle(bundle, Signer(tmp_path / "allowed", "lab@example.org"))
