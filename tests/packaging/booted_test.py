#!/usr/bin/env python3
"""Boots systemd, in process, network and control group namespaces of its own, on a root file system of its own (clean_root.py), and has
booted_inside.py install the Debian packages there, use the service, and remove them.

  booted_test.py DIRECTORY-OF-THE-PACKAGES
"""
import os
import signal
import subprocess
import sys
import time

import clean_root

HERE = os.path.dirname(os.path.abspath(__file__))
SYSTEMD = "/usr/lib/systemd/systemd"
PATIENCE = 240
# What PID 1 of a container finds (systemd.io/CONTAINER_INTERFACE). Then its root becomes the root.
BOOT = """set -e
cd "$1"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mkdir -p run/old
pivot_root . run/old
umount -l /run/old
exec env -i container=ksmu-test PATH=/usr/sbin:/usr/bin:/sbin:/bin "$2" --log-target=console --log-level=notice --show-status=0 </dev/null
"""
TARGET = """[Unit]
Description=Only what this test needs
Requires=basic.target ksmu-test.service
After=basic.target
AllowIsolate=yes
"""
SERVICE = """[Unit]
Description=The test
After=basic.target systemd-journald.service
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
TimeoutStartSec=infinity
Environment=LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
ExecStart=/usr/bin/python3 /test/booted_inside.py
StandardOutput=file:/test/result
StandardError=file:/test/result
"""
# Of the host's, or with no meaning here.
MASKED = ("systemd-udevd.service", "systemd-udevd-kernel.socket", "systemd-udevd-control.socket", "systemd-udev-trigger.service", "systemd-timesyncd.service",
          "systemd-networkd.service", "systemd-resolved.service", "systemd-firstboot.service", "systemd-binfmt.service",
          "systemd-random-seed.service", "ldconfig.service", "systemd-hwdb-update.service")


def cgroup2():
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, where, kind, *_ = line.split()
            if kind == "cgroup2" and os.access(where, os.W_OK):
                return where
    return None


def prepare(root, packages):
    units = root.root + "/etc/systemd/system"
    os.makedirs(units, exist_ok=True)
    for name in os.listdir(units):
        path = f"{units}/{name}"
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
        elif name.endswith((".wants", ".requires")):
            for unit in os.listdir(path):
                os.unlink(f"{path}/{unit}")
    for name in MASKED:
        os.symlink("/dev/null", f"{units}/{name}")
    for name, text in (("ksmu-test.target", TARGET), ("ksmu-test.service", SERVICE)):
        with open(f"{units}/{name}", "w") as f:
            f.write(text)
    os.symlink("ksmu-test.target", units + "/default.target")
    # A container's, which has maintainer scripts start nothing.
    if os.path.exists(root.root + "/usr/sbin/policy-rc.d"):
        os.unlink(root.root + "/usr/sbin/policy-rc.d")
    # File systems of the host's.
    with open(root.root + "/etc/fstab", "w"):
        pass
    with open(root.root + "/etc/machine-id", "w") as f:
        f.write("0123456789abcdef0123456789abcdef\n")
    os.mkdir(root.root + "/test")
    for path in [*packages, os.path.join(HERE, "member.py"), os.path.join(HERE, "booted_inside.py")]:
        root.copy(path, "/test/")


def remove_groups(top):
    for directory, _, _ in os.walk(top, topdown=False):
        for _ in range(100):
            try:
                os.rmdir(directory)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.05)  # who was in it is just ending


def main():
    clean_root.need(SYSTEMD, "systemctl", "unshare", "pivot_root")
    packages = clean_root.find_packages(sys.argv[1])
    hierarchy = cgroup2()
    if not hierarchy:
        clean_root.skip("no cgroup2 hierarchy that can be written to is mounted here")
    root = clean_root.CleanRoot()
    group = f"{hierarchy}/ksmu-test-{os.getpid()}"
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    machine = None
    try:
        prepare(root, packages)
        try:
            os.mkdir(group)
        except OSError as e:
            clean_root.skip(f"no control group can be made here: {e.strerror}")

        def enter():
            with open(group + "/cgroup.procs", "w") as f:
                f.write(str(os.getpid()))

        machine = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--fork", "--kill-child", "sh", "-c", BOOT, "boot", root.root, SYSTEMD],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", preexec_fn=enter)
        try:
            said, _ = machine.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            machine.kill()
            said, _ = machine.communicate()
            said += f"still running after {PATIENCE} s\n"
        result = ""
        if os.path.exists(root.root + "/test/result"):
            with open(root.root + "/test/result", errors="replace") as f:
                result = f.read()
        print(result, end="")
        if " passed, " not in result:
            print(said)
            print("0 passed, 1 failed, 0 skipped\nFAILED boot")
            return 1
        return 1 if "\nFAILED " in result else 0
    finally:
        if machine and machine.poll() is None:
            machine.kill()
            machine.wait()
        if os.path.isdir(group):
            remove_groups(group)
        root.close()


sys.exit(main())
