"""The environment variables that lem reads or sets."""

from __future__ import annotations

import os

from lem.base.importer import CACHE_VARIABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Final

DATASETS_VARIABLE: Final = "LEM_DATASETS_DIR"
LOCK_FOLDER_VARIABLE: Final = "LEM_LOCK_DIR"
# Set by the host for a worker in a container, where killing `docker compose exec` leaves what it started.
MARK_VARIABLE: Final = "LEM_WORKER_MARK"
# Set by the host for a worker whose server is a container: the command that runs it, and its address, in JSON.
SERVICE_VARIABLE: Final = "LEM_SERVICE"

# What lem reads from the environment; another LEM_ name is a typing error that would silently do nothing.
VARIABLES: Final = frozenset({DATASETS_VARIABLE, LOCK_FOLDER_VARIABLE, CACHE_VARIABLE, MARK_VARIABLE, SERVICE_VARIABLE})

MODEL_CACHE_VARIABLE: Final = "LEM_MODEL_CACHE"
READ_ONLY_VARIABLE: Final = "LEM_MODEL_CACHE_READ_ONLY"
# What the compose file that lem carries, and its CPU overlay, let a person choose.
COMPOSE_VARIABLES: Final = frozenset(
    {
        "LEM_CPU_LIMIT",
        "LEM_CPU_PACKAGES_TARGET",
        "LEM_HEALTHCHECK_INTERVAL",
        "LEM_LLAMACPP_IMAGE",
        "LEM_LLAMACPP_PORT",
        "LEM_MEMORY_LIMIT",
        MODEL_CACHE_VARIABLE,
        READ_ONLY_VARIABLE,
        "LEM_PYTORCH_IMAGE",
        "LEM_PYTORCH_PACKAGES",
        "LEM_SHM_SIZE",
        "LEM_TENSORRT_IMAGE",
        "LEM_TENSORRT_PACKAGES",
        "LEM_TMP_SIZE",
        "LEM_VLLM_CPU_LIMIT",
        "LEM_VLLM_IMAGE",
        "LEM_VLLM_KVCACHE_GIB",
        "LEM_VLLM_PACKAGES",
    }
)

# A secret that an engine may need: it travels in the `run` message alone, never in a file or on a command line.
TOKEN_VARIABLE: Final = "HF_TOKEN"  # noqa: S105 - a name

# Of the hub's cache (huggingface_hub) and of CUDA.
HUB_FOLDER_VARIABLE: Final = "HF_HOME"
GPU_VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
# Of ROCm and of Level Zero, in the place of the former.
OTHER_GPU_VARIABLES: Final = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    from pathlib import Path  # not every command needs it

    if chosen := environ.get(CACHE_VARIABLE):
        return Path(chosen).absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()).absolute() / "lem"


def is_cache_read_only(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is in a container of lem's compose file that cannot write to the cache of models."""
    return environ.get(READ_ONLY_VARIABLE) == "true"


DOWNLOAD_ONCE: Final = f"containers download nothing: run once with {READ_ONLY_VARIABLE}=false"
