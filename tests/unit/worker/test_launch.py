from __future__ import annotations

import ast
import sys
import zipfile
from pathlib import Path

import pytest

from lem.base import process
from lem.base.launch import own_command
from tests.processes import children_of
from tests.worker_rig import RawWorker, Rig

ROOT = Path(__file__).resolve().parents[3]
ENTRY = "import sys\nfrom lem.__main__ import run\nsys.exit(run())\n"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "lem.pyz"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("__main__.py", ENTRY)
        for source in sorted((ROOT / "lem").rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                zipped.write(source, source.relative_to(ROOT))
    return path


def test_a_worker_from_a_zip_starts_its_engine_process_from_the_same_zip(rig: Rig, archive: Path):
    worker = RawWorker(rig, (sys.executable, "-u", str(archive), "worker"))

    guardian = worker.run(rig.request("e"))[0]["pgid"]

    for pid in (guardian, *children_of(guardian)):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert str(archive).encode() in words
        assert str(ROOT).encode() not in b" ".join(words[2:])
    worker.close()


def test_a_zip_names_itself_absolutely_however_it_was_called(archive: Path):
    program = "import sys; sys.path.insert(0, 'lem.pyz'); from lem.base.launch import own_command; "

    finished = process.run(
        (sys.executable, "-I", "-c", program + "print(own_command('py'))"), timeout_s=60, cwd=archive.parent
    )

    assert finished.stdout.strip() == str(("py", "-u", str(archive)))


def test_what_lies_in_the_working_folder_or_beside_lem_is_not_imported(tmp_path: Path):
    (tmp_path / "lem").mkdir()
    (tmp_path / "lem" / "__init__.py").write_text("raise SystemExit('the wrong lem')")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")

    finished = process.run((*own_command(sys.executable), "--version"), timeout_s=60, cwd=tmp_path)

    assert (finished.code, finished.stderr) == (0, "")
    assert finished.stdout.startswith("lem ")


def test_the_import_path_of_the_engine_is_left_alone(tmp_path: Path):
    script = tmp_path / "sitecustomize.py"
    script.write_text("import atexit, sys\natexit.register(lambda: print(sys.path))")

    finished = process.run(
        (*own_command(sys.executable), "--version"),
        timeout_s=60,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )

    import_path = ast.literal_eval(finished.stdout.splitlines()[-1])
    assert str(tmp_path) in import_path
    assert not {str(ROOT), str(ROOT / "lem" / "base"), ""} & set(import_path)


def test_processes_that_multiprocessing_spawns_find_lem(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "def look():\n"
        "    if sys.modules['__main__'].__spec__ is None and '--version' in sys.argv:\n"
        "        import multiprocessing, lem.base.units\n"
        "        with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "            print(pool.apply(lem.base.units.format_power, (1.5,)))\n"
        "atexit.register(look)\n"
    )

    finished = process.run(
        (*own_command(sys.executable), "--version"),
        timeout_s=60,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )

    assert finished.stdout.splitlines()[1:] == ["1.5 W"], finished.stderr
