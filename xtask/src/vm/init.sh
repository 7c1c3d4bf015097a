#!/bin/busybox sh
# The guest's init: mounts what probes and tests need, runs /run.sh, says how it ended, and stops the machine.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/usr/bin:/usr/sbin HOME=/root
exec </dev/null >/dev/ttyS1 2>&1
mount -t sysfs sysfs /sys
# What was packed may stand there, where the project does.
[ -n "$(ls -A /tmp)" ] || mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo +pids > /sys/fs/cgroup/cgroup.subtree_control
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount -t securityfs securityfs /sys/kernel/security
ip link set lo up
# The agent tells one host from another by this.
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
echo root:x:0:0:root:/root:/bin/sh > /etc/passwd
echo nobody:x:65534:65534:nobody:/:/bin/sh >> /etc/passwd
echo root:x:0: > /etc/group
echo nogroup:x:65534: >> /etc/group
hostname vm
echo "VM-UP $(uname -r) after $(cut -d' ' -f1 /proc/uptime) s"
sh /run.sh
echo "VM-RC $?"
sync
busybox reboot -f
