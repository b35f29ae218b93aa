#!/usr/bin/env python3
"""A virtual machine, merged from outside: guest_demo.py KSMUCTL WORK [--seconds N] [--memory MIB] [--cpu-limit PERCENT]

Boots a guest in QEMU (software emulation, no KVM needed) under `ksmuctl exec`: neither QEMU nor the guest knows of it.
The guest holds four copies of a set of files, as containers without a common base do; it checks their md5 sums, which
were made outside, again and again, and writes a tenth of one copy anew each time. Shown every few seconds: what is
merged, what that saves, what was written since and so got copies of its own, and how long a page may have been waited
for.

In the end the guest stands still, and its memory is unmerged by QEMU's own switch: what MemAvailable and the process's
Pss say that this takes is what was saved. Then it goes on and checks its files once more. WORK keeps the guest's
kernel.

Exit status: 0; 1 a sum was wrong, or the guest failed; 4 nothing was merged; 77 what it needs is not there.
"""
import argparse
import glob
import hashlib
import os
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "preload"))
import guest  # noqa: E402

COPIES, PARTS = 4, 10
PAGE = os.sysconf("SC_PAGE_SIZE")
INIT = guest.START + f"""
$b mount -t tmpfs -o size=90% tmpfs /tmp
for copy in $($b seq {COPIES}); do
  $b cp -r /files /tmp/copy$copy
done
echo "GUEST READY"
round=0
while :; do
  for copy in $($b seq {COPIES}); do
    cd /tmp/copy$copy
    $b md5sum -c -s /sums || echo "GUEST WRONG copy$copy"
  done
  $b cp /files/$((round % {PARTS}))/* /tmp/copy1/$((round % {PARTS}))/
  round=$((round + 1))
  echo "GUEST ROUND $round"
done
"""


def files(modules, kernel, mib):
    """Real ones, as cpio takes them: the kernel's modules, or where there are none the kernel; and how many MiB."""
    names = sorted(glob.glob(os.path.join(modules, "**", "*.ko"), recursive=True)) if modules else []
    chosen, sums, size = [], [], 0
    for name in names or [kernel]:
        data = guest.content(name)
        if names and size + len(data) > mib << 20:
            continue
        inside = f"{len(chosen) % PARTS}/{os.path.basename(name)}"
        chosen.append(("files/" + inside, 0o100644, data))
        sums.append(f"{hashlib.md5(data).hexdigest()}  {inside}\n")
        size += len(data)
    directories = [(d, 0o40755, b"") for d in ["files"] + [f"files/{n}" for n in range(PARTS)]]
    return directories + chosen + [("sums", 0o100644, "".join(sums).encode())], len(chosen), size >> 20


def mib(size):
    return f"{size / (1 << 20):.0f}"


def watch(machine, seconds):
    """From the start on, and `seconds` from when the guest has its files."""
    def line(*values):
        print("{:>4} {:>7} {:>13} {:>10} {:>9} {:>12}".format(*values), flush=True)

    line("s", "rounds", "merged pages", "saved MiB", "breaks", "gate p99 us")
    started = time.time()
    ready = None
    while machine.process.poll() is None and not machine.wrong():
        now = time.time()
        if ready is None and "GUEST READY" in machine.said():
            ready = now
        if ready is None and now > started + 300:
            raise RuntimeError(f"the guest does not boot: {machine.said()[-500:]} {machine.complaints()}")
        if ready is not None and now > ready + seconds:
            return
        time.sleep(3)
        line(f"{time.time() - started:.0f}", len(machine.rounds()) if ready else "boots",
             machine.counter("pages_merged"), mib(machine.counter("general_profit")),
             machine.counter("cow_breaks"), machine.counter("gate_p99_us"))


def available():
    """MemAvailable, the middle one of a second's: other processes move it as well."""
    samples = []
    for _ in range(11):
        samples.append(guest.available())
        time.sleep(0.1)
    return sorted(samples)[5]


def measure(machine):
    """Unmerges the guest while it stands still. Whether it went on as it should."""
    control = machine.monitor()
    control.must("stop")
    time.sleep(3)  # the last breaks are booked by the next sweep, and the numbers written once a second
    said = machine.counter("pages_sharing") * PAGE
    zeros = machine.counter("ksm_zero_pages") * PAGE
    before = available(), guest.pss(machine.process.pid)
    started = time.time()
    control.must("qom-set", path="/objects/ram", property="merge", value=False)
    took = time.time() - started
    after = available(), guest.pss(machine.process.pid)
    print(f"merged: the guest takes {mib(before[1])} MiB. Unmerged, in {took:.2f} s: {mib(after[1])} MiB")
    print(f"saved: {mib(after[1] - before[1])} MiB by the process's Pss, "
          f"{mib(before[0] - after[0])} MiB by the machine's MemAvailable, "
          f"{mib(said)} MiB by the library's count (and {mib(zeros)} MiB of zeros, which stay away)")
    control.must("cont")
    # Two: the round that it was in the middle of, and a whole one.
    return machine.wait(lambda rounds=len(machine.rounds()): len(machine.rounds()) >= rounds + 2, 300)


def main():
    options = argparse.ArgumentParser(description="A guest in QEMU under ksmuctl exec, and what merging saves of it.")
    options.add_argument("ksmuctl")
    options.add_argument("work", help="where the guest's kernel is kept")
    options.add_argument("--seconds", type=int, default=30, help="to look on when the guest has booted (%(default)s)")
    options.add_argument("--memory", type=int, default=384, help="the guest's, in MiB (%(default)s)")
    options.add_argument("--cpu-limit", type=int, default=100,
                         help="percent of a CPU for merging; the library's default is 10 (%(default)s)")
    given = options.parse_args()
    if given.memory < 256:
        options.error("--memory: 256 MiB at least")
    # So that QEMU does not outlive it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    guest.find_qemu()
    kernel, modules = guest.find_kernel(os.path.abspath(given.work))
    with tempfile.TemporaryDirectory() as work:
        inside, count, size = files(modules, kernel, given.memory // 12)
        initrd = os.path.join(work, "initrd")
        guest.initramfs(initrd, init=INIT, more=inside)
        before = [os.path.abspath(given.ksmuctl), "exec", "--set", f"cpu_limit_percent={given.cpu_limit}",
                  "--set", "thp_min_duplicates=1", "--"]
        print(f"a guest of {given.memory} MiB, {COPIES} copies of {count} files, {size} MiB each:")
        print(" ", " ".join(["ksmuctl"] + before[1:]), f"qemu-system-x86_64 -m {given.memory} ...", flush=True)
        machine = guest.Guest(work, "guest", kernel, initrd, given.memory, before=before, more=[
            "-object", f"memory-backend-ram,id=ram,size={given.memory}M", "-machine", "memory-backend=ram"])
        try:
            watch(machine, given.seconds)
            went_on = not machine.wrong() and machine.process.poll() is None and measure(machine)
            rounds, merged = len(machine.rounds()), machine.counter("pages_merged_total")
        except (RuntimeError, OSError) as error:
            print(f"{error}", file=sys.stderr)
            return 1
        finally:
            machine.end()
        for line in machine.wrong():
            print(line)
        if not went_on:
            print(f"the guest did not go on: {machine.complaints()}")
            return 1
        if merged == 0:
            print(f"nothing was merged: {machine.text('log')}")
            return 4
        print(f"{rounds} rounds: {rounds * COPIES * count} md5 sums in the guest, all right")
    return 0


sys.exit(main())
