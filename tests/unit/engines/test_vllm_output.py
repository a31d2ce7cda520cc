"""What processes print that inherit the descriptors is passed on, and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

# In a process of its own: descriptors 1 and 2 are the whole process's.
PROGRAM = """
import os, subprocess, sys
from lem.engines.vllm.running import ChildOutput
output = ChildOutput()
print("before")
with output.inherited():
    print("inside")
    os.write(2, b"direct\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('child'); print('child error', file=sys.stderr)"])
    late = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); print('late')"], stdin=subprocess.PIPE
    )
kept = output.text
print("after")
late.communicate(b"")
while "late" not in output.text:
    pass
print(sorted(kept.split("\\n")), flush=True)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """In a Python of its own, whose output nobody else writes to."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_output_is_passed_on_to_where_errors_go_and_kept() -> None:
    finished = run(PROGRAM)
    before, after, kept = finished.stdout.splitlines()
    assert (before, after) == ("before", "after")
    assert kept == "['', 'child', 'child error', 'direct', 'inside']"
    assert sorted(finished.stderr.split()) == sorted(["inside", "direct", "child", "child", "error", "late"])


def test_all_that_was_printed_is_there_on_leaving() -> None:
    program = """
import subprocess, sys
from lem.engines.vllm.running import ChildOutput
output = ChildOutput()
with output.inherited():
    subprocess.run([sys.executable, "-c", "print('x' * 100 + chr(10), end='') or print('end', flush=True)"])
    print("y" * 200_000)
print(output.text.count("y"), output.text.splitlines()[1])
"""
    finished = run(program)
    assert finished.stdout.split() == ["200000", "end"]
