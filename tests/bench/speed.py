"""What lem itself costs beside the first build: time and memory of commands, and of the host of a campaign.

    python -m tests.bench.speed [GROUP …] [--pairs N] [--size N]

Both builds run in turn, in ABBA pairs, each on results of its own format. CPU time is that of a process with all that
it starts, and memory is the largest resident size, both by the kernel's account (wait4).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.builds import OLD_COMMIT, ROOT, Build, build_of, old_build
from tests.bench.host import TIMEOUT_S, in_turn

PAIRS = 7
SIZE = 10_000

# Run by a small process, since a child's largest size includes that of the process it was forked from.
_ACCOUNT = """
import os, sys
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""

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
class Cost:
    cpu_s: float
    memory_kib: int


@dataclass(frozen=True)
class Side:
    """A build, and the folder in which it finds what it reads."""

    build: Build
    folder: Path

    def run(self, folder: Path, *words: str) -> Cost:
        """What a command of lem takes, in a folder."""
        return self.cost_of(folder, str(self.build.zip), *words)

    def cost_of(self, folder: Path, *arguments: str) -> Cost:
        command = [sys.executable, "-I", "-S", "-c", _ACCOUNT, sys.executable, *arguments]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("LEM", "PYTHON"))}
        environ |= {"LEM_LOCK_DIR": str(self.folder), "LEM_CACHE_DIR": str(self.folder)}
        done = subprocess.run(
            command, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        code, cpu_s, memory_kib = done.stdout.split()
        if int(code) not in (0, 4):  # `lem check` says 4 where it finds something
            raise RuntimeError(f"{' '.join(arguments)} fails with {code}:\n{done.stderr[-2000:]}")
        return Cost(float(cpu_s), int(memory_kib))

    def results(self, count: int) -> Path:
        """A folder with a campaign of that many results, 5 for each configuration."""
        return self._made(f"results-{count}", _RESULTS, str(count))

    def demo(self) -> Path:
        """A folder with results like those of the demo."""
        return self._made("demo", _DEMO)

    def grid(self, count: int) -> Path:
        folder = self.folder / f"grid-{count}"
        folder.mkdir(exist_ok=True)
        axes = (range(1, count // 100 + 1), range(101, 111), range(1, 11))
        text = _GRID.format(list(axes[0]), list(axes[1]), [value / 10 for value in axes[2]])
        (folder / "grid.yaml").write_text(text, encoding="utf-8")
        return folder

    def _made(self, name: str, program: str, *arguments: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            command = [sys.executable, "-c", program, str(folder), *arguments]
            subprocess.run(command, cwd=self.build.tree, check=True)
        return folder


@dataclass(frozen=True)
class Row:
    name: str
    unit: str
    target: float | None = None
    is_of_old: bool = True  # whether the target limits the ratio of new to old; otherwise it limits the new value

    def line(self, pairs: Sequence[tuple[float, float]]) -> str:
        """A line of the table from pairs of the new and the old value."""
        new, old = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        line = f"{self.name:<56}{old:>10.3f}{new:>10.3f} {self.unit:<4}{ratio:>8.3f}"
        if self.target is None:
            return line.rstrip()
        judged, unit = (ratio, "x") if self.is_of_old else (new, self.unit)
        return f"{line}{f'{self.target:.2f} {unit}':>10}  {'ok' if judged <= self.target else 'OVER'}"


HEADER = f"{'median of pairs':<56}{OLD_COMMIT[:7]:>10}{'now':>10} {'unit':<4}{'ratio':>8}{'target':>10}"


@dataclass(frozen=True)
class Group:
    """What one run of a build gives: a value for each row."""

    rows: tuple[Row, ...]
    measure: Callable[[Side, int], tuple[float, ...]]
    pair_s: float  # what a pair of both takes, roughly
    more_pairs: int = 1  # factor where a pair takes no time

    def pairs(self, now: Side, then: Side, size: int, count: int) -> list[tuple[tuple[float, float], ...]]:
        """For each row, its pairs of the new and the old value."""
        found = in_turn(lambda: self.measure(now, size), lambda: self.measure(then, size), count)
        runs = [tuple(zip(new, old, strict=True)) for new, old in found]
        return list(zip(*runs, strict=True))


def _reading(title: str, *words: str, cpu: float | None = None, memory: float | None = None, pair_s: float) -> Group:
    """A command that reads results."""

    def measure(side: Side, count: int) -> tuple[float, ...]:
        cost = side.run(side.results(count), *words)
        return cost.cpu_s, cost.memory_kib / 1024

    return Group((Row(f"{title}: CPU time", "s", cpu), Row(f"{title}: memory", "MiB", memory)), measure, pair_s)


def _dry_run(side: Side, count: int) -> tuple[float, ...]:
    cost = side.run(side.grid(count), "campaign", "grid.yaml", "--dry-run")
    return cost.cpu_s, cost.memory_kib / 1024


_STARTS = (
    (Row("config validate of the demo, above bare Python", "ms", 0.5), ("config", "validate", "{demo.yaml}")),
    (Row("status of the demo, above bare Python", "ms", 0.5), ("status", "demo")),
    (Row("compare of the demo, above bare Python", "ms", 0.5), ("compare", "demo")),
    (Row("report of the demo, above bare Python", "ms", 0.5), ("report", "demo", "--output", "demo.html")),
    (Row("--help, above bare Python", "ms", 25, is_of_old=False), ("--help",)),
)


def _start_up(side: Side, _: int) -> tuple[float, ...]:
    folder, file = side.demo(), str(side.build.tree / "examples" / "demo.yaml")
    bare_s = statistics.median(side.cost_of(folder, "-c", "pass").cpu_s for _ in range(3))
    costs = (side.run(folder, *(file if word == "{demo.yaml}" else word for word in words)) for _, words in _STARTS)
    return tuple(1000 * (cost.cpu_s - bare_s) for cost in costs)


GROUPS: Mapping[str, Group] = {
    "startup": Group(tuple(row for row, _ in _STARTS), _start_up, 4, more_pairs=3),
    "report": _reading("report", "report", "demo", "--output", "demo.html", cpu=0.2, pair_s=25),
    "compare": _reading("compare", "compare", "demo", cpu=0.2, pair_s=12),
    "check": _reading("check", "check", "demo", cpu=0.2, pair_s=12),
    "export": _reading(
        "results export", "results", "export", "demo", "--output", "demo.csv", cpu=0.35, memory=0.2, pair_s=15
    ),
    "status": _reading("status", "status", "demo", pair_s=2),
    "list": _reading("results list", "results", "list", pair_s=6),
    "grid": Group(
        (Row("campaign --dry-run: CPU time", "s", 0.5), Row("campaign --dry-run: memory", "MiB")),
        _dry_run,
        8,
    ),
}


def main() -> int:
    """0; the figures are for a person to judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="results, or experiments (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"unknown group: {', '.join(sorted(unknown))}")
    names = arguments.groups or list(GROUPS)
    seconds = (
        sum(GROUPS[name].pair_s * (arguments.pairs * GROUPS[name].more_pairs + 1) for name in names)
        * arguments.size
        / SIZE
    )
    print(f"about {math.ceil(seconds / 60)} min on an idle machine, and more beside other work", flush=True)
    with tempfile.TemporaryDirectory(prefix="lem-speed-") as text:
        folder = Path(text)
        (folder / "then").mkdir()
        (folder / "now").mkdir()
        then = Side(old_build(), folder / "then")
        now = Side(build_of(ROOT, folder / "lem.pyz"), folder / "now")
        print(HEADER)
        for name in names:
            group = GROUPS[name]
            found = group.pairs(now, then, arguments.size, arguments.pairs * group.more_pairs)
            for row, pairs in zip(group.rows, found, strict=True):
                print(row.line(pairs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
