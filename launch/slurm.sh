#!/bin/bash
# One process for each node, all its GPUs. sbatch launch/slurm.sh --config configs/x.py
#SBATCH --job-name=dsv3
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@300    # five minutes before the end: saves and leaves
#SBATCH --requeue
set -u
export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7    # JAX would take one GPU for each task
# A job that was requeued goes on with its run.
again=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then again=(--resume); fi
exec srun --kill-on-bad-exit=1 .venv/bin/python -m dsv3_jax.train --launch.cluster "$@" "${again[@]}"
