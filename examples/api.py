"""A campaign from Python, cell by cell; run it in a notebook, or as `python examples/api.py [CAMPAIGN.yaml]`.

Without an argument it measures the demo: `make demo` creates its model, and the environment that has the engine.
"""

# %% Load a campaign file, and look at the plan
import sys
from pathlib import Path

import lem

campaign = lem.load(sys.argv[1] if len(sys.argv) > 1 else "examples/demo.yaml")
plan = campaign.plan()
print(plan.summary)
for experiment in plan.configurations:
    print(f"  {experiment.config_name}: {experiment.config.model.name}")


# %% Run it; an unfinished run is resumed
def show(event: lem.Event) -> None:
    """Print what happens."""
    if event.kind.startswith("experiment_"):
        print(f"  {event.done} of {event.total}  {event.kind}")


run = campaign.run(on_event=show)

# %% Or read results that exist
results_dir = campaign.loaded.config.io.results_dir
run = lem.read(results_dir, campaign.name)
print(f"run {run.run_id}: {len(run.records)} results, {sum(run.failed.values())} failed experiments")

# %% Estimates: the geometric mean over the cycles, and its 95 % t interval
metric = run.primary_metric.name  # energy per output token if it was measured, else the output throughput
for configuration in run.configurations:
    found = configuration.estimate(metric)
    print(f"  {configuration.name}: {found.value} {found.unit}, {found.low} to {found.high}, {found.n} cycles")

# %% One row per experiment, for pandas
try:
    import pandas as pd
except ImportError:
    print(f"pandas is not installed; the first of {len(run.rows())} rows has {len(run.rows()[0])} columns")
else:
    print(pd.DataFrame(run.rows()).groupby("config_name")["output_tok_per_s"].describe())

# %% Compare two configurations, cycle by cycle
first, second, *_ = run.configurations
for pair in lem.compare(first, second).pairs:
    for row in pair.rows:
        if row.effect is None:
            print(f"  {row.metric.label}: {row.reason}")
        else:
            print(f"  {row.metric.label}: {row.effect.ratio:.3g} times, 95 % interval {row.interval}")

# %% Write the report
print(lem.report(run, Path(results_dir) / "report.html"))
