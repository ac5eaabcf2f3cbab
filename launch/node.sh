#!/bin/bash
# One node's share of a job on several nodes, without ssh. Whoever starts the nodes (compose, Kubernetes) runs it on each:
#
#     NODES=4 NODE_RANK=0 MASTER_ADDR=HOST SLOTS=8 RUN_DIR=DIR launch/node.sh --recipe NAME --data.root DIR
#
# NODE_RANK counts from 0, HOST is an address of node 0, SLOTS are the ranks of one node, and RUN_DIR is a folder that all
# nodes see. The images have it as `scalekd-node`. Kubeflow's names of these variables (PET_NNODES, ...) are taken as well.
#
# Status 0: the run has reached its end. 75: a signal stopped it, it has saved, and goes on when it is started again; what
# starts pods by their status must know that there is more to do. All others are those of `scalekd train`.
set -euo pipefail

need() {
    if [ -z "$2" ]; then
        echo "error: $1 is not set: scalekd-node needs NODES, NODE_RANK, MASTER_ADDR, SLOTS and RUN_DIR" >&2
        exit 2
    fi
}
nodes=${NODES:-${PET_NNODES:-}}
rank=${NODE_RANK:-${PET_NODE_RANK:-}}
master=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
port=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
need NODES "$nodes"
need NODE_RANK "$rank"
need MASTER_ADDR "$master"
need SLOTS "${SLOTS:-}"
need RUN_DIR "${RUN_DIR:-}"
# operators set these for one process a pod, and the launcher sets its own
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT

hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT
# the names are not looked up: without ssh the launcher only counts them
for ((i = 0; i < nodes; i++)); do echo "node$i slots=$SLOTS"; done >"$hosts"

signalled=''
job=''
trap '[ -n "$job" ] || exit 75; signalled=1; kill -TERM "$job"' TERM INT USR1
scalekd train --hostfile "$hosts" --run.dir "$RUN_DIR" --run.resume auto "$@" \
    --deepspeed-args "--no_ssh --node_rank $rank --master_addr $master --master_port $port" &
job=$!
# a signal ends `wait`, and not what is waited for
while :; do
    signalled=''
    status=0
    wait "$job" || status=$?
    [ -n "$signalled" ] || break
done
if [ "$status" = 0 ] && [ ! -e "$RUN_DIR/results.json" ]; then
    status=75
fi
if [ "$status" = 0 ] && [ "${WHEN_DONE:-}" = wait ]; then
    echo "the run has reached its end: $RUN_DIR/results.json"
    trap 'exit 0' TERM INT
    sleep infinity &
    wait
fi
exit "$status"
