"""Goes through the steps: one that fails or is cut off takes nothing away from the others."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from tests.gpu.bench import Bench, Step
from tests.gpu.finding import CUT_OFF, DONE, FAILED, LEFT_OUT, Finding, LeftOut, Section
from tests.gpu.report import shown

LEAST_S = 5.0


class CutOff(BaseException):
    """The run is to end now; what is found so far is kept."""


@contextlib.contextmanager
def cut_off_by_signals() -> Iterator[None]:
    """TERM, INT and HUP raise `CutOff` within the block, the first of them."""

    def cut_off(number: int, _frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise CutOff(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, cut_off) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_steps(
    steps: Sequence[Step], bench: Bench, keep: Callable[[Section], None], only: Sequence[str] = ()
) -> list[Section]:
    """What each step came to, also when the run is cut off.

    Args:
        keep: told of a section whenever there is more in it, to be written where it outlives this process.
        only: names of the steps to go through; () for all.
    """
    sections: list[Section] = []
    is_over = False
    for step in steps:
        if only and step.name not in only:
            continue
        if is_over:
            sections.append(Section(step.name, step.title, LEFT_OUT, message="the run was cut off before"))
        elif bench.left_s() < LEAST_S and not step.is_brief:
            text = f"no time: the limit is {bench.extent.limit_s:g} s (run again with --only {step.name})"
            sections.append(Section(step.name, step.title, LEFT_OUT, message=text))
        else:
            sections.append(_run_step(step, bench, keep))
            is_over = sections[-1].status == CUT_OFF
        keep(sections[-1])
    return sections


def _run_step(step: Step, bench: Bench, keep: Callable[[Section], None]) -> Section:
    print(f"\n{step.title}", flush=True)
    begun_s = time.monotonic()
    findings: list[Finding] = []
    status, message = DONE, ""
    try:
        for finding in step.run(bench):
            findings.append(finding)
            print(f"  {finding.name}: {shown(finding.value)} {finding.unit} {finding.note}".rstrip(), flush=True)
            keep(Section(step.name, step.title, CUT_OFF, tuple(findings), "the process ended", 0.0))
    except LeftOut as reason:
        status, message = LEFT_OUT, str(reason)
    except CutOff as reason:
        status, message = CUT_OFF, f"by {reason}"
    except Exception as error:  # noqa: BLE001 - the top of a step: whatever it is, the others go on
        status, message = FAILED, f"{type(error).__name__}: {error}"
        (bench.out / f"{step.name}.traceback").write_text(traceback.format_exc(), encoding="utf-8")
    took_s = time.monotonic() - begun_s
    said = f"  {status}" + (f": {message}" if message else "")
    print(f"{said} ({took_s:.0f} s)", flush=True)
    return Section(step.name, step.title, status, tuple(findings), message, took_s)
