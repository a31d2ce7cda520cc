"""What of the lab is there, by looking and not by remembering."""

from __future__ import annotations

from collections.abc import Iterator

from tests.lab.engine import engine_version, own_engine
from tests.lab.environments import is_filled
from tests.lab.image import RECIPE, image_recipe
from tests.lab.packages import compose_version
from tests.lab.places import BACKENDS, BASE_IMAGE, LAB_COMPOSE_FILES, MODELS, Places


def lacking(places: Places) -> tuple[str, ...]:
    """A line for each thing that is missing; empty when the lab is up."""
    return (*_missing_containers(), *lacking_environments(places))


def lacking_environments(places: Places) -> tuple[str, ...]:
    """A line for each thing that is missing to run engines without containers."""
    return tuple(_missing_environments(places))


def _missing_containers() -> Iterator[str]:
    if engine_version() is None:
        yield "no Docker Engine answers"
    elif image_recipe() != RECIPE:
        yield f"the engine has no image {BASE_IMAGE} of recipe {RECIPE}"
    if compose_version() is None:
        yield "the docker command has no Compose plugin from 2.17 on"


def _missing_environments(places: Places) -> Iterator[str]:
    for backend in BACKENDS:
        if not is_filled(places, backend):
            yield f"{places.environment(backend)} does not hold what requirements-{backend}.txt pins"
    for size in MODELS:
        if not (places.models / size / "config.json").is_file():
            yield f"no model in {places.models / size}"
        if not places.gguf(size).is_file():
            yield f"no {places.gguf(size)}"


def report(places: Places) -> tuple[str, ...]:
    engine = own_engine(places)
    whose = f"the lab's own, process {engine.process.pid}, log {engine.log}" if engine else "not the lab's"
    version = engine_version()
    return (
        f"engine    {version} ({whose})" if version else "engine    none answers",
        f"compose   {compose_version() or 'none'}",
        f"image     {BASE_IMAGE} (recipe {image_recipe()})",
        *(f"{backend:<9} {places.packages(backend)}" for backend in BACKENDS),
        f"models    {places.models}",
        f"files     {', '.join(map(str, LAB_COMPOSE_FILES))}",
    )
