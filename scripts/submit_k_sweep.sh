#!/usr/bin/env bash
# The reference's submission script with its old option names (docs/options.md): on Slurm if sbatch exists, else on this machine.
#
#   scripts/submit_k_sweep.sh num_gpus=8 time=12:00:00 eval.checkpoint_path=PATH.pt eval.k_values=[1,2,4,8]
#   scripts/submit_k_sweep.sh force_direct=true +eval=gemma3_k_sweep_quick eval.checkpoint_path=PATH.pt --dry-run
#
# NUM_GPUS, TIME, JOB_NAME, NODES, NICE and FORCE_DIRECT are read from the environment too; EXPERIMENT names another sweep file.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3 || command -v python)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m ksweep.config.reference_options "${EXPERIMENT:-$root/experiments/k_sweep.py}" "$@"
