#!/usr/bin/env python3
"""A fleet of virtual machines, side by side: fleet_demo.py KSMUCTL KSMUD WORK [--guests N] [--memory MIB] [...]

Boots N equal guests in QEMU (software emulation), each a process of its own, three times over: with nothing, with the kernel's
KSM, and under `ksmuctl exec` with one ksmud, whose domain all of them join. The guests hold the same files, and some of their own,
and check the md5 sums of all of them again and again.

Shown: how much of the machine's memory the fleet takes (by MemAvailable), so many seconds after all are up; and the CPU time
that merging takes after that. KSM is set up as for comparison (sleep 10 ms, 1,250 pages), and put back afterwards; without root,
or where it is in use already, it is left out.

Exit status: 0; 1 a sum was wrong, or a guest failed; 77 what it needs is not there.
"""
import argparse
import glob
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "preload"))
import guest  # noqa: E402

KSM = "/sys/kernel/mm/ksm/"
KSM_SETTINGS = {"sleep_millisecs": 10, "pages_to_scan": 1250, "smart_scan": 1, "use_zero_pages": 1, "max_page_sharing": 256,
                "advisor_mode": "none", "merge_across_nodes": 1}
TICK = os.sysconf("SC_CLK_TCK")
INIT = guest.START + """
$b mount -t tmpfs -o size=90% tmpfs /tmp
$b cp -r /files /tmp/files
$b dd if=/dev/urandom of=/tmp/own bs=64k count=128 2>/dev/null
own=$($b md5sum < /tmp/own)
echo "GUEST READY"
round=0
while :; do
  cd /tmp/files
  $b md5sum -c -s /sums || echo "GUEST WRONG files"
  [ "$($b md5sum < /tmp/own)" = "$own" ] || echo "GUEST WRONG own"
  $b cp /files/0 /tmp/files/0
  round=$((round + 1))
  echo "GUEST ROUND $round"
  $b sleep 3
done
"""


def files(modules, kernel, mib):
    """Real ones, as cpio takes them, the first of them small."""
    import hashlib
    names = sorted(glob.glob(os.path.join(modules, "**", "*.ko"), recursive=True), key=os.path.getsize) if modules else []
    chosen, sums, size = [], [], 0
    for name in names or [kernel]:
        data = guest.content(name)
        if names and size + len(data) > mib << 20:
            continue
        chosen.append((f"files/{len(chosen)}", 0o100644, data))
        sums.append(f"{hashlib.md5(data).hexdigest()}  {len(chosen) - 1}\n")
        size += len(data)
    return [("files", 0o40755, b"")] + chosen + [("sums", 0o100644, "".join(sums).encode())], size >> 20


def available():
    """MemAvailable in MiB, the middle one of two seconds'. Of the page cache it counts a part, which part depends on how much there is,
    and that has nothing to do with guests: where we may, it is dropped before."""
    if os.geteuid() == 0:
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w") as f:
            f.write("1")
    samples = []
    for _ in range(21):
        samples.append(guest.available() / (1 << 20))
        time.sleep(0.1)
    return statistics.median(samples)


def thread_seconds(pid, prefix=""):
    """CPU time of a process's threads whose names begin so."""
    total = 0
    for stat in glob.glob(f"/proc/{pid}/task/*/stat"):
        try:
            text = guest.content(stat).decode()
        except OSError:
            continue
        name, rest = text[text.index("(") + 1:text.rindex(")")], text[text.rindex(")") + 2:].split()
        if name.startswith(prefix):
            total += (int(rest[11]) + int(rest[12])) / TICK
    return total


def pid_of(name):
    for comm in glob.glob("/proc/[0-9]*/comm"):
        try:
            if guest.content(comm).decode().strip() == name:
                return int(comm.split("/")[2])
        except OSError:
            pass
    return 0


