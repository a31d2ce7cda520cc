"""What a 95 % interval truly covers when cycles are added until it is narrow enough (`lem campaign --until`).

Needs nothing but this Python: `python -m tests.bench.stopping [TRIALS]`. Cycles are drawn log-normal; the true value is
known. The first row is the rule's best case, a fixed number of cycles.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence

from lem.results.run import LEAST_CYCLES, MOST_CYCLES
from lem.results.student import student_t_quantile

# The standard deviation between cycles over the half width that is asked for.
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)


def coverage(ratio: float, trials: int, *, n_configurations: int = 1, seed: int = 1) -> tuple[float, float]:
    """How often the interval at the end holds the true value, and the mean number of cycles.

    Args:
        ratio: the standard deviation between cycles over the half width asked for.
        n_configurations: that all have to be narrow; the first one's interval is looked at.
    """
    rng = random.Random(seed)
    covered = cycles = 0
    for _ in range(trials):
        logs: list[list[float]] = [
            [rng.gauss(0.0, ratio) for _ in range(LEAST_CYCLES)] for _ in range(n_configurations)
        ]
        while len(logs[0]) < MOST_CYCLES and any(_half_width(values) > 1.0 for values in logs):
            for values in logs:
                values.append(rng.gauss(0.0, ratio))
        covered += abs(math.fsum(logs[0]) / len(logs[0])) <= _half_width(logs[0])
        cycles += len(logs[0])
    return covered / trials, cycles / trials


def main(argv: Sequence[str]) -> None:
    trials = int(argv[0]) if argv else 20_000
    print(f"true coverage of the 95 % t interval, {LEAST_CYCLES} to {MOST_CYCLES} cycles, {trials} trials")
    print(f"{'sd / target':>12}  {'1 configuration':>24}  {'4 configurations':>24}")
    for ratio in RATIOS:
        cells = [
            f"{100 * covered:.1f} %, {cycles:.1f} cycles"
            for covered, cycles in (coverage(ratio, trials, n_configurations=count) for count in (1, 4))
        ]
        print(f"{ratio:>12g}  {cells[0]:>24}  {cells[1]:>24}")


def _half_width(values: Sequence[float]) -> float:
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return student_t_quantile(0.975, n - 1) * math.sqrt(variance / n)


if __name__ == "__main__":
    main(sys.argv[1:])
