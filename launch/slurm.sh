#!/bin/bash
# sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --recipe NAME --data.root DIR --run.dir DIR --run.resume auto
#
# Submit it from the repository's root, with the environment's Python first on PATH. srun starts one launcher on each
# node, so no ssh is needed. Everything after the script's name goes to launch/train.py. SLOTS=N sets the ranks of a
# node where the partition counts no GPUs; DOCTOR='--min-bandwidth 20' gives options to the doctor, DOCTOR=no skips it.
#SBATCH --job-name=scalekd
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
# five minutes before the time limit every rank gets USR1: the run saves and ends, and the same command resumes it
#SBATCH --signal=USR1@300
set -euo pipefail

: "${SLURM_JOB_ID:?start it with sbatch}"
slots=${SLOTS:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$PWD/.hosts-$SLURM_JOB_ID
trap 'rm -f "$hosts"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$slots/" >"$hosts"
master=$(head -n 1 "$hosts" | cut -d ' ' -f 1)
# with DeepSpeed's default port, two jobs on one node would connect to each other
port=$((15000 + SLURM_JOB_ID % 10000))

if [ "${DOCTOR:=}" != no ]; then
    # shellcheck disable=SC2086
    python launch/doctor.py --hostfile "$hosts" $DOCTOR \
        --ssh 'srun --overlap --nodes=1 --ntasks=1 --nodelist={host} sh -c' "$@"
fi

# USR1 reaches every process of the job. The launchers do not handle it and would end, so it is ignored from here on;
# the ranks install their own handler for it.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 sh -c '
    trap "" USR1
    python=$0 hosts=$1 master=$2 port=$3
    shift 3
    exec "$python" -m deepspeed.launcher.runner --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "$master" --master_port "$port" launch/train.py "$@"' \
    "$(command -v python)" "$hosts" "$master" "$port" "$@"
