#!/usr/bin/env python3
"""A guest in Debian's QEMU, by software emulation, under the shim: qemu_test.py SHIM WORK

QEMU says MADV_MERGEABLE for a guest's memory by itself. The guest (a Debian cloud kernel and busybox) holds the same files
several times in its memory, and checks their sums again and again while it writes others and the scanner runs flat out; its
balloon takes memory away and gives it back meanwhile. WORK keeps the kernel between runs. KSMU_GUEST_KERNEL names another one;
KSMU_TEST_LONG=1: five minutes of checking instead of one.

What it cannot have (QEMU, a kernel, busybox, a network to fetch the kernel from) it says, and is skipped.
"""
import glob
import gzip
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

from support import counter, environment, finish, skip

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
SECONDS = int(os.environ.get("KSMU_GUEST_SECONDS", 300 if LONG else 45))

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox mount -t devtmpfs dev /dev
b=/bin/busybox
# Without a list of what needs what: again and again, those that are left.
for pass in 1 2 3 4 5; do
  for module in /lib/*.ko; do
    $b insmod $module 2>/dev/null && $b rm $module
  done
done
$b dmesg | $b grep -i "unknown symbol"
$b dd if=/dev/urandom of=/tmp/a bs=64k count=128 2>/dev/null
for n in 1 2 3; do $b cp /tmp/a /tmp/copy$n; done
sum=$($b md5sum < /tmp/a)
[ "$($b wc -c < /tmp/copy3)" = 8388608 ] || echo "GUEST WRONG files"
echo "GUEST READY"
round=0
while :; do
  round=$((round + 1))
  for n in 1 2 3; do
    now=$($b md5sum < /tmp/copy$n)
    [ "$now" = "$sum" ] || echo "GUEST WRONG copy$n"
  done
  # Written over with what it holds: pages break, and may be merged again.
  $b dd if=/tmp/a of=/tmp/copy1 bs=64k conv=notrunc 2>/dev/null
  $b dd if=/dev/urandom of=/tmp/other bs=64k count=$((round % 40 + 1)) 2>/dev/null
  other=$($b md5sum < /tmp/other)
  $b cp /tmp/other /tmp/other2
  [ "$($b md5sum < /tmp/other2)" = "$other" ] || echo "GUEST WRONG other"
  $b rm /tmp/other2
  echo "GUEST ROUND $round"
done
"""


def find_kernel(work):
    """(vmlinuz, directory of its modules or None)"""
    given = os.environ.get("KSMU_GUEST_KERNEL")
    if given:
        return given, None
    tree = os.path.join(work, "kernel")
    if not glob.glob(os.path.join(tree, "boot", "vmlinuz-*")):
        if not shutil.which("apt-get") or not shutil.which("dpkg"):
            skip("there is no guest kernel, and no apt to fetch one (KSMU_GUEST_KERNEL can name one)")
        names = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True).stdout
        found = re.search(r"Depends: (linux-image-\S+)", names)
        os.makedirs(work, exist_ok=True)
        fetched = found and subprocess.run(["apt-get", "-qq", "download", found[1]], cwd=work, capture_output=True).returncode == 0
        packages = glob.glob(os.path.join(work, "linux-image-*.deb"))
        if not fetched or not packages:
            skip("the guest's kernel (linux-image-cloud-amd64) cannot be fetched")
        subprocess.run(["dpkg", "-x", packages[0], tree], check=True)
        os.unlink(packages[0])
    modules = glob.glob(os.path.join(tree, "lib", "modules", "*"))
    return glob.glob(os.path.join(tree, "boot", "vmlinuz-*"))[0], modules[0] if modules else None


def cpio(files):
    """newc: (name, mode, bytes)"""
    out = bytearray()
    for number, (name, mode, data) in enumerate(files + [("TRAILER!!!", 0, b"")], 1):
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def has_interpreter(elf):
    """Whether an ELF64 program is linked dynamically: whether it has a PT_INTERP."""
    table, = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    return any(struct.unpack_from("<I", elf, table + i * size)[0] == 3 for i in range(count))


def initramfs(path, modules):
    busybox = shutil.which("busybox")
    if not busybox or has_interpreter(open(busybox, "rb").read()):
        skip("there is no statically linked busybox (busybox-static)")
    files = [(d, 0o40755, b"") for d in ("bin", "dev", "proc", "sys", "tmp", "lib")]
    files += [("bin/busybox", 0o100755, open(busybox, "rb").read()), ("init", 0o100755, INIT.encode())]
    for module in glob.glob(os.path.join(modules, "**", "virtio*.ko"), recursive=True) if modules else []:
        files.append(("lib/" + os.path.basename(module), 0o100644, open(module, "rb").read()))
    with gzip.open(path, "wb", 1) as f:
        f.write(cpio(files))


class Monitor:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer or "error" in answer:
                return answer


def main():
    shim, cache = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        skip("there is no qemu-system-x86_64 (qemu-system-x86)")
    kernel, modules = find_kernel(cache)
    errors = []
    with tempfile.TemporaryDirectory() as work:
        initrd, console, monitor = (os.path.join(work, n) for n in ("initrd", "console", "monitor"))
        stats = os.path.join(work, "stats")
        initramfs(initrd, modules)
        variables = environment(LD_PRELOAD=shim, KSMU_SLEEP_MILLISECS="0", KSMU_CPU_LIMIT_PERCENT="100", KSMU_STATS=stats + ":1",
                                KSMU_THP_MIN_DUPLICATES="1", KSMU_LOG=os.path.join(work, "log"))
        process = subprocess.Popen(
            [qemu, "-accel", "tcg", "-m", "256", "-smp", "1", "-nodefaults", "-no-reboot", "-display", "none",
             "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 no_timer_check quiet panic=-1",
             "-serial", f"file:{console}", "-qmp", f"unix:{monitor},server=on,wait=off",
             "-device", "virtio-balloon-pci"],
            env=variables, stdin=subprocess.DEVNULL)

        def said():
            return open(console, errors="replace").read() if os.path.exists(console) else ""

        try:
            deadline = time.time() + 300
            while "GUEST READY" not in said() and time.time() < deadline and process.poll() is None:
                time.sleep(0.2)
            if "GUEST READY" not in said():
                errors.append(f"the guest does not boot (QEMU: {process.poll()}): {said()[-500:]}")
            else:
                control = Monitor(monitor)
                until, small, sizes = time.time() + SECONDS, False, set()
                while time.time() < until and process.poll() is None:
                    small = not small
                    control("balloon", value=(170 if small else 256) << 20)
                    time.sleep(SECONDS / 10)
                    sizes.add(control("query-balloon").get("return", {}).get("actual", 0) >> 20)
                    if "GUEST WRONG" in said() or "Kernel panic" in said():
                        break
                rounds = len(re.findall("GUEST ROUND", said()))
                merged, broken = counter(stats, "pages_merged_total"), counter(stats, "cow_breaks")
                print(f"{rounds} rounds of sums; merged {merged}, broken {broken}, sharing {counter(stats, 'pages_sharing')} and "
                      f"{counter(stats, 'ksm_zero_pages')} zero pages, discards {counter(stats, 'discards')}, gate p99 {counter(stats, 'gate_p99_us')} us")
                for line in re.findall(r"GUEST WRONG.*|Kernel panic.*", said()):
                    errors.append(line)
                if process.poll() is not None:
                    errors.append(f"QEMU ended with {process.returncode}")
                if modules and len(sizes) < 2:
                    errors.append(f"the balloon does not move: {sizes} MiB, {said()[:500]}")
                if rounds < 2:
                    errors.append(f"only {rounds} rounds")
                if merged < 1000 or broken < 100:
                    errors.append(f"merged {merged} and broken {broken} pages only: {open(os.path.join(work, 'log')).read()[-300:]}")
        finally:
            process.kill()
            process.wait()
    finish("guest", errors)


main()
