"""The steps in their order: bare idle before any context, the campaign with the time that is left."""

from __future__ import annotations

from tests.gpu.bench import Step
from tests.gpu.steps.additivity import Additivity
from tests.gpu.steps.beside_zeus import BesideZeus
from tests.gpu.steps.campaign import Campaign
from tests.gpu.steps.clock_events import ClockEvents
from tests.gpu.steps.edges import Edges
from tests.gpu.steps.idle import Idle
from tests.gpu.steps.make_models import MakeModels
from tests.gpu.steps.meters import Meters
from tests.gpu.steps.options import Options
from tests.gpu.steps.sampler_cost import SamplerCost
from tests.gpu.steps.square_wave import SquareWave

STEPS: tuple[Step, ...] = (
    MakeModels(),
    Idle(),
    Meters(),
    Additivity(),
    Edges(),
    SquareWave(),
    BesideZeus(),
    SamplerCost(),
    Campaign(),
    Options(),
    ClockEvents(),
)
