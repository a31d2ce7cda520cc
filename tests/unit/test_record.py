"""The record: what tells two of them apart."""

from __future__ import annotations

from tests.records import make_record


def test_the_key_tells_attempts_cycles_runs_and_hosts_apart() -> None:
    records = [
        make_record(),
        make_record(attempt=2),
        make_record(cycle=1),
        make_record(run_id="r2"),
        make_record(host="b"),
    ]
    assert len({record.identity.key for record in records}) == 5
