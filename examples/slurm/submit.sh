#!/bin/bash
# Run a campaign on a Slurm cluster: plan its parts, and submit them as a job array with a merge that waits for it.
#   bash examples/slurm/submit.sh my.yaml 4 --partition gpu --gres gpu:1
# Run it on the login node, in a folder that all nodes see. The options are those of `lem fleet slurm`; docs/fleet.md.
# LEM is the command that runs lem; add --python to name the Python interpreter of the nodes.
set -euo pipefail
campaign=$1 parts=$2
shift 2
lem=${LEM:-lem}
name=$(basename "$campaign" .yaml)

# A stored plan is never changed: a second call submits the same parts again, and they resume.
[ -f "$name.plan.json" ] || $lem campaign "$campaign" --write-plan "$name.plan.json" --parts "$parts"
$lem fleet slurm "$name.plan.json" "$@" > "$name.sbatch"
bash "$name.sbatch"
