"""Where the lab keeps what it makes, and by which names the rest reaches it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).resolve().parent

FOLDER_VARIABLE = "LEMTEST_LAB_DIR"
BASE_IMAGE = "lem-lab-base"
LABEL = "lem.lab.recipe"
SOCKET = Path("/var/run/docker.sock")
BACKENDS = ("pytorch", "vllm", "llamacpp")
MODELS = ("tiny", "demo")
COMPOSE_FILES = (ROOT / "docker/docker-compose.yml", ROOT / "docker/docker-compose.cpu.yml")
LAB_COMPOSE_FILES = (*COMPOSE_FILES, RECIPES / "docker-compose.lab.yml")

# Python of Debian 12 looks here on its own, also with -I; so no PYTHONPATH and no .pth file is needed.
PACKAGES_TARGET = "/usr/local/lib/python3.11/dist-packages"


@dataclass(frozen=True)
class Places:
    """The lab's folder; it belongs to the machine, not to one checkout, as the engine does."""

    folder: Path

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Places:
        """The folder named by LEMTEST_LAB_DIR, else `lem-lab` in the user's cache folder."""
        named = environ.get(FOLDER_VARIABLE)
        cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/root")) / ".cache")
        return cls(Path(named).resolve() if named else cache / "lem-lab")

    @property
    def engine(self) -> Path:
        """Data root, sockets, log and record of the dockerd that the lab started."""
        return self.folder / "engine"

    @property
    def models(self) -> Path:
        """The folder of the small models; the services see it as their model cache."""
        return self.folder / "models"

    def gguf(self, size: str) -> Path:
        """The model of that size as llama.cpp reads it."""
        return self.models / f"{size}.gguf"

    def tarball(self, recipe: str) -> Path:
        return self.folder / "base" / f"{recipe}.tar"

    def environment(self, backend: str) -> Path:
        return self.folder / "environments" / backend

    def packages(self, backend: str) -> Path:
        return self.environment(backend) / "lib/python3.11/site-packages"

    def variables(self) -> dict[str, str]:
        """The variables with which docker/docker-compose.yml and its CPU overlay use the lab."""
        return {
            "LEM_PYTORCH_IMAGE": BASE_IMAGE,
            "LEM_VLLM_IMAGE": BASE_IMAGE,
            "LEM_TENSORRT_IMAGE": BASE_IMAGE,
            "LEM_LLAMACPP_IMAGE": BASE_IMAGE,
            "LEM_PYTORCH_PACKAGES": str(self.packages("pytorch")),
            "LEM_VLLM_PACKAGES": str(self.packages("vllm")),
            "LAB_LLAMACPP_PACKAGES": str(self.packages("llamacpp")),
            "LAB_LLAMACPP_SERVER": str(RECIPES / "llama_server.py"),
            "LEM_CPU_PACKAGES_TARGET": PACKAGES_TARGET,
            "LEM_MODEL_CACHE": str(self.models),
        }


def digest(*parts: str) -> str:
    """Sixteen hex digits that change with any of the parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
