"""The functions and types of the public API; `lem` exports them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

from lem.base.dataclass import dataclass
from lem.base.errors import Interrupted, UserError
from lem.cli.options import write_file
from lem.cli.report import make_report
from lem.cli.selection import recount, resolve_run
from lem.config.campaign_config import CampaignConfig, slug_of
from lem.config.load import Loaded, load_campaign
from lem.config.sections import SloConfig
from lem.orchestration.campaign import CampaignRunner
from lem.orchestration.executor import EXECUTORS, choose_executor
from lem.orchestration.plan import Plan, plan_campaign
from lem.orchestration.resume import RunOptions
from lem.orchestration.schedule import StopRequest
from lem.orchestration.status import Event
from lem.results.configurations import Reading
from lem.results.run import Run, read_run


@dataclass(frozen=True)
class Campaign:
    """A campaign as it was loaded, validated.

    Attributes:
        loaded: its configuration, and where every option comes from.
    """

    loaded: Loaded[CampaignConfig]

    @property
    def name(self) -> str:
        """The name in the file."""
        return self.loaded.config.campaign_name

    def plan(self) -> Plan:
        """The experiments in the order in which they will run, and which ones were left out and why.

        Raises:
            LemError: prompts that cannot be used.
        """
        return plan_campaign(self.loaded)

    def run(
        self,
        on_event: Callable[[Event], None] = lambda _event: None,
        *,
        resume: bool | None = None,
        executor: str = "auto",
        python: str | None = None,
    ) -> Run:
        """Measure the campaign and return its results; those of experiments that failed are missing.

        On the main thread, the first SIGINT, SIGTERM or SIGHUP stops the campaign after writing everything, and raises
        `Interrupted`, a LemError.

        Args:
            on_event: called with every event, in this thread.
            resume: False starts afresh; by default an unfinished run is resumed.
            executor: `auto`, `local` or `docker`.
            python: the Python that has the engines, for the local executor.

        Raises:
            LemError: an unknown executor, the campaign cannot begin, or an error stopped it.
        """
        if executor not in EXECUTORS:
            raise UserError(f"executor: expected {', '.join(EXECUTORS)}, got {executor!r}")
        config, plan, stop = self.loaded.config, self.plan(), StopRequest()
        options = RunOptions(resume=resume, is_yes=True)
        make_executor = choose_executor(executor, config, plan, python=python).make
        runner = CampaignRunner(config, make_executor(), on_event, stop, options, plan=plan)
        is_main = threading.current_thread() is threading.main_thread()
        with contextlib.closing(stop), stop.installed() if is_main else contextlib.nullcontext():
            outcome = runner.run()
        if outcome.error is not None:
            raise outcome.error
        if outcome.signum is not None:
            raise Interrupted(outcome.signum)
        reading = Reading(recount=recount)
        return read_run(Path(config.io.results_dir), config.slug, str(outcome.manifest.run_id), reading=reading)


def load(path: str | PathLike[str]) -> Campaign:
    """The campaign in a file, with every experiment file that it names.

    Raises:
        LemError: a file cannot be read, or is invalid; the message names the place.
    """
    return Campaign(load_campaign(Path(path)))


def read(
    results_dir: str | PathLike[str],
    campaign: str,
    run: str | None = None,
    *,
    rates: Mapping[str, float] | None = None,
    slo: Mapping[str, float] | None = None,
) -> Run:
    """The results of a run of a campaign.

    Args:
        campaign: its name.
        run: the ID of the run or the beginning of it; by default the last run.
        rates: `grid_g_per_kwh`, `pue` and `price_per_kwh`, by which emissions and cost are computed; by default those
            of the campaign.
        slo: `ttft_ms`, `tpot_ms`, `e2e_ms` and `attainment_pct`, by which good requests are counted; by default those
            of the campaign.

    Raises:
        LemError: no such campaign or run, or more than one.
    """
    slug = slug_of(campaign)
    reading = Reading(rates or {}, None if slo is None else SloConfig.from_dict(slo), recount)
    found = resolve_run(Path(results_dir), slug, run).read(reading=reading)
    owners = {record.identity.campaign_name for record in found.records}
    if owners and campaign not in (slug, *owners):  # as `a b` where the results are those of `a-b`
        raise UserError(f"no campaign {campaign!r}: {found.folder} belongs to campaign {min(owners)!r}")
    return found


def report(run: Run, path: str | PathLike[str]) -> Path:
    """Write the report of a run, one HTML page; returns its path.

    Raises:
        LemError: it cannot be written.
    """
    write_file(Path(path), make_report(run))
    return Path(path)