def why_not(fleet):
    """Pages of all guests that are not merged, by reason."""
    reasons = {}
    for machine in fleet:
        for line in guest.content(f"{machine.path}.stats.{machine.process.pid}").decode().split("\n"):
            name, _, value = line.partition(" ")
            if name.startswith("unmerged_") or name in ("pages_unshared", "pages_volatile"):
                name = name.removeprefix("unmerged_").removeprefix("pages_")
                reasons[name] = reasons.get(name, 0) + int(value)
    return ", ".join(f"{name} {value}" for name, value in sorted(reasons.items(), key=lambda item: -item[1]) if value)


class Ksm:
    """The kernel's, for as long as one fleet runs."""

    def __init__(self):
        self.before = {}

    @staticmethod
    def why_not():
        if os.geteuid() != 0:
            return "KSM is root's"
        if not os.path.exists(KSM + "run"):
            return "this kernel has no KSM"
        if guest.content(KSM + "run").strip() != b"0" or guest.content(KSM + "pages_shared").strip() != b"0":
            return "KSM is in use"
        return ""

    def start(self):
        for name, value in (KSM_SETTINGS | {"run": 1}).items():
            if os.path.exists(KSM + name):
                text = guest.content(KSM + name).decode().strip()
                self.before[name] = text[text.index("[") + 1:text.index("]")] if "[" in text else text
                with open(KSM + name, "w") as f:
                    f.write(str(value))

    def stop(self):
        if not self.before:
            return
        for name, value in [("run", "2")] + list(self.before.items()):
            with open(KSM + name, "w") as f:
                f.write(value)
        self.before = {}


class Broker:
    def __init__(self, ksmud, work):
        self.socket = os.path.join(work, "ksmud.sock")
        self.log = open(os.path.join(work, "ksmud.log"), "w+")
        self.process = subprocess.Popen([ksmud, "--socket", self.socket], stderr=self.log, preexec_fn=guest.die_with_parent)
        end = time.time() + 10
        while not os.path.exists(self.socket) and time.time() < end:
            time.sleep(0.02)

    def state(self):
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        self.log.seek(0)
        return self.log.read().strip().split("\n")[-1]

    def end(self):
        self.process.terminate()
        self.process.wait()


