"""The playbooks with newer versions of ansible-core, in a container of Debian 13: `make fleet-newer`.

These versions need a newer Python than Debian 12 has, so CI does not run this. For each version it checks the syntax of
every playbook and runs tests/fleet/test_playbooks.py. It needs the lab's Docker and debootstrap; the container has no
network, so pip downloads the packages here.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from lem.base.errors import UserError
from tests.bench.builds import WHEELS
from tests.lab.image import bootstrap
from tests.lab.packages import install_packages
from tests.lab.places import LABEL, Places, digest
from tests.lab.steps import answer, must, step

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("2.20.10", "2.21.5")
PYTHON = "3.13"
SUITE, INCLUDED = "trixie", ("python3", "python3-venv", "ca-certificates", "git", "openssh-client")
IMAGE = f"lem-lab-debian13:{digest(SUITE, *INCLUDED)}"
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "pyyaml")
TIMEOUT_S = 1800

# In the container: the version is $1, the checkout the working directory.
_SCRIPT = """
python3 -m venv /tmp/env
/tmp/env/bin/pip install --quiet --no-index --find-links=/wheels "ansible-core==$1" -r /wheels/tools.txt
# lem looks for these before it starts an engine, which is a double here.
for name in torch transformers; do
  folder=/tmp/env/lib/python3.13/site-packages/$name-1.dist-info
  mkdir $folder
  printf 'Metadata-Version: 2.1\\nName: %s\\nVersion: 1\\n' $name > $folder/METADATA
done
/tmp/env/bin/ansible --version | head -n 1
/tmp/env/bin/ansible-playbook --inventory inventory/hosts.example.yml --syntax-check playbooks/*.yml
/tmp/env/bin/python -m pytest -q -p no:cacheprovider -k "not oldest" --tb=short tests/fleet/test_playbooks.py
"""


def main() -> int:
    """0 if every version passes."""
    try:
        _provide_image()
        wheels = Places.of().folder / "newer-ansible"
        _download(wheels)
    except UserError as error:
        print(f"{error.message}\n{error.hint or ''}", file=sys.stderr)
        return 1
    codes = [_run(version, wheels) for version in VERSIONS]
    for version, code in zip(VERSIONS, codes, strict=True):
        print(f"ansible-core {version} on Debian 13: {'passed' if code == 0 else 'FAILED'}")
    return max(codes)


def _provide_image() -> None:
    with step(f"image {IMAGE}") as current:
        if answer(["docker", "image", "inspect", IMAGE]) is not None:
            return current.skip("it is there")
        install_packages(("debootstrap",))
        with tempfile.TemporaryDirectory(prefix="lem-debian13-") as folder:
            tarball = Path(folder) / "root.tar"
            bootstrap(tarball, SUITE, INCLUDED)
            must(["docker", "import", "--change", f"LABEL {LABEL}=debian13", str(tarball), IMAGE], timeout_s=TIMEOUT_S)
    return None


def _download(wheels: Path) -> None:
    """Have the packages of every version, and those that lem.pyz is built with."""
    with step("packages") as current:
        names = [f"{name}=={_pinned(name)}" for name in TOOLS]
        (wheels / "tools.txt").parent.mkdir(parents=True, exist_ok=True)
        must(
            [sys.executable, "lem.pyz-build/build.py", "--output", str(wheels / "lem.pyz")],
            timeout_s=TIMEOUT_S,
            cwd=ROOT,
        )
        stamp, wanted = wheels / "stamp", digest(PYTHON, *VERSIONS, *names)
        if stamp.is_file() and stamp.read_text() == wanted:
            return current.skip("they are there")
        (wheels / "tools.txt").write_text("\n".join(names))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={PYTHON}"]
        for version in VERSIONS:
            must([*pip, f"--dest={wheels}", f"ansible-core=={version}", *names], timeout_s=TIMEOUT_S)
        stamp.write_text(wanted)
    return None


def _pinned(name: str) -> str:
    for line in (ROOT / "tests/requirements.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.partition("==")[2].partition(";")[0].strip()
    raise UserError(f"tests/requirements.txt does not pin {name}")


def _run(version: str, wheels: Path) -> int:
    """The exit code of the tests; the container sees the checkout at its own path, and cannot change it."""
    git = must(["git", "rev-parse", "--path-format=absolute", "--git-common-dir"], timeout_s=60, cwd=ROOT).strip()
    command = ["docker", "run", "--rm", "--init", "--network=none", f"--workdir={ROOT}"]
    for path in sorted({str(ROOT), git, str(WHEELS.resolve().parent)}):
        command += [f"--volume={path}:{path}:ro"]
    command += [f"--volume={wheels}:/wheels:ro"]
    settings = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
    }
    command += [f"--env={name}={value}" for name, value in settings.items()]
    command += [IMAGE, "timeout", str(TIMEOUT_S), "bash", "-euo", "pipefail", "-c", _SCRIPT, "bash", version]
    print(flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
