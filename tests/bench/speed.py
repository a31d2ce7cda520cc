"""What lem itself costs beside the first build: time and memory of commands, and of the host of a campaign.

    python -m tests.bench.speed [GROUP …] [--pairs N] [--size N] [--growth]

Both builds run in turn, in ABBA pairs, each on results of its own format. CPU time is that of a process with all that
it starts, of a campaign that of the host process alone; memory is the largest resident size. Growth repeats it with
other numbers of results or experiments.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.builds import OLD_COMMIT, ROOT, Build, build_of, old_build
from tests.bench.host import Cost, HostCost, in_turn, process_cost, run_host

PAIRS = 7
SIZE = 10_000
SIZES = (100, 1_000, SIZE)
PLAN_SIZES = (*SIZES, 30_000)
GROWTH_PAIRS = 3
FINDINGS = 4  # exit code of `lem check`

# Run in the tree of a build. A campaign of this build records digests and an index; the first build has neither.
_RESULTS = """
import sys
from pathlib import Path
from tests.synthetic_campaign import Campaign, sweep
options = {"is_verifiable": True} if hasattr(Campaign, "is_verifiable") else {}
sweep(int(sys.argv[2]), cycles=5, **options).write(Path(sys.argv[1]))
"""
_DEMO = """
import sys
from pathlib import Path
from tests.synthetic_campaign import Campaign, Configuration
configurations = tuple(
    Configuration(
        f"pytorch-batch_size={size}-max_output_tokens={tokens}",
        "pytorch",
        batch_size=size,
        options={"max_output_tokens": tokens},
        energy_per_output_tok_j=2.0 / size,
        output_tok_per_s=250.0 * size,
    )
    for size in (1, 4)
    for tokens in (16, 32)
)
options = {"is_verifiable": True} if hasattr(Campaign, "is_verifiable") else {}
Campaign(configurations, cycles=3, window_s=2.5, **options).write(Path(sys.argv[1]))
"""

_GRID = """\
campaign_name: grid
model: trivial
grid:
  backends: [pytorch]
  shared:
    max_output_tokens: {}
    max_input_tokens: {}
    decoder.temperature: {}
