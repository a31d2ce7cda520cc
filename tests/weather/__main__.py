"""Every weather in one table: what happened to a campaign in real containers, and what lem made of it.

    python -m tests.weather [--jobs 4] [NAME …]

A name is a part of a weather's; without any, all of them. Needs the lab (tests/lab/README.md) and root.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.needs import missing
from tests.weather.cases import CASES
from tests.weather.driver import judge_all
from tests.weather.verdict import format_table


def main() -> int:
    """0 when every weather went well, 1 otherwise, 2 without a lab; the table on stdout."""
    parser = argparse.ArgumentParser(prog="tests.weather", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of the name of a weather")
    parser.add_argument("--jobs", type=int, default=4, help="campaigns at a time (%(default)s)")
    args = parser.parse_args()
    reason = missing("lab") or missing("gcc")
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    chosen = [case for case in CASES if not args.names or any(name in case.name for name in args.names)]
    folder = Path(tempfile.mkdtemp(prefix="lem-weather-"))
    begin = time.monotonic()
    verdicts = judge_all(chosen, folder, jobs=args.jobs)
    print(format_table(verdicts))
    bad = [verdict for verdict in verdicts if verdict.problems]
    for verdict in bad:
        print(f"\n! {verdict.weather}")
        for problem in verdict.problems:
            print(f"  {problem}")
    print(f"\n{len(verdicts) - len(bad)} of {len(verdicts)} went well, in {time.monotonic() - begin:.0f} s")
    if not bad:
        shutil.rmtree(folder)
    else:
        print(f"files in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
