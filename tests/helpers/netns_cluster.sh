#!/usr/bin/env bash
# A cluster of N nodes on one machine. Each node is a set of namespaces (network, PID, mount, hostname, IPC) with its
# own address, /dev/shm, /etc/hosts and sshd; all share the file system, as cluster nodes share a mount.
#
#   netns_cluster.sh up [N]        make node1 ... nodeN (default 2) and wait until each answers by ssh
#   netns_cluster.sh exec I CMD..  run CMD on node I, not by ssh: works while its link is cut
#   netns_cluster.sh cut I         take node I's link down: it runs on, but nobody reaches it
#   netns_cluster.sh heal I        put the link back
#   netns_cluster.sh crash I       kill every process of node I at once
#   netns_cluster.sh down          kill and remove every node; $CLUSTER_DIR is left for its logs
#
# After `up`, put $CLUSTER_DIR/bin first on PATH: its `ssh` reaches the nodes by name, and $CLUSTER_DIR/hosts is the
# hosts file for the launcher. Needs root and Linux; iproute2, openssh-server, openssh-client and util-linux.
set -euo pipefail

STATE=$(realpath -m "${CLUSTER_DIR:?set CLUSTER_DIR to the folder that holds the state of this cluster}")
# The state's folder names the namespaces: parallel clusters cannot meet, and `down` finds its own after any crash.
PREFIX=skd-$(printf %s "$STATE" | sha256sum | cut -c1-10)
# The switch is a namespace of its own. The machine's own network is never touched, every cluster can use the same
# addresses, and a firewall here does not reach in. The price: ssh has to be started inside it.
HUB=$PREFIX-hub
NET=10.77.0
SSHD=$(PATH=$PATH:/usr/sbin:/sbin command -v sshd || true)

die() { echo "netns_cluster.sh: $*" >&2; exit 1; }

namespaces() { ip netns list | awk -v p="$PREFIX-" 'index($1, p) == 1 { print $1 }'; }

write_files() {
    local n=$1 i
    mkdir -p "$STATE/bin"
    for key in login host; do
        [ -f "$STATE/$key" ] || ssh-keygen -q -t ed25519 -N '' -f "$STATE/$key"
    done
    echo "127.0.0.1 localhost" >"$STATE/etc_hosts"
    : >"$STATE/hosts"
    for ((i = 1; i <= n; i++)); do
        echo "$NET.$i node$i" >>"$STATE/etc_hosts"
        echo "node$i slots=1" >>"$STATE/hosts"
    done
    # ServerAlive*: a launcher whose node was cut off must notice, not wait for ever
    cat >"$STATE/ssh_config" <<EOF
Host *
  User root
  IdentityFile "$STATE/login"
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 2
EOF
    for ((i = 1; i <= n; i++)); do
        printf 'Host node%d\n  HostName %s.%d\n' "$i" "$NET" "$i" >>"$STATE/ssh_config"
    done
    cat >"$STATE/sshd_config" <<EOF
HostKey "$STATE/host"
AuthorizedKeysFile "$STATE/login.pub"
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 64
EOF
    # the launcher's own check and pdsh both call a bare `ssh`
    cat >"$STATE/bin/ssh" <<EOF
#!/bin/sh
exec nsenter --net=/run/netns/$HUB $(command -v ssh) -F "$STATE/ssh_config" "\$@"
EOF
    chmod +x "$STATE/bin/ssh"
}

start_node() {
    local i=$1 ns=$PREFIX-$1
    ip netns add "$ns"
    ip -n "$HUB" link add "port$i" type veth peer name eth0 netns "$ns"
    ip -n "$HUB" link set "port$i" master switch up
    ip -n "$ns" addr add "$NET.$i/24" dev eth0
    ip -n "$ns" link set lo up
    ip -n "$ns" link set eth0 up
    # sshd wants /run/sshd: a /run of the node's own leaves no trace on the machine's.
    # --kill-child: whoever ends `unshare` ends the node's init, and with it the whole node.
    setsid ip netns exec "$ns" unshare --mount --uts --ipc --pid --fork --mount-proc --kill-child sh -ec "
        hostname node$i
        mount -t tmpfs tmpfs /dev/shm
        mount --bind '$STATE/etc_hosts' /etc/hosts
        mount -t tmpfs -o mode=755 tmpfs /run
        mkdir /run/sshd
        exec '$SSHD' -D -e -f '$STATE/sshd_config'" >"$STATE/node$i.log" 2>&1 </dev/null &
    echo $! >"$STATE/node$i.pid"
}

wait_for_node() {
    local i=$1
    for ((try = 0; try < 1200; try++)); do
        "$STATE/bin/ssh" "node$i" true 2>/dev/null && return
        sleep 0.1
    done
    die "node$i does not answer by ssh: $(tail -n 3 "$STATE/node$i.log" | tr '\n' ' ')"
}

up() {
    local n=$1 i
    [[ $n =~ ^[1-9][0-9]?$ ]] || die "N is '$n': it must be 1 to 99"
    [ "$(id -u)" = 0 ] || die "needs root"
    [ -n "$SSHD" ] || die "needs sshd (openssh-server)"
    [ -z "$(namespaces)" ] || die "the cluster of $STATE is up already"
    write_files "$n"
    ip netns add "$HUB"
    ip -n "$HUB" link set lo up
    ip -n "$HUB" link add switch type bridge
    ip -n "$HUB" addr add "$NET.254/24" dev switch
    ip -n "$HUB" link set switch up
    for ((i = 1; i <= n; i++)); do start_node "$i"; done
    for ((i = 1; i <= n; i++)); do wait_for_node "$i"; done
}

# Ends the processes of a namespace: the members that the kernel lists, whatever their names, and no others.
kill_members() {
    local pids
    for ((try = 0; try < 600; try++)); do
        pids=$(ip netns pids "$1" 2>/dev/null) || return 0
        [ -n "$pids" ] || return 0
        # shellcheck disable=SC2086
        kill -9 $pids 2>/dev/null || true
        sleep 0.1
    done
    die "processes of $1 do not end: $(echo "$pids" | tr '\n' ' ')"
}

enter() {
    local i=$1 pid
    shift
    pid=$(cat "$STATE/node$i.pid")
    [ -e "/proc/$pid" ] || die "node$i is not running"
    # `unshare` itself keeps the PID namespace it had; the one it made is its children's
    exec nsenter --target "$pid" --net --uts --ipc --mount --pid="/proc/$pid/ns/pid_for_children" -- "$@"
}

down() {
    local ns
    for ns in $(namespaces); do
        kill_members "$ns"
        ip netns del "$ns"
    done
    rm -f "$STATE"/node*.pid
}

need_node() {
    if [ ! -e "/run/netns/$PREFIX-${1:-}" ] || [ "${1:-}" = hub ]; then die "there is no node '${1:-}' in $STATE"; fi
}

command=${1:-}
shift || true
case $command in
    exec | cut | heal | crash) need_node "${1:-}" ;;
esac
case $command in
    up) up "${1:-2}" ;;
    down) down ;;
    exec) enter "$@" ;;
    cut) ip -n "$HUB" link set "port$1" down ;;
    heal) ip -n "$HUB" link set "port$1" up ;;
    crash) kill_members "$PREFIX-$1" ;;
    *)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
esac
