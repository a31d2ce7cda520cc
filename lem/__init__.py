"""lem: energy, throughput and latency of LLM inference, measured in campaigns.

    run = lem.load("campaign.yaml").run()
    for configuration in run.configurations:
        estimate = configuration.estimate("energy_per_output_tok_j")
        print(configuration.name, estimate.value, estimate.low, estimate.high, estimate.n)

docs/api.md describes everything in `__all__`. Importing `lem` imports next to nothing; the rest follows on first use.
As in lem/__main__.py, Python 2.7 must be able to read this file.
"""

from lem.base import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:  # a type checker takes it for true
    from lem.api import Campaign, load, read, report
    from lem.base.errors import LemError, UserError
    from lem.orchestration.plan import Plan
    from lem.orchestration.status import Event
    from lem.results.compare import Comparison, compare
    from lem.results.run import Configuration, Estimate, Run

__all__ = [
    "Campaign",
    "Comparison",
    "Configuration",
    "Estimate",
    "Event",
    "LemError",
    "Plan",
    "Run",
    "UserError",
    "__version__",
    "compare",
    "load",
    "read",
    "report",
]

_HOMES = {
    "Campaign": "lem.api",
    "Comparison": "lem.results.compare",
    "Configuration": "lem.results.run",
    "Estimate": "lem.results.run",
    "Event": "lem.orchestration.status",
    "LemError": "lem.base.errors",
    "Plan": "lem.orchestration.plan",
    "Run": "lem.results.run",
    "UserError": "lem.base.errors",
    "compare": "lem.results.compare",
    "load": "lem.api",
    "read": "lem.api",
    "report": "lem.api",
}


def __getattr__(name):
    # type: (str) -> object
    if name not in _HOMES:
        raise AttributeError("module 'lem' has no attribute %r" % name)
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    # type: () -> list[str]
    return sorted(set(globals()) | set(__all__))
