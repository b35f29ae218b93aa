#!/usr/bin/env python3
"""A guest restored from a saved image, beside its running twin: restore_demo.py KSMUCTL KSMUD WORK [--memory MIB] [...]

Boots a virtual machine in QEMU (software emulation) under `ksmuctl exec`, in the domain of a ksmud, saves its state to a file while it
runs on, and starts another one from that file. Shown: after how many seconds the new one shares so much of its memory, in frames, of
what it shares a minute later: pages merged and zero, which the library writes down every second.

Exit status: 0; 1 a sum was wrong, or a guest failed; 77 what it needs is not there.
"""
import os
import statistics
import sys
import tempfile
import time

from fleet_demo import INIT, Broker, files, guest, options_of, under_ksmu


def restore(given, kernel, initrd):
    """Seconds from the moment that the restored guest runs to each part of what it shares in the end."""
    with tempfile.TemporaryDirectory() as work:
        broker, fleet = Broker(os.path.abspath(given.ksmud), work), []
        try:
            before = under_ksmu(given)

            def start(name, *more):
                fleet.append(guest.Guest(work, name, kernel, initrd, given.memory, before=before, more=more, KSMU_BROKER=broker.socket))
                return fleet[-1]
            twin = start("twin")
            twin.boot()
            time.sleep(given.settle)
            file = os.path.join(work, "state")
            twin.monitor().must("migrate", uri=f"exec:cat > '{file}'")
            while twin.monitor().must("query-migrate").get("status") != "completed":
                time.sleep(0.05)
            twin.monitor().must("cont")
            time.sleep(2)
            new = start("restored", "-incoming", f"exec:cat < '{file}'")
            while new.monitor().must("query-status").get("status") == "inmigrate":
                time.sleep(0.02)
            new.monitor().must("cont")
            begun, seen = time.time(), []
            while (at := time.time() - begun) < given.seconds:
                seen.append((at, new.counter("pages_merged") + new.counter("ksm_zero_pages")))
                time.sleep(0.1)
            for machine in fleet:
                if machine.wrong() or machine.process.poll() is not None:
                    raise RuntimeError(f"{machine.name}: {machine.wrong()[:3]} {machine.complaints()}")
            if new.round() == 0:
                raise RuntimeError(f"{new.name} does not run: {new.complaints()}")
            most = seen[-1][1]
            times = {part: next(at for at, pages in seen if pages >= most * part / 100) for part in (50, 90, 95)}
            print(f"  shares {most} pages in the end; " + ", ".join(f"{part} % after {at:.2f} s" for part, at in times.items()), flush=True)
            return times[90]
        finally:
            for machine in fleet:
                machine.end()
            broker.end()


def main():
    options = options_of("How fast a restored guest shares its memory with its running twin.")
    options.add_argument("--settle", type=int, default=30, help="seconds for which the first one runs alone (%(default)s)")
    options.add_argument("--seconds", type=int, default=60, help="after which what is shared counts as all (%(default)s)")
    options.add_argument("--repetitions", type=int, default=3, help="(%(default)s)")
    given = options.parse_args()
    guest.find_qemu()
    kernel, modules = guest.find_kernel(os.path.abspath(given.work))
    with tempfile.TemporaryDirectory() as work:
        initrd = os.path.join(work, "initrd")
        guest.initramfs(initrd, init=INIT, more=files(modules, kernel, given.memory // 12)[0])
        try:
            times = [restore(given, kernel, initrd) for _ in range(given.repetitions)]
        except (RuntimeError, OSError) as error:
            print(f"{error}", file=sys.stderr)
            return 1
    print(f"90 % after {statistics.median(times):.2f} s ({min(times):.2f} ... {max(times):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
