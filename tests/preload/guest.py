"""A guest in Debian's QEMU, by software emulation: its kernel, what it runs, how it is started and spoken to.

The guest is a Debian cloud kernel and busybox, and its memory says by itself whether it is right: it holds the same
files several times, checks their sums again and again, and writes others meanwhile. What is not there to make one of
(QEMU, busybox, a kernel or the means to fetch it) skips the test.
"""
import ctypes
import glob
import gzip
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time

from support import counter, environment, skip

START = """#!/bin/busybox sh
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
"""

CHECK_SUMS = START + """
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

# A kernel that finds its memory changed says so in one of these ways. A soft lockup is a slow machine's.
WRONG = r"GUEST WRONG.*|Kernel panic.*|\bOops.*|BUG: (?!soft lockup).*|general protection.*"


def find_qemu():
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        skip("there is no qemu-system-x86_64 (qemu-system-x86)")
    return qemu


def find_kernel(work):
    """(vmlinuz, directory of its modules or None)"""
    given = os.environ.get("KSMU_GUEST_KERNEL")
    if given:
        return given, None
    tree = os.path.join(work, "kernel")
    if not glob.glob(os.path.join(tree, "boot", "vmlinuz-*")):
        if not shutil.which("apt-get") or not shutil.which("dpkg"):
            skip("there is no guest kernel, and no apt to fetch one (KSMU_GUEST_KERNEL can name one)")
        names = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True)
        found = re.search(r"Depends: (linux-image-\S+)", names.stdout)
        os.makedirs(work, exist_ok=True)
        download = ["apt-get", "-qq", "download", found[1] if found else ""]
        fetched = found and subprocess.run(download, cwd=work, capture_output=True).returncode == 0
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


def content(path):
    with open(path, "rb") as f:
        return f.read()


def initramfs(path, modules=None, init=CHECK_SUMS, more=()):
    """`modules`: where the kernel's are, to have its virtio drivers loaded. `more`: further files, for cpio()."""
    busybox = shutil.which("busybox")
    if not busybox or has_interpreter(content(busybox)):
        skip("there is no statically linked busybox (busybox-static)")
    files = [(d, 0o40755, b"") for d in ("bin", "dev", "proc", "sys", "tmp", "lib")]
    files += [("bin/busybox", 0o100755, content(busybox)), ("init", 0o100755, init.encode())]
    for module in glob.glob(os.path.join(modules, "**", "virtio*.ko"), recursive=True) if modules else []:
        files.append(("lib/" + os.path.basename(module), 0o100644, content(module)))
    with gzip.open(path, "wb", 1) as f:
        f.write(cpio(files + list(more)))


class Monitor:
    """QEMU's, by QMP. An answer that does not come is an error after two minutes."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(path)
        self.file = self.socket.makefile("rw")
        self.events = []
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        """What it answers, an error or not."""
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise RuntimeError(f"{command}: QEMU is gone")
            answer = json.loads(line)
            if "return" in answer or "error" in answer:
                return answer
            self.events.append(answer)

    def must(self, command, **arguments):
        answer = self(command, **arguments)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error'].get('desc')}")
        return answer["return"]


def pss(pid):
    """A process's memory in bytes, of shared pages its part."""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        text = f.read()
    return sum(int(n) for n in re.findall(r"^(?:Pss|SwapPss): +(\d+) kB", text, re.M)) * 1024


def available():
    """MemAvailable in bytes, and what has been freed and lies in the CPUs' own lists: a hundred MiB and more after a fleet has ended (since
    6.7), which MemAvailable leaves out."""
    with open("/proc/meminfo") as f:
        free = int(re.search(r"^MemAvailable: +(\d+) kB", f.read(), re.M)[1]) * 1024
    with open("/proc/zoneinfo") as f:
        return free + sum(map(int, re.findall(r"^ +count: (\d+)", f.read(), re.M))) * os.sysconf("SC_PAGE_SIZE")


def flat_out(shim):
    """Variables: the shim, and its scanner never at rest."""
    return {"LD_PRELOAD": shim, "KSMU_SLEEP_MILLISECS": "0", "KSMU_CPU_LIMIT_PERCENT": "100",
            "KSMU_THP_MIN_DUPLICATES": "1",
            # Nothing writes into a guest's memory behind its back: it has no disk. A snapshot need not wait for it.
            "KSMU_REMERGE_SECONDS": "0"}


def die_with_parent():
    """For a process that is started: whoever ends this one, by whatever signal, ends it too."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


class Guest:
    """A QEMU, and the files in `work` through which it is seen. `before`: a command that it is started by."""

    def __init__(self, work, name, kernel, initrd, memory=256, more=(), before=(), **variables):
        self.name, self.path = name, os.path.join(work, name)
        self.control = None
        # Its children (a migration through a command) have the shim as well, and statistics of their own.
        variables = {"KSMU_STATS": self.path + ".stats.%p:1", "KSMU_LOG": self.path + ".log"} | variables
        with open(self.path + ".errors", "w") as errors:
            self.process = subprocess.Popen(
                [*before, find_qemu(), "-accel", "tcg", "-m", str(memory), "-smp", "1", "-nodefaults", "-no-reboot",
                 "-display", "none", "-kernel", kernel, "-initrd", initrd,
                 "-append", "console=ttyS0 no_timer_check quiet panic=-1",
                 "-serial", f"file:{self.path}.console", "-qmp", f"unix:{self.path}.monitor,server=on,wait=off", *more],
                env=environment(**variables), stdin=subprocess.DEVNULL, stderr=errors, preexec_fn=die_with_parent)

    def monitor(self):
        end = time.time() + 60
        while not self.control:
            try:
                self.control = Monitor(self.path + ".monitor")
            except OSError:
                if time.time() > end or self.process.poll() is not None:
                    raise RuntimeError(f"{self.name}: no monitor: {self.complaints()}") from None
                time.sleep(0.1)
        return self.control

    def text(self, kind):
        path = f"{self.path}.{kind}"
        if not os.path.exists(path):
            return ""
        with open(path, errors="replace") as f:
            return f.read()

    def said(self):
        return self.text("console")

    def complaints(self):
        """For a message: what QEMU and the library had to say."""
        return f"QEMU: {self.process.poll()} {self.text('errors')[-300:]} log: {self.text('log')[-300:]}"

    def rounds(self):
        """The numbers of the rounds of sums that it has ended."""
        return [int(n) for n in re.findall(r"GUEST ROUND (\d+)\r?\n", self.said())]

    def round(self):
        return max(self.rounds(), default=0)

    def wrong(self):
        return re.findall(WRONG, self.said())

    def counter(self, name):
        return counter(f"{self.path}.stats.{self.process.pid}", name)

    def wait(self, condition, seconds):
        """Whether it came true, in time, in a QEMU that lives and with no wrong sum."""
        end = time.time() + seconds
        while not condition():
            if time.time() > end or self.process.poll() is not None or self.wrong():
                return False
            time.sleep(0.1)
        return True

    def boot(self, seconds=300):
        if not self.wait(lambda: "GUEST READY" in self.said(), seconds):
            raise RuntimeError(f"{self.name} does not boot: {self.said()[-500:]} {self.complaints()}")

    def measures(self):
        return (f"merged {self.counter('pages_merged_total')}, broken {self.counter('cow_breaks')}, "
                f"sharing {self.counter('pages_sharing')} and {self.counter('ksm_zero_pages')} zero pages, "
                f"discards {self.counter('discards')}, gate p99 {self.counter('gate_p99_us')} us")

    def end(self):
        self.process.kill()
        self.process.wait()
