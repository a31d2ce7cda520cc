"""Result folders written by the test tools of the old commit: run there, with that tree as the working directory.

python -m tests.equivalence.synthetic    (of the harness; the program below runs in the old tree)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.equivalence.builds import Build, HarnessError

# Each campaign lies in a folder of its own, named as here; those of one folder are written into it together.
PROGRAM = """
import dataclasses
import sys
from pathlib import Path

from tests.synthetic_campaign import Campaign, Configuration

PYTORCH = Configuration("pytorch", backend="pytorch", energy_per_output_tok_j=0.5, output_tok_per_s=900)
VLLM = Configuration("vllm", energy_per_output_tok_j=0.2, ttft_s=0.05)
FLOAT16 = Configuration("vllm-float16", precision="float16", energy_per_output_tok_j=0.201, ttft_s=0.051)
LARGE = Configuration("vllm-batch128", batch_size=128, energy_per_output_tok_j=0.12, output_tok_per_s=4000)
ROUGH = (
    dataclasses.replace(PYTORCH, throttled_cycles=(1,), failed_cycles=(3,), capped_ratio=0.4),
    dataclasses.replace(VLLM, invalid_attempts={0: 1, 2: 2}, is_steady=False, warnings=("something was odd",)),
    dataclasses.replace(FLOAT16, energy_per_output_tok_j=None, ttft_s=None),
    dataclasses.replace(LARGE, energy_source="tdp_estimate", output_tok_ratio=0.8, prompts="b" * 64),
    Configuration("tensorrt", backend="tensorrt", failed_cycles=(0, 1, 2, 3, 4)),
)
BASE = Campaign((PYTORCH, VLLM, FLOAT16, LARGE), cycle_sd=0.01, load_sd=0.005, window_s=4.0, cycles=3)
LATER = {"run_id": "20260801T100000Z-0b0b"}
SLOWER = tuple(dataclasses.replace(item, output_tok_per_s=item.output_tok_per_s * 0.93) for item in BASE.configurations)
FOLDERS = {
    "plain": (BASE,),
    # One GPU: of two, these tools write a net energy that does not follow from the power at rest, so that it is damage.
    "rough": (dataclasses.replace(BASE, configurations=ROUGH, cycles=5, structure="shuffled"),),
    "drifting": (dataclasses.replace(BASE, drift=0.03, cycles=8, has_samples=False),),
    "reused": (dataclasses.replace(BASE, is_reused=True, has_samples=False),),
    "single": (dataclasses.replace(BASE, cycles=1, has_samples=False, gpu_serial=2),),
    "interrupted": (dataclasses.replace(BASE, stop_after=5),),
    "two-runs": (
        dataclasses.replace(BASE, has_samples=False, cycles=6),
        dataclasses.replace(BASE, has_samples=False, cycles=6, day_sd=0.02, configurations=SLOWER, **LATER),
    ),
    "two-cards": (
        dataclasses.replace(BASE, has_samples=False),
        dataclasses.replace(BASE, has_samples=False, gpu_name="NVIDIA L4", driver="580.1", power_limit_w=72.0, **LATER),
    ),
    "host1": (dataclasses.replace(BASE, host="gpu1", has_samples=False, structure="grouped"),),
    "host2": (dataclasses.replace(BASE, host="gpu2", has_samples=False, seed=2, gpu_serial=5),),
    "sweep": (
        Campaign(
            tuple(
                Configuration(
                    f"vllm-b{batch}-{precision}", batch_size=batch, precision=precision,
                    energy_per_output_tok_j=3 / batch, output_tok_per_s=40 * batch, ttft_s=0.04 + batch / 1000,
                )
                for batch in (8, 16, 32, 64) for precision in ("float16", "bfloat16")
            ),
            name="sweep", cycles=3, has_samples=False, is_reused=False,
        ),
    ),
}
for name, campaigns in FOLDERS.items():
    for campaign in campaigns:
        campaign.write(Path(sys.argv[1], name))
"""
FOLDERS = ("plain", "rough", "drifting", "reused", "single", "interrupted", "two-runs", "two-cards", "sweep")


def synthetic_folder(old: Build) -> Path:
    """The folder that holds a folder for each of FOLDERS, and `host1` and `host2`; written once by a program.

    Raises:
        HarnessError: the old test tools failed.
    """
    folder = old.zip.parent / "synthetic"
    written_by = folder / "program.txt"
    if not written_by.exists() or written_by.read_text(encoding="utf-8") != PROGRAM:
        unfinished = folder.with_name("synthetic.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-c", PROGRAM, str(unfinished)]
        written = subprocess.run(command, cwd=old.tree, capture_output=True, text=True, check=False)
        if written.returncode != 0:
            raise HarnessError(f"the synthetic results could not be written\n{written.stderr}")
        (unfinished / written_by.name).write_text(PROGRAM, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return folder
