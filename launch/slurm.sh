#!/bin/bash
# sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --recipe NAME --data.root DIR --run.dir DIR --run.resume auto
#
# Started from the repository's root, with the environment's Python first on PATH. One launcher on each node, which srun
# starts: no ssh is needed. Everything after the script's name goes to launch/train.py. SLOTS=N sets the ranks of a node
# where the partition counts no GPUs; DOCTOR='--min-bandwidth 20' gives options to the doctor, DOCTOR=no leaves it out.
#SBATCH --job-name=scalekd
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
# five minutes before the end every rank is told: the run saves, and the same command goes on from there
#SBATCH --signal=USR1@300
set -euo pipefail

: "${SLURM_JOB_ID:?start it with sbatch}"
slots=${SLOTS:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$PWD/.hosts-$SLURM_JOB_ID
trap 'rm -f "$hosts"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$slots/" >"$hosts"
master=$(head -n 1 "$hosts" | cut -d ' ' -f 1)
# two jobs on one node would meet on DeepSpeed's own port
port=$((15000 + SLURM_JOB_ID % 10000))

if [ "${DOCTOR:=}" != no ]; then
    # shellcheck disable=SC2086
    python launch/doctor.py --hostfile "$hosts" $DOCTOR \
        --ssh 'srun --overlap --nodes=1 --ntasks=1 --nodelist={host} sh -c' "$@"
fi

# USR1 reaches every process of a step. The launchers in between know nothing of it and would die of it, so it is
# ignored from here down; the ranks listen to it again by themselves.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 sh -c '
    trap "" USR1
    python=$0 hosts=$1 master=$2 port=$3
    shift 3
    exec "$python" -m deepspeed.launcher.runner --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "$master" --master_port "$port" launch/train.py "$@"' \
    "$(command -v python)" "$hosts" "$master" "$port" "$@"
