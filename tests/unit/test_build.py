"""lem.pyz and the installed program: the same bytes wherever built, started by every Python there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml

import lem
from tests.pythons import Python, find_pythons

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
SUPPORTED = [python for python in find_pythons() if python.is_supported]
OLD = [python for python in find_pythons() if not python.is_supported]

# Read by a supported Python with nothing but its standard library (-I -S) and the zip on its path.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import lem
names = [module.name for module in pkgutil.walk_packages(lem.__path__, "lem.") if module.name != "lem.__main__"]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a helper of a backend that stands on its engine
        missing = error.name.split(".")[0]
        assert name.startswith("lem.engines.") and missing not in {"lem", *sys.stdlib_module_names}, error
from lem.config.yamlfile import parse_value
assert parse_value("[1, {a: b}]", {}, "test") == [1, {"a": "b"}]
assert "lem._vendor.yaml.composer" in sys.modules
assert not {"yaml", "pynvml"} & set(sys.modules), "the vendored copies shadow an engine's own"
assert "lem._vendor.pynvml" in names, names
print(len(names))
"""


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built lem.pyz in a folder that cannot be written."""
    folder = tmp_path_factory.mktemp("pyz")
    path = folder / "lem.pyz"
    finished = build(ROOT, path)
    assert finished.returncode == 0, finished.stderr
    folder.chmod(0o555)
    return path


def build(
    root: Path, output: Path, python: Path | str = sys.executable, umask: int = 0o022, **environ: str
) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(root / "lem.pyz-build" / "build.py"), "--output", str(output)]
    command += ["--cache", str(ROOT / "build" / "vendor")]
    return run(command, umask=umask, env={**os.environ, **environ})


def run(
    command: list[str], *, umask: int = -1, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, umask=umask, cwd=cwd, env=env
    )


def copy_of_the_project(folder: Path) -> Path:
    """What the program is built and installed from, and nothing that lies about beside it."""
    folder.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("lem", "lem.pyz-build"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_vendor"))
    return folder


def names_of(python: Python) -> str:
    return str(python)


def test_two_folders_two_umasks_and_every_python_build_the_same_bytes(tmp_path: Path) -> None:
    roots = [copy_of_the_project(tmp_path / "one"), copy_of_the_project(tmp_path / "another-place")]
    os.utime(roots[1] / "lem" / "base" / "errors.py", (0, 0))
    built = set()
    for index, python in enumerate(SUPPORTED * 2):
        output = tmp_path / f"{index}.pyz"
        finished = build(roots[index % 2], output, python.path, umask=(0o022, 0o077, 0o002)[index % 3])
        assert finished.returncode == 0, finished.stderr
        assert output.stat().st_mode & 0o777 == 0o755
        built.add(output.read_bytes())
    assert len(built) == 1


def test_source_date_epoch_is_the_time_of_every_member(tmp_path: Path) -> None:
    finished = build(ROOT, tmp_path / "lem.pyz", SOURCE_DATE_EPOCH="1000000000", TZ="Asia/Tokyo")
    assert finished.returncode == 0, finished.stderr
    with zipfile.ZipFile(tmp_path / "lem.pyz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(*time.gmtime(1_000_000_000)[:5], 40)}


def test_zip_holds_program_vendored_modules_and_licences_and_nothing_else(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
        texts = {name: archive.read(name).decode() for name in names if name.startswith("LICENSE")}
    assert names == sorted(names)
    assert {"__main__.py", "lem/__main__.py", "lem/_vendor/yaml/__init__.py", "lem/_vendor/pynvml.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so", "cyaml.py"))]
    assert not [name for name in names if re.search("yaml/(emitter|representer|constructor)", name)]  # lem only reads
    assert set(texts) == {"LICENSE", "LICENSES/PyYAML.txt", "LICENSES/nvidia-ml-py.txt", "LICENSES/vendor.txt"}
    assert all("Copyright" in text for name, text in texts.items() if name != "LICENSES/vendor.txt")


def test_file_of_unknown_kind_stops_the_build(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "project")
    (root / "lem" / "base" / "errors.py~").write_text("an editor's backup", encoding="utf-8")
    finished = build(root, tmp_path / "lem.pyz")
    assert finished.returncode == 1
    assert "lem/base/errors.py~" in finished.stderr
    assert not (tmp_path / "lem.pyz").exists()


def test_wheel_with_another_hash_than_pinned_is_not_packed(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "project")
    pins = root / "lem.pyz-build" / "vendor.txt"
    pins.write_text(pins.read_text(encoding="utf-8").replace("sha256:9", "sha256:8"), encoding="utf-8")
    finished = build(root, tmp_path / "lem.pyz", PIP_NO_INDEX="1")
    assert finished.returncode == 1
    assert "vendor.txt" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "lem.pyz").exists()


@pytest.mark.parametrize("python", SUPPORTED, ids=names_of)
def test_every_supported_python_starts_and_imports_all_of_it_with_the_standard_library_alone(
    pyz: Path, python: Python
) -> None:
    before = sorted(pyz.parent.iterdir())
    for options in ([], ["-I", "-S"]):
        finished = run([str(python.path), *options, str(pyz), "--version"], cwd=Path("/"))
        assert (finished.returncode, finished.stderr) == (0, "")
        assert finished.stdout.startswith("lem ")
    assert sorted(pyz.parent.iterdir()) == before
    finished = run([str(python.path), "-I", "-S", "-c", IMPORT_EVERYTHING, str(pyz)])
    assert finished.returncode == 0, finished.stderr


@pytest.mark.needs("other_pythons")
def test_several_supported_pythons_were_tried() -> None:
    assert len({python.version[:2] for python in SUPPORTED}) > 1


@pytest.mark.needs("old_python")
def test_an_old_python_gets_one_line_and_exit_code_2(pyz: Path) -> None:
    for python in OLD:
        finished = run([str(python.path), str(pyz), "campaign", "c.yaml"])
        assert finished.returncode == 2
        assert finished.stdout == ""
        assert finished.stderr.count("\n") == 1
        assert (
            f"lem needs Python 3.10 or newer; this is Python {'.'.join(map(str, python.version[:2]))}"
            in finished.stderr
        )


def test_file_itself_is_a_program(pyz: Path) -> None:
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    finished = run([str(pyz), "--version"], env=environ)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.needs("checkout")
def test_nothing_vendored_is_committed() -> None:
    finished = run(["git", "ls-files"], cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert not [name for name in finished.stdout.splitlines() if "_vendor/" in name or name.endswith((".whl", ".pyz"))]


def test_an_installation_has_a_lem_command(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "project")
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    finished = run([*command, "--disable-pip-version-check", "--target", str(target), str(root)])
    assert finished.returncode == 0, finished.stderr
    environ = {**os.environ, "PYTHONPATH": str(target)}
    finished = run([sys.executable, str(target / "bin" / "lem"), "--version"], cwd=tmp_path, env=environ)
    assert (finished.returncode, finished.stderr) == (0, "")
    shipped = {path.relative_to(root) for path in (root / "lem").rglob("*") if path.is_file()}
    assert shipped <= {path.relative_to(target) for path in (target / "lem").rglob("*")}


@pytest.mark.needs("checkout")
def test_an_sdist_has_every_file_of_the_project_and_builds_the_same_program(pyz: Path, tmp_path: Path) -> None:
    finished = run(["git", "ls-files", "-z"], cwd=ROOT)
    names = {name for name in finished.stdout.split("\0") if (ROOT / name).is_file() and name}
    root = tmp_path / "project"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "tests" / "__pycache__").mkdir()
    (root / "tests" / "__pycache__" / "left.pyc").touch()
    command = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    finished = run([sys.executable, "-c", command], cwd=root)
    assert finished.returncode == 0, finished.stderr
    (archive,) = (root / "dist").iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in found if not re.match(r"lem_energy\.egg-info/", name)} - names == {"PKG-INFO", "setup.cfg"}
    assert names - found == set()
    finished = build(unpacked, tmp_path / "again.pyz")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (lem.__version__, "MIT")
