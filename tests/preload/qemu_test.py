#!/usr/bin/env python3
"""A guest in Debian's QEMU, by software emulation, under the shim: qemu_test.py SHIM WORK

QEMU says MADV_MERGEABLE for a guest's memory by itself. The guest (guest.py) holds the same files several times in its
memory, and checks their sums again and again while it writes others and the scanner runs flat out. It stands still for
a moment and is unmerged by QEMU's own switch (`merge` of its memory), which shows what was saved; goes on; and its
balloon takes memory away and gives it back. WORK keeps the kernel between runs. KSMU_GUEST_KERNEL names another one;
KSMU_TEST_LONG=1: five minutes of checking instead of one, and once more with 2048 MiB of memory instead of 256.

What it cannot have (QEMU, a kernel, busybox, a network to fetch the kernel from) it says, and is skipped.
"""
import os
import sys
import tempfile
import time

import guest
from support import finish

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
SECONDS = int(os.environ.get("KSMU_GUEST_SECONDS", 300 if LONG else 45))
PAGE, MIB = os.sysconf("SC_PAGE_SIZE"), 1 << 20
LEAST = 1000  # pages shared when it is looked how much that saves


def unmerge(machine):
    """Stands still, is unmerged, is advised again. What that took, by the kernel's accounts; errors."""
    control, errors = machine.monitor(), []
    if not machine.wait(lambda: machine.counter("pages_sharing") >= LEAST, 120):
        return [f"{machine.name}: shares {machine.counter('pages_sharing')} pages only: {machine.complaints()}"]
    control.must("stop")
    # What was broken since the last look is booked by the next one, and the numbers are written once a second.
    time.sleep(3)
    claimed = machine.counter("pages_sharing") * PAGE
    before = guest.pss(machine.process.pid), guest.available()
    control.must("qom-set", path="/objects/ram", property="merge", value=False)
    after = guest.pss(machine.process.pid), guest.available()
    control.must("qom-set", path="/objects/ram", property="merge", value=True)
    control.must("cont")
    grown = after[0] - before[0]
    print(f"{machine.name}: unmerging took {grown / MIB:.1f} MiB by Pss, "
          f"{(before[1] - after[1]) / MIB:.0f} MiB by MemAvailable; {claimed / MIB:.1f} MiB were said to be saved")
    # Pss is this process's alone, whatever else the machine does.
    if abs(grown - claimed) > claimed / 10 + MIB:
        errors.append(f"{machine.name}: {grown} bytes by Pss and {claimed} said to be saved")
    if not machine.wait(lambda rounds=len(machine.rounds()): len(machine.rounds()) >= rounds + 2, 120):
        errors.append(f"{machine.name} does not go on: {machine.complaints()}")
    return errors


def check(work, shim, kernel, initrd, modules, mib, small):
    """`small`: what the balloon leaves of the memory."""
    errors = []
    machine = guest.Guest(work, f"{mib} MiB", kernel, initrd, mib, **guest.flat_out(shim), more=[
        "-object", f"memory-backend-ram,id=ram,size={mib}M", "-machine", "memory-backend=ram",
        "-device", "virtio-balloon-pci"])
    try:
        machine.boot()
        errors += unmerge(machine)
        control = machine.monitor()
        until, out, sizes = time.time() + SECONDS, False, set()
        while time.time() < until and machine.process.poll() is None and not machine.wrong():
            out = not out
            control("balloon", value=(small if out else mib) * MIB)
            time.sleep(SECONDS / 10)
            sizes.add(control("query-balloon").get("return", {}).get("actual", 0) // MIB)
        merged, broken = machine.counter("pages_merged_total"), machine.counter("cow_breaks")
        rounds = len(machine.rounds())
        print(f"{machine.name}: {rounds} rounds of sums; {machine.measures()}", flush=True)
        errors += [f"{machine.name}: {line}" for line in machine.wrong()]
        if machine.process.poll() is not None:
            errors.append(f"{machine.name}: {machine.complaints()}")
        if modules and len(sizes) < 2:
            errors.append(f"{machine.name}: the balloon does not move: {sizes} MiB, {machine.said()[:500]}")
        if rounds < 2:
            errors.append(f"{machine.name}: only {rounds} rounds")
        if merged < 1000 or broken < 100:
            errors.append(f"{machine.name}: merged {merged} and broken {broken} pages only: {machine.complaints()}")
    except (RuntimeError, OSError) as error:
        errors.append(f"{error}")
    finally:
        machine.end()
    return errors


def main():
    shim, cache = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    guest.find_qemu()
    kernel, modules = guest.find_kernel(cache)
    with tempfile.TemporaryDirectory() as work:
        initrd = os.path.join(work, "initrd")
        guest.initramfs(initrd, modules)
        errors = check(work, shim, kernel, initrd, modules, 256, 170)
        if LONG:
            errors += check(work, shim, kernel, initrd, modules, 2048, 400)
    finish("guest", errors)


main()
