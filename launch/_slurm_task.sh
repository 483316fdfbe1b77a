#!/usr/bin/env bash
# One task of launch/slurm_gpu.sbatch: runs a command and notes its exit code in a folder, if it is
# not 0. srun itself passes on only the highest code of all tasks.
#
#   bash launch/_slurm_task.sh FOLDER COMMAND...
set -uo pipefail
folder=$1
shift
# SLURM signals this shell and the command alike. bash would die of it, and the note with it.
trap : TERM INT
"$@"
code=$?
[ "$code" = 0 ] || echo "$code" >"$folder/${SLURM_PROCID:-0}"
exit "$code"
