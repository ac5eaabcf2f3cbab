#!/bin/bash
# The entrypoint of the images with an ssh server: starts it as the container's user, then becomes the given command.
#
#     scalekd-sshd keys            makes the keys of a job in SSH_KEYS, and ends
#     scalekd-sshd                 serves until it is stopped: a node of a hosts file
#     scalekd-sshd COMMAND...      serves, and runs COMMAND: the node from which the job is started
#
# SSH_KEYS (default /ssh) is a folder that the job's containers share and nobody else reads. It has two pairs of keys:
# id_ed25519 of the user and host_ed25519 of the servers. No image has a key in it.
set -euo pipefail

keys=${SSH_KEYS:-/ssh}
if [ "${1:-}" = keys ]; then
    for name in id_ed25519 host_ed25519; do
        [ -e "$keys/$name" ] || ssh-keygen -q -t ed25519 -N '' -C scalekd -f "$keys/$name"
    done
    exit
fi

for name in id_ed25519 host_ed25519; do
    if [ ! -r "$keys/$name" ] || [ ! -r "$keys/$name.pub" ]; then
        echo "error: $keys has no key $name that user $(id -un) can read: make the keys with \`scalekd-sshd keys\`" >&2
        exit 2
    fi
done
# ssh takes no key that others can read, which those of a mounted secret are
install -d -m 700 ~/.ssh
install -m 600 "$keys"/{id,host}_ed25519{,.pub} ~/.ssh/
install -m 600 /etc/scalekd/ssh_config ~/.ssh/config
echo "* $(cat "$keys/host_ed25519.pub")" >~/.ssh/known_hosts
# a session has the container's environment, as `docker exec` gives it
env | grep -E '^(PATH|DS_ACCELERATOR|OMP_NUM_THREADS|LD_LIBRARY_PATH|(GLOO|NCCL|CUDA|NVIDIA|TRITON|TORCH|HF)_[A-Z_]+)=' >~/.ssh/environment
chmod 600 ~/.ssh/environment

if [ $# = 0 ]; then
    exec /usr/sbin/sshd -D -e -f /etc/scalekd/sshd_config
fi
/usr/sbin/sshd -E /tmp/sshd.log -f /etc/scalekd/sshd_config
exec "$@"
