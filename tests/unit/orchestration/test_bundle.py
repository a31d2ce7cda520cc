"""A bundle is whole and signed, or it is refused: one changed byte is enough."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.orchestration.bundle import Contents, Signer, make_bundle, verify_bundle
from lem.orchestration.packing import provide_pyz
from tests.faulty_disk import watching

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


def test_a_changed_copy_in_the_cache_is_neither_packed_nor_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEM_CACHE_DIR", str(tmp_path / "cache"))
    cached = provide_pyz()
    program = cached.read_bytes()
    cached.write_bytes(b"evil")
    made = make_bundle(tmp_path / "made", Contents())
    assert (made / "pyz" / "lem.pyz").read_bytes() == program


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
        (lambda folder: _replace(folder, b"7"), "invalid manifest.json: expected an object"),
        (lambda folder: _replace(folder, b"[" * 100_000), "invalid manifest.json: nested too deeply"),
        (lambda folder: _replace(folder, b"{}"), "expected schema version 1, got None"),
        (lambda folder: _edit(folder, images=[[]]), r"invalid manifest.json: .*images\[0\]"),
        (lambda folder: _edit(folder, wheels="a-1"), "invalid manifest.json: .*wheels"),
        (lambda folder: _edit(folder, wheels=[]), "it and the bundle differ in wheels/a-1-py3-none-any.whl"),
        (lambda folder: _edit(folder, models=["snapshot", "../snapshot"]), "differ in models/../snapshot"),
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


def _pack_and_unpack(bundle: Path, add: Callable[[tarfile.TarFile], None]) -> Path:
    """The bundle as it arrives in a tar archive to which something was added."""
    packed, unpacked = bundle.parent / "bundle.tar", bundle.parent / "unpacked"
    with tarfile.open(packed, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(bundle, bundle.name)
        add(archive)
    unpacked.mkdir()
    subprocess.run(["tar", "-xpf", packed, "-C", unpacked], check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    return unpacked / bundle.name


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = ""
) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(f"{archive.getnames()[0]}/{name}")
        member.type, member.mode, member.linkname = kind, mode, link and f"{archive.getnames()[0]}/{link}"
        archive.addfile(member, io.BytesIO())

    return add


def test_a_bundle_that_went_through_a_tar_archive_is_whole(bundle: Path) -> None:
    unpacked = _pack_and_unpack(bundle, lambda _: None)
    assert verify_bundle(unpacked, None)["models"] == ["snapshot"]


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (_member("wheels/pipe", tarfile.FIFOTYPE), "wheels/pipe is a FIFO, a socket or a device"),
        (_member("SHA256SUMS", tarfile.FIFOTYPE), "SHA256SUMS is a FIFO, a socket or a device"),
        (_member("models/more", tarfile.DIRTYPE, 0o755), "models/more is an empty folder"),
        (_member("more", tarfile.DIRTYPE, 0o755), "more "),
        (_member("pyz/lem.pyz", mode=0o4755), "pyz/lem.pyz has a setuid, setgid or sticky bit"),
        (_member("wheels/tool", mode=0o2755), "wheels/tool has a setuid, setgid or sticky bit"),
        (_member("pyz/lem.pyz", mode=0o666), "pyz/lem.pyz can be changed by every user"),
        (_member("models", tarfile.DIRTYPE, 0o777), "models can be changed by every user"),
        (_member("models/out", tarfile.SYMTYPE, link="../.."), "models/out is a link"),
        (_member("wheels/twin", tarfile.LNKTYPE, link="pyz/lem.pyz"), "is a hard link"),
        (_member("run.sh", mode=0o755), "run.sh does not belong in a bundle"),
        (_member("models/a\nb"), r"'models/a\\nb' has a name with a control character"),
        (_member("models/a\u2028b"), r"'models/a\\u2028b' has a name with a control character"),
    ],
)
def test_what_a_bundle_must_not_hold_is_refused(bundle: Path, add: Any, said: str) -> None:
    unpacked = _pack_and_unpack(bundle, add)
    with pytest.raises(UserError, match=f"bundle {unpacked}: .*{said}"):
        verify_bundle(unpacked, None)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "wheels/../manifest.json", "./manifest.json"])
def test_a_sum_leads_nowhere_else(bundle: Path, name: str) -> None:
    with (bundle / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match=f"missing {name}"):
        verify_bundle(bundle, None)


def test_a_file_has_one_sum(bundle: Path) -> None:
    sums = bundle / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  manifest.json\n{sums.read_text()}")
    with pytest.raises(UserError, match=r"manifest\.json is listed twice"):
        verify_bundle(bundle, None)


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("wheels", ["one/a.whl", "two/a.whl"], "two wheels with the name a.whl: .*one/a.whl and .*two/a.whl"),
        ("debs", ["one/a.whl", "two/a.whl"], "two debs with the name a.whl"),
        ("models", ["one", "three/one"], "two models with the name one: .*one and .*three/one"),
        ("models", ["three"], "no files in it"),
        ("models", ["/"], "has no name"),
        ("models", ["loop"], "loop/up: a link to a folder that contains it"),
        ("models", ["."], "the bundle would be made inside it"),
        ("models", ["piped"], "piped/pipe: expected a file, found a folder, device or FIFO"),
        ("models", ["bad"], r"'models/bad/a\\nb' has a name with a control character"),
        ("wheels", ["two"], "two: expected a file, found a folder"),
        ("wheels", ["none.whl"], "none.whl: no such file"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, names: list[str], said: str
) -> None:
    monkeypatch.setenv("LEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("one/a.whl", "two/a.whl", "loop/weights", "piped/weights", "bad/a\nb"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    Path("three/one/empty").mkdir(parents=True)
    Path("loop/up").symlink_to("..")
    os.mkfifo("piped/pipe")
    named: dict[str, Any] = {kind: tuple(map(Path, names))}
    with pytest.raises(UserError, match=said):
        make_bundle(tmp_path / "made", Contents(**named))
    assert list((tmp_path / "made").iterdir()) == []


def test_a_disk_that_becomes_read_only_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEM_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(event: str, path: str) -> None:
        if event == "lem.write" and path.endswith("SHA256SUMS"):
            monkeypatch.setattr(os, "rmdir", _refuse)
            raise OSError(errno.EROFS, "Read-only file system", path)

    with watching(refuse), pytest.raises(UserError, match="SHA256SUMS: read-only file system"):
        make_bundle(tmp_path / "made", Contents())


def _refuse(path: str, **_: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", path)


def test_what_is_named_is_kept_under_the_last_part_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEM_CACHE_DIR", str(tmp_path / "cache"))
    model = tmp_path / "gpt"
    (model / "empty").mkdir(parents=True)
    (model / "weights").write_text("weights")
    (model / "weights").chmod(0o4777)
    (tmp_path / "gpt-b").symlink_to(model)
    monkeypatch.chdir(model)
    before = os.umask(0)
    try:
        models = (Path(), model, Path("../gpt-b"))  # the first two are the same
        folder = make_bundle(tmp_path / "made", Contents(models=models))
    finally:
        os.umask(before)
    assert verify_bundle(folder, None)["models"] == ["gpt", "gpt-b"]
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("models/*/*")]
    assert sorted(found) == ["models/gpt-b/weights", "models/gpt/weights"]


def _replace(folder: Path, manifest: bytes) -> None:
    """Another manifest, with the sum of it."""
    before = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_bytes(manifest)
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(sums.replace(before, hashlib.sha256(manifest).hexdigest()))


def _edit(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    _replace(folder, json.dumps({**document, **changes}).encode())


CONFIG = [{"Config": "blobs/sha256/c0ffee"}]
INDEX = {"manifests": [{"digest": "sha256:abc"}]}


def _save_images_as(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    documents: Mapping[str, str],
    cut_at: int | None = None,
    kind: bytes = b"0",
) -> None:
    """A `docker` whose `save` writes these documents, or the beginning of their archive."""
    saved = folder / "saved.tar"
    with tarfile.open(saved, "w") as archive:
        for name, text in documents.items():
            member = tarfile.TarInfo(f"{name}.json")
            member.size, member.type, member.linkname = len(text), kind, "elsewhere"
            archive.addfile(member, io.BytesIO(text.encode()))
    saved.write_bytes(saved.read_bytes()[:cut_at])
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
    _save_images_as(tmp_path, monkeypatch, {"manifest": json.dumps(CONFIG), **more})
    folder = make_bundle(tmp_path / "made", Contents(images=("img:1",)))
    (image,) = verify_bundle(folder, None)["images"]
    assert image["ids"] == {"overlay2": "sha256:c0ffee", "containerd": digest}


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", "[7]", '[{"Config": 7}]'])
def test_an_image_that_is_saved_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: str
) -> None:
    _save_images_as(tmp_path, monkeypatch, {"manifest": manifest})
    with pytest.raises(UserError, match=r"unexpected output of `docker save`: manifest\.json"):
        make_bundle(tmp_path / "made", Contents(images=("img:1",)))
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("cut_at", [0, 100, 520])
def test_an_image_that_is_saved_in_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    _save_images_as(tmp_path, monkeypatch, {"manifest": json.dumps(CONFIG)}, cut_at=cut_at)
    with pytest.raises(UserError, match="unexpected output of `docker save`: "):
        make_bundle(tmp_path / "made", Contents(images=("img:1",)))
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_an_image_whose_index_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    _save_images_as(tmp_path, monkeypatch, {"manifest": ""}, kind=kind)
    with pytest.raises(UserError, match=r"manifest\.json is not a file"):
        make_bundle(tmp_path / "made", Contents(images=("img:1",)))


def test_images_whose_names_give_the_same_file_name_are_both_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save_images_as(tmp_path, monkeypatch, {"manifest": json.dumps(CONFIG)})
    folder = make_bundle(tmp_path / "made", Contents(images=("a/b:1", "a-b:1", "a/b:1")))
    images = verify_bundle(folder, None)["images"]
    assert [image["name"] for image in images] == ["a/b:1", "a-b:1"]
    assert len({image["file"] for image in images}) == 2


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