def options_of(description):
    """Those that every demonstration with guests and a broker has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("ksmuctl")
    options.add_argument("ksmud")
    options.add_argument("work", help="where the guest's kernel is kept")
    options.add_argument("--memory", type=int, default=256, help="of each, in MiB (%(default)s)")
    options.add_argument("--set", action="append", default=[], help="a tunable of the library's, NAME=VALUE")
    return options


def under_ksmu(given):
    """The command that a guest is started by."""
    return [os.path.abspath(given.ksmuctl), "exec", *(part for setting in given.set for part in ("--set", setting)), "--"]


def warm_up(given, kernel, initrd):
    fleet = []
    with tempfile.TemporaryDirectory() as work:
        try:
            for number in range(given.guests):
                fleet.append(guest.Guest(work, f"guest{number}", kernel, initrd, given.memory, KSMU_BROKER="none"))
            for machine in fleet:
                machine.boot(max(300, 15 * given.guests))
        finally:
            for machine in fleet:
                machine.end()


def run(kind, given, kernel, initrd):
    """One fleet. What it takes: MiB, percent of a CPU for merging, and what to say of it."""
    ksm, broker, fleet = Ksm(), None, []
    with tempfile.TemporaryDirectory() as work:
        before = []
        variables = {"KSMU_BROKER": "none"}
        free = available()
        try:
            if kind == "KSM":
                ksm.start()
            if kind == "ksmu":
                broker = Broker(os.path.abspath(given.ksmud), work)
                before = under_ksmu(given)
                variables = {"KSMU_BROKER": broker.socket}
            for number in range(given.guests):
                fleet.append(guest.Guest(work, f"guest{number}", kernel, initrd, given.memory, before=before,
                                         **variables, KSMU_STATS=os.path.join(work, f"guest{number}.stats.%p:10")))
            for machine in fleet:
                machine.boot(max(300, 15 * given.guests))
            ready = time.time()
            time.sleep(max(0.0, given.seconds - 2))
            used = free - available()

            def seconds():
                if kind == "KSM":
                    return thread_seconds(pid_of("ksmd"))
                if kind == "ksmu":
                    return thread_seconds(broker.process.pid) + sum(thread_seconds(m.process.pid, "ksmu-") for m in fleet)
                return 0
            first, begun = seconds(), time.time()
            time.sleep(given.watch)
            percent = 100 * (seconds() - first) / (time.time() - begun)
            said = ""
            if kind == "KSM":
                said = " ".join(f"{n} {int(guest.content(KSM + n))}" for n in ("pages_shared", "pages_sharing", "ksm_zero_pages", "pages_unshared", "pages_volatile")
                                if os.path.exists(KSM + n))
            if kind == "ksmu":
                merged = sum(m.counter("pages_merged") for m in fleet)
                breaks = sum(m.counter("cow_breaks") for m in fleet)
                zeros = sum(m.counter("ksm_zero_pages") for m in fleet)
                said = f"{merged} pages merged, {zeros} zero, {breaks} breaks; {broker.state()}\n        not merged: {why_not(fleet)}"
            # Where many share few CPUs, some have not got round by then.
            for machine in fleet:
                machine.wait(lambda machine=machine: machine.round() > 0, 300)
            for machine in fleet:
                if machine.wrong() or machine.process.poll() is not None or machine.round() == 0:
                    raise RuntimeError(f"{machine.name}: {machine.wrong()[:3]} {machine.complaints()}")
            rounds = sum(m.round() for m in fleet)
            print(f"  {kind:5} {used:8.0f} MiB  {percent:6.2f} % of a CPU  {rounds} rounds of sums, all right, {time.time() - ready:.0f} s; {said}", flush=True)
            return used, percent
        finally:
            for machine in fleet:
                machine.end()
            if broker:
                broker.end()
            ksm.stop()


def main():
    options = options_of("Equal guests: alone, under KSM, and under ksmu with one broker.")
    options.add_argument("--guests", type=int, default=4, help="how many (%(default)s)")
    options.add_argument("--seconds", type=int, default=60, help="from when all are up to the measuring (%(default)s)")
    options.add_argument("--watch", type=int, default=30, help="seconds of which the CPU time is taken after that (%(default)s)")
    options.add_argument("--repetitions", type=int, default=1, help="of each (%(default)s)")
    options.add_argument("--only", default="none,KSM,ksmu", help="which of them (%(default)s)")
    options.add_argument("--no-warm-up", action="store_true", help="measure the first fleet, too")
    given = options.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    guest.find_qemu()
    kernel, modules = guest.find_kernel(os.path.abspath(given.work))
    kinds = given.only.split(",")
    if "KSM" in kinds and Ksm.why_not():
        print(f"without the kernel's KSM: {Ksm.why_not()}")
        kinds.remove("KSM")
    with tempfile.TemporaryDirectory() as work:
        inside, size = files(modules, kernel, given.memory // 12)
        initrd = os.path.join(work, "initrd")
        guest.initramfs(initrd, init=INIT, more=inside)
        print(f"{given.guests} guests of {given.memory} MiB with the same {size} MiB of files and 8 MiB of their own:", flush=True)
        results = {kind: [] for kind in kinds}
        try:
            # Not counted: whatever is the first to use so much memory looks cheaper than the same a second time, by a hundred MiB and more.
            if not given.no_warm_up:
                warm_up(given, kernel, initrd)
            for _ in range(given.repetitions):
                for kind in kinds:
                    results[kind].append(run(kind, given, kernel, initrd))
        except (RuntimeError, OSError) as error:
            print(f"{error}", file=sys.stderr)
            return 1
    for kind in kinds:
        used = [r[0] for r in results[kind]]
        cpu = [r[1] for r in results[kind]]
        print(f"{kind}: {statistics.median(used):.0f} MiB ({min(used):.0f} ... {max(used):.0f}), "
              f"{statistics.median(cpu):.2f} % of a CPU ({min(cpu):.2f} ... {max(cpu):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
