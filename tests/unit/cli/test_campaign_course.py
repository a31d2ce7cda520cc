"""`lem campaign --until`, `--max-cycles`, `--budget`: what they are refused for, and what a dry run says of them."""

import pytest

from lem.results.store import Repository
from tests.campaign_rig import campaign_text
from tests.command_rig import run_lem
from tests.records import make_record


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    (tmp_path / "c.yaml").write_text(campaign_text())
    return tmp_path


def _run(*words):
    return run_lem("campaign", "c.yaml", "--executor", "local", *words)


def _dry_run(*words):
    code, out, _ = _run("--dry-run", *words)
    assert code == 0
    return " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--until", "2%"], "expected a target such as ci=2%"),
        (["--until", "ci=2%:watts"], "unknown metric 'watts'"),
        (["--until", "ci=2%", "--max-cycles", "4"], "5 to 20"),
        (["--until", "ci=2%", "--max-cycles", "7", "--cycles", "9"], "more than --max-cycles 7"),
        (["--until", "ci=2%", "--structure", "grouped"], "AAA BBB"),
        (["--until", "ci=2%", "--set", "execution.reuse=campaign"], "execution.reuse=cycle"),
        (["--until", "ci=2%", "--set", "daemon.enabled=true"], "daemon"),
        (["--until", "ci=2%", "--shard", "1/2"], "cannot be combined with --shard"),
        (["--max-cycles", "9"], "--until"),
        (["--budget", "8"], "write it like 90s"),
        (["--budget", "8h", "--set", "daemon.enabled=true"], "total_duration"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(here, words, complaint):
    code, out, err = _run(*words)
    assert (code, out) == (2, "")
    assert complaint in " ".join(err.split())
    assert [path.name for path in here.iterdir()] == ["c.yaml"]


def test_a_dry_run_shows_the_five_cycles_at_least_and_what_all_of_them_would_take(here):
    shown = _dry_run("--until", "ci=2%:e2e_p50_s", "--max-cycles", "8", "--cycles", "2")
    assert "2 configurations × 5 cycles = 10" in shown
    assert "until every interval of e2e_p50_s is within ±2 % (5 cycles at least, 8 at most)" in shown


def _measure_before(folder):
    """Leave a result of each configuration."""
    from lem.config.load import load_campaign
    from lem.orchestration.plan import build_plan
    from lem.record import write_record

    loaded = load_campaign("c.yaml")
    for item in build_plan(loaded.config, loaded.listed).configurations:
        record = make_record(config_name=item.config_name, config_hash=item.config_hash)
        attempt = Repository(folder / "results", "demo").prepare_attempt(record.identity.run_id, item.exp_id)
        write_record(attempt.result_path, record)


def test_a_dry_run_prices_a_top_up_from_earlier_results(here):
    _measure_before(here)
    shown = _dry_run("--until", "ci=2%", "--max-cycles", "10")
    # 1.5 s of warm-up and 10 s of window each, 0.8 s a load: five cycles of two, then ten.
    assert "expected time: about 1m 59s (measuring 1m 55s, loading 4.0 s" in shown
    assert "at most 3m 58s" in shown


def test_a_dry_run_says_how_much_of_the_plan_a_budget_holds(here):
    assert "unknown before the first run" in _dry_run("--budget", "1h")
    _measure_before(here)
    assert "1h 00m, enough for the whole plan" in _dry_run("--budget", "1h")
    assert "20.0 s, enough to start about 2 of 4 experiments" in _dry_run("--budget", "20s")
