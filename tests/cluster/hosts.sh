#!/usr/bin/env bash
# Starts several hosts on one machine. Each has its own network, process tree, home folder and sshd.
#
#   sudo tests/cluster/hosts.sh NUMBER FOLDER [KEPT...]
#
# Host n has the address 10.77.0.1n and accepts the ssh key FOLDER/key. Hosts reach only each other. All hosts
# share FOLDER, and can read the KEPT folders (a Python installation, images). Everything else under /tmp, /run,
# /dev/shm and the home folder is private to a host. FOLDER/ready exists once all hosts answer. FOLDER/outer has
# the ID of the process that owns their network (`nsenter --net --target`); all hosts end with it. In that
# network `ip link set wire<n> down` cuts host n off.
#
# Needs root, and Debian's openssh-server, rsync and iproute2.
set -euo pipefail

# Sets `child` to the child of process $1, which is unshare. Fails if unshare ends without one.
wait_for_child() {
  until child=$(pgrep -P "$1" | head -1) && [ -n "$child" ]; do
    if ! kill -0 "$1" 2> /dev/null; then
      echo "unshare ended: is it allowed here?" >&2
      return 1
    fi
    sleep 0.05
  done
}

# --- the network that the hosts are in ------------------------------------------------------------
outer() {
  local number=$1 folder=$2 n hosts=()
  shift 2
  ip link set lo up
  ip link add bridge type bridge
  ip address add 10.77.0.1/24 dev bridge
  ip link set bridge up
  for n in $(seq "$number"); do
    ip link add "wire$n" type veth peer name "end$n"
    ip link set "wire$n" master bridge up
    unshare --net --mount --pid --fork --uts --ipc --cgroup --mount-proc --kill-child \
      "$0" --host "$n" "$folder" "$@" > "$folder/host$n.log" 2>&1 &
    hosts[n]=$!
    wait_for_child "${hosts[n]}"
    ip link set "end$n" netns "$child"
  done
  for n in $(seq "$number"); do
    until ssh -i "$folder/key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
      -o LogLevel=ERROR -o ConnectTimeout=1 "root@10.77.0.1$n" true 2> /dev/null; do
      if ! kill -0 "${hosts[n]}" 2> /dev/null; then
        cat "$folder/host$n.log" >&2
        return 1
      fi
      sleep 0.1
    done
  done
  touch "$folder/ready"
  wait
}

# --- one host -------------------------------------------------------------------------------------
host() {
  local n=$1 folder=$2 kept place
  shift 2
  mount --make-rprivate /
  hostname "host$n"
  until ip link show "end$n" > /dev/null 2>&1; do sleep 0.05; done
  ip link set lo up
  ip link set "end$n" name eth0
  ip address add "10.77.0.1$n/24" dev eth0
  ip link set eth0 up
  ip route add default via 10.77.0.1  # leads nowhere, but shows programs their own address
  mount -t sysfs none /sys

  # A kept folder may lie in one that is hidden below.
  mkdir -p /mnt/kept
  mount -t tmpfs none /mnt/kept
  for kept in "$folder" "$@"; do
    place=/mnt/kept/$(echo -n "$kept" | md5sum | cut -c1-32)
    mkdir -p "$place"
    mount --rbind "$kept" "$place"
  done
  for place in /tmp /run /dev/shm "$HOME"; do mount -t tmpfs none "$place"; done
  for kept in "$folder" "$@"; do
    place=/mnt/kept/$(echo -n "$kept" | md5sum | cut -c1-32)
    mkdir -p "$kept"
    mount --rbind "$place" "$kept"
    [ "$kept" = "$folder" ] || mount -o remount,bind,ro "$kept"
  done
  mkdir -p /run/sshd "$HOME/.ssh"
  cp "$folder/key.pub" "$HOME/.ssh/authorized_keys"
  cat > /run/sshd.conf << END
ListenAddress 10.77.0.1$n
HostKey $folder/host_key
PidFile none
UsePAM no
UseDNS no
StrictModes no
PermitRootLogin prohibit-password
END
  exec /usr/sbin/sshd -D -e -f /run/sshd.conf
}

if [ "$1" = --outer ]; then
  shift
  outer "$@"
elif [ "$1" = --host ]; then
  shift
  host "$@"
else
  folder=$2
  mkdir -p "$folder"
  for name in key host_key; do
    [ -e "$folder/$name" ] || ssh-keygen -q -t ed25519 -N "" -f "$folder/$name"
  done
  unshare --net --mount --pid --fork --mount-proc --kill-child "$0" --outer "$@" &
  unshared=$!
  wait_for_child "$unshared"
  echo "$child" > "$folder/outer"
  trap 'kill -9 $(cat "$folder/outer") 2> /dev/null' EXIT INT TERM
  wait "$unshared"
fi