execution: {{cycles: 1}}
"""


@dataclass(frozen=True)
class Side:
    """A build, and the folder in which it finds what it reads."""

    build: Build
    folder: Path

    def lem(self, folder: Path, *words: str) -> Cost:
        return self.python(folder, str(self.build.zip), *words)

    def python(self, folder: Path, *arguments: str) -> Cost:
        environ = {"LEM_LOCK_DIR": str(self.folder), "LEM_CACHE_DIR": str(self.folder)}
        return process_cost(folder, *arguments, codes=(0, FINDINGS), environ=environ)

    def results(self, count: int) -> Path:
        """A folder with a campaign of that many results, 5 for each configuration."""
        return self._made(f"results-{count}", _RESULTS, str(count))

    def demo(self) -> Path:
        """A folder with results like those of the demo."""
        return self._made("demo", _DEMO)

    def grid(self, count: int) -> Path:
        """A folder with a campaign file of that many experiments."""
        folder = self.folder / f"grid-{count}"
        folder.mkdir(exist_ok=True)
        axes = (range(1, count // 100 + 1), range(101, 111), (value / 10 for value in range(1, 11)))
        (folder / "grid.yaml").write_text(_GRID.format(*map(list, axes)), encoding="utf-8")
        return folder

    def host(self, planned: int, results: int) -> HostCost:
        folder = self.folder / "campaign"
        try:
            return run_host(self.build, folder, planned, results)
        finally:
            shutil.rmtree(folder)

    def _made(self, name: str, program: str, *arguments: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            subprocess.run([sys.executable, "-c", program, str(folder), *arguments], cwd=self.build.tree, check=True)
        return folder


Pairs = Sequence[tuple[float, float]]  # the new and the old value


@dataclass(frozen=True)
class Row:
    name: str
    unit: str
    target: float | None = None
    is_of_old: bool = True  # whether the target limits the ratio of new to old; otherwise it limits the new value
    is_each: bool = False  # a cost of each one, which should not grow, rather than of all

    def line(self, pairs: Pairs) -> str:
        """A line of the table."""
        new, old = _medians(pairs)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        line = f"{self.name:<52}{old:>11.3f}{new:>11.3f} {self.unit:<4}{ratio:>8.3f}"
        if self.target is None:
            return line.rstrip()
        judged, unit = (ratio, "x") if self.is_of_old else (new, self.unit)
        return f"{line}{f'{self.target:.2f} {unit}':>10}  {'ok' if judged <= self.target else 'OVER'}"

    def growth_lines(self, found: Mapping[int, Pairs]) -> tuple[str, str]:
        """A line for each build: the row at each size, and the exponent by which it grows."""
        new, old = zip(*(_medians(pairs) for pairs in found.values()), strict=True)
        fit, sizes = slope if self.is_each else exponent, tuple(found)
        return (
            f"{f'{self.name} [{self.unit}]':<52}{OLD_COMMIT[:7]:>8}{_cells(old)}{fit(sizes, old):>10.2f}",
            f"{'':<52}{'now':>8}{_cells(new)}{fit(sizes, new):>10.2f}",
        )


HEADER = f"{'median of pairs':<52}{OLD_COMMIT[:7]:>11}{'now':>11} {'unit':<4}{'ratio':>8}{'target':>10}"
GROWTH_HEADER = f"{'growth':<52}{'build':>8}{''.join(f'{size:>10,}' for size in PLAN_SIZES)}{'exponent':>10}"


def _medians(pairs: Pairs) -> tuple[float, float]:
    new, old = zip(*pairs, strict=True)
    return statistics.median(new), statistics.median(old)


def _cells(values: Sequence[float]) -> str:
    cells = [f"{value:>10.2f}" for value in values]
    return "".join(cells + [f"{'':>10}"] * (len(PLAN_SIZES) - len(cells)))


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The power of n by which a cost grows beside its constant part: k of a + b * n**k, by least relative errors."""

    def error(power: float) -> float:
        ones, basis = [1 / value for value in values], [math.pow(size, power) for size in sizes]
        scaled = [one * x for one, x in zip(ones, basis, strict=True)]
        # constant * ones + factor * scaled is to be 1 everywhere
        aa, ab, bb = _dot(ones, ones), _dot(ones, scaled), _dot(scaled, scaled)
        constant = max((sum(ones) * bb - sum(scaled) * ab) / (aa * bb - ab * ab), 0.0)
        factor = (sum(scaled) - constant * ab) / bb
        return sum((constant * one + factor * x - 1) ** 2 for one, x in zip(ones, scaled, strict=True))

    return min((step / 100 for step in range(1, 301)), key=error)


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The power of n by which a cost grows: k of b * n**k."""
    line = statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, values)])
    return float(line.slope)


# What one run of a build gives with so many results or experiments: a value for each row of its group

Measure = Callable[[Side, int], tuple[float, ...]]


def _reading(words: Sequence[str], side: Side, count: int) -> tuple[float, ...]:
    """A command that reads results."""
    cost = side.lem(side.results(count), *words)
    return cost.cpu_s, cost.memory_kib / 1024


def _without_index(side: Side, count: int) -> tuple[float, ...]:
    for index in (side.results(count) / "results").glob("*/*/index.jsonl"):
        index.unlink()
    return _reading(("results", "list"), side, count)


def _dry_run(side: Side, count: int) -> tuple[float, ...]:
    cost = side.lem(side.grid(count), "campaign", "grid.yaml", "--dry-run")
    return cost.cpu_s, cost.memory_kib / 1024


def _start_up(side: Side, _: int) -> tuple[float, ...]:
    """Milliseconds of CPU time above those of Python alone."""
    folder, file = side.demo(), str(side.build.tree / "examples" / "demo.yaml")
    bare_s = statistics.median(side.python(folder, "-c", "pass").cpu_s for _ in range(3))
    commands = (
        ("config", "validate", file),
        ("status", "demo"),
        ("compare", "demo"),
        ("report", "demo", "--output", "demo.html"),
        ("--help",),
    )
    return tuple(1000 * (side.lem(folder, *words).cpu_s - bare_s) for words in commands)


RESULTS = 40  # of a campaign that is then stopped
FEW, FEWER = 100, 22  # experiments of small plans


def _host(side: Side, planned: int) -> tuple[float, ...]:
    cost = side.host(planned, RESULTS)
    return cost.first_cpu_s, cost.memory_kib / 1024, 1000 * cost.each_cpu_s, 1000 * cost.turn_s


def _host_and_small(side: Side, planned: int) -> tuple[float, ...]:
    """With what an experiment costs relative to one of a small plan."""
    *others, each_ms, turn_ms = _host(side, planned)
    few, fewer = side.host(FEW, RESULTS), side.host(FEWER, FEWER)
    return *others, each_ms, turn_ms, each_ms / 1000 / few.each_cpu_s, turn_ms / 1000 / fewer.turn_s


@dataclass(frozen=True)
class Group:
    rows: tuple[Row, ...]
    measure: Measure
    pair_s: float  # roughly, with SIZE
    sizes: tuple[int, ...] = SIZES  # at which its growth is measured
    at_others: Measure | None = None  # gives the first rows at other sizes than SIZE; None: `measure` gives all
    factor: int = 1  # on the number of pairs, where one takes little time

    def pairs(self, now: Side, then: Side, size: int, count: int) -> list[Pairs]:
        """The pairs of each row."""
        measure = self.measure if size == SIZE or self.at_others is None else self.at_others
        runs = in_turn(partial(measure, now, size), partial(measure, then, size), count * self.factor)
        return list(zip(*(zip(new, old, strict=True) for new, old in runs), strict=True))


def _rows(title: str, cpu: float | None = None, memory: float | None = None) -> tuple[Row, Row]:
    return Row(f"{title}: CPU time", "s", cpu), Row(f"{title}: memory", "MiB", memory)


_REPORT = ("report", "demo", "--output", "demo.html")
_EXPORT = ("results", "export", "demo", "--output", "demo.csv")

GROUPS: Mapping[str, Group] = {
    "startup": Group(
        (
            *(Row(f"{name} of the demo, above Python", "ms", 0.5) for name in ("config validate", "status", "compare")),
            Row("report of the demo, above Python", "ms", 0.5),
            Row("--help, above Python", "ms", 25, is_of_old=False),
        ),
        _start_up,
        4,
        sizes=(),
        factor=3,
    ),
    "report": Group(_rows("report", 0.2), partial(_reading, _REPORT), 25),
    "compare": Group(_rows("compare", 0.2), partial(_reading, ("compare", "demo")), 12),
    "check": Group(_rows("check", 0.2), partial(_reading, ("check", "demo")), 12),
    "export": Group(_rows("results export", 0.35, 0.2), partial(_reading, _EXPORT), 15),
    "status": Group(_rows("status"), partial(_reading, ("status", "demo")), 2),
    "list": Group(_rows("results list"), partial(_reading, ("results", "list")), 6),
    "index": Group(_rows("results list, without an index"), _without_index, 14),
    "grid": Group(_rows("campaign --dry-run", 0.5), _dry_run, 8, PLAN_SIZES),
    "host": Group(
        (
            Row("campaign: CPU time until the first result", "s"),
            Row("campaign: memory", "MiB", 0.5),
            Row("campaign: CPU time of an experiment", "ms", is_each=True),
            Row("campaign: result to next start, wall time", "ms", is_each=True),
            Row(f"campaign: CPU time of an experiment / of {FEW}", "x", 1.15, is_of_old=False),
            Row(f"campaign: result to next start / of {FEWER}", "x", 1.2, is_of_old=False),
        ),
        _host_and_small,
        60,
        PLAN_SIZES,
        _host,
    ),
}


def growth(group: Group, found: dict[int, list[Pairs]], now: Side, then: Side) -> None:
    """Print the rows of a group at its sizes; those in `found` were measured before."""
    for size in group.sizes:
        if size not in found:
            found[size] = group.pairs(now, then, size, GROWTH_PAIRS)
    for index, row in enumerate(group.rows if group.sizes else ()):
        if all(index < len(found[size]) for size in group.sizes):  # `at_others` gives the first rows only
            for line in row.growth_lines({size: found[size][index] for size in group.sizes}):
                print(line, flush=True)


def main() -> int:
    """0; the figures are for a person to judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="results, or experiments (default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="also at other sizes")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"unknown group: {', '.join(sorted(unknown))}")
    groups = {name: GROUPS[name] for name in arguments.groups or GROUPS}
    print(
        f"about {_minutes([*groups.values()], arguments)} min on an idle machine, and more beside other work",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="lem-speed-") as text:
        folder = Path(text)
        for name in ("then", "now"):
            (folder / name).mkdir()
        then = Side(old_build(), folder / "then")
        now = Side(build_of(ROOT, folder / "lem.pyz"), folder / "now")
        size, found = arguments.size, {}
        print(f"{HEADER}  ({size:,} results, or experiments)")
        for name, group in groups.items():
            found[name] = group.pairs(now, then, size, arguments.pairs)
            for row, pairs in zip(group.rows, found[name], strict=False):
                print(row.line(pairs), flush=True)
        if arguments.growth:
            print(f"\n{GROWTH_HEADER}")
            for name, group in groups.items():
                growth(group, {size: found[name]}, now, then)
    return 0


def _minutes(groups: Sequence[Group], arguments: argparse.Namespace) -> int:
    """The expected duration; a pair takes time in proportion to its size."""
    seconds = 0.0
    for group in groups:
        seconds += group.pair_s * (arguments.pairs * group.factor + 1) * max(arguments.size / SIZE, 0.05)
        others = {*group.sizes} - {arguments.size} if arguments.growth else ()
        seconds += sum(group.pair_s * (GROWTH_PAIRS + 1) * max(size / SIZE, 0.05) for size in others)
    return math.ceil(seconds / 60)


if __name__ == "__main__":
    sys.exit(main())
