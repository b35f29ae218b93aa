#!/usr/bin/env python3
"""A guest that moves between QEMUs, all under the shim: qemu_migrate_test.py SHIM WORK

One guest (guest.py) is booted and goes through all of it, since booting is what takes long:

  background snapshot   written to a file while it runs on: QEMU write-protects its memory by a userfaultfd of its own.
                        A second QEMU restores the file, and its guest goes on from there
  save and restore      stopped, written to a file and restored; the memory of both, read through the monitors, is equal
  postcopy              to another QEMU over a socket; the pages that had not come are fetched on being touched, by a
                        userfaultfd of that QEMU's own

The scanner is flat out in every QEMU. A userfaultfd of QEMU's on its guest's memory sends the library out of it;
afterwards the same memory is merged again, which is looked at. WORK keeps the kernel between runs. KSMU_TEST_LONG=1:
checks two minutes after each step and not only until enough was merged, and migrates in postcopy three times.
"""
import os
import socket
import sys
import tempfile
import time

import guest
from support import finish, skip

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
SECONDS = int(os.environ.get("KSMU_GUEST_SECONDS", 120 if LONG else 0))
POSTCOPIES = 3 if LONG else 1
LIMIT = 180  # for what takes seconds on an idle machine
MERGED, BROKEN = 1000, 100


def same(left, right):
    """The first byte that differs, or None."""
    with open(left, "rb") as a, open(right, "rb") as b:
        at = 0
        while True:
            x, y = a.read(1 << 20), b.read(1 << 20)
            if x != y:
                return at + next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
            if not x:
                return None
            at += len(x)


class Migration:
    def __init__(self, work):
        self.work = work
        self.kernel, _ = guest.find_kernel(os.path.abspath(sys.argv[2]))
        self.initrd = os.path.join(work, "initrd")
        guest.initramfs(self.initrd)
        self.variables = guest.flat_out(os.path.abspath(sys.argv[1]))
        self.guests = []
        self.errors = []

    def qemu(self, name, *more):
        self.guests.append(guest.Guest(self.work, name, self.kernel, self.initrd, more=more, **self.variables))
        return self.guests[-1]

    def counts(self, machine):
        return machine.counter("pages_merged_total"), machine.counter("cow_breaks")

    def goes_on(self, what, machine, before=(0, 0), rounds=2):
        """Rounds of right sums from now on, and pages merged and broken since `before`; prints them.

        What has been broken once is not merged again as long as the guest goes on writing it, and so a guest in the
        same QEMU comes to an end of what can be merged: each QEMU's pages count from its start, or from its having let
        go of them.
        """
        begun, started = len(machine.rounds()), time.time()

        def since():
            merged, broken = self.counts(machine)
            return len(machine.rounds()) - begun, merged - before[0], broken - before[1]

        def enough():
            return all(n >= least for n, least in zip(since(), (rounds, MERGED, BROKEN)))

        machine.wait(enough, LIMIT)
        machine.wait(lambda: time.time() > started + SECONDS, SECONDS + 1)
        print(f"{what}: {since()[0]} rounds of sums in {time.time() - started:.0f} s; merged {since()[1]}, "
              f"broken {since()[2]}, sharing {machine.counter('pages_sharing')}, "
              f"gate p99 {machine.counter('gate_p99_us')} us", flush=True)
        self.errors += [f"{what}: {line}" for line in machine.wrong()]
        if machine.process.poll() is not None:
            self.errors.append(f"{what}: {machine.complaints()}")
        elif not enough():
            self.errors.append(f"{what}: {since()} and not {(rounds, MERGED, BROKEN)} rounds, merged and broken pages; "
                               f"{machine.complaints()}")

    def settled(self, machine):
        """Waits for the end of a migration, as either side sees it; what that says of it."""
        about, failed = {}, ("failed", "cancelled", "postcopy-paused")

        def over():
            about.update(machine.monitor().must("query-migrate"))
            return about.get("status") in ("completed", *failed)

        if not machine.wait(over, LIMIT) or about["status"] in failed:
            raise RuntimeError(f"{machine.name}: migration {about}; {machine.wrong()}")
        return about

    def capabilities(self, machine, *names, state=True):
        wanted = [{"capability": name, "state": state} for name in names]
        machine.monitor().must("migrate-set-capabilities", capabilities=wanted)

    def restore(self, name, file, *more):
        restored = self.qemu(name, "-incoming", f"exec:cat < '{file}'", *more)
        self.settled(restored)
        return restored

    def snapshot(self, source):
        """The source goes on, and so does what is restored from its snapshot."""
        file = os.path.join(self.work, "snapshot")
        # QEMU registers all memory for a moment when asked for this, as a trial: the library gets out of its way, and
        # comes back.
        before = self.counts(source)
        self.capabilities(source, "background-snapshot")
        self.goes_on("after the trial", source, before)
        before = self.counts(source)
        first, shared = source.round(), source.counter("pages_sharing")
        path = os.path.join(self.work, "stream")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.settimeout(LIMIT)
            source.monitor().must("migrate", uri=f"unix:{path}")
            stream = listener.accept()[0]
        last = source.round()
        # Taken off its hands slowly: the guest comes to write into memory that is still to be saved, and waits for it.
        stream.settimeout(LIMIT)
        with stream, open(file, "wb") as saved:
            while data := stream.recv(1 << 20):
                saved.write(data)
                time.sleep(len(data) / (20 << 20))
        about = self.settled(source)
        self.capabilities(source, "background-snapshot", state=False)
        print(f"background snapshot: {os.path.getsize(file) >> 20} MiB in {about.get('total-time')} ms, "
              f"rounds {first} to {source.round()} meanwhile; shared {shared} pages before")
        self.goes_on("after the snapshot", source, before)
        restored = self.restore("snapshot_restored", file)
        self.goes_on("restored from the snapshot", restored)
        # It is the guest as it was when the snapshot was begun.
        if restored.rounds() and not first < restored.rounds()[0] <= last + 2:
            self.errors.append(f"the snapshot of rounds {first} to {last} goes on with {restored.rounds()[0]}")
        restored.end()

    def save(self, source):
        """What the restored one is."""
        file, memory = os.path.join(self.work, "saved"), [os.path.join(self.work, f"memory{n}") for n in range(2)]
        self.goes_on("before it is saved", source)
        source.monitor().must("stop")
        last, shared = source.round(), source.counter("pages_sharing")
        source.monitor().must("pmemsave", val=0, size=256 << 20, filename=memory[0])
        source.monitor().must("migrate", uri=f"exec:cat > '{file}'")
        self.settled(source)
        source.end()
        restored = self.restore("restored", file, "-S")
        restored.monitor().must("pmemsave", val=0, size=256 << 20, filename=memory[1])
        print(f"saved: {os.path.getsize(file) >> 20} MiB, of which {shared} pages were shared")
        different = same(*memory)
        if different is not None:
            self.errors.append(f"restored: memory differs at {different:#x}")
        restored.monitor().must("cont")
        self.goes_on("restored", restored)
        if restored.rounds() and not last < restored.rounds()[0] <= last + 2:
            self.errors.append(f"saved after round {last}, and goes on with {restored.rounds()[0]}")
        for name in memory + [file]:
            os.unlink(name)
        return restored

    def postcopy(self, source):
        """The guest's new QEMU."""
        name = f"target{len(self.guests)}"
        target = self.qemu(name, "-incoming", "defer")
        for machine in (source, target):
            self.capabilities(machine, "postcopy-ram", "events")
        # Half of it is sent before, slowly; the rest more slowly still, but for what is asked for.
        source.monitor().must("migrate-set-parameters", max_bandwidth=16 << 20, max_postcopy_bandwidth=4 << 20)
        uri = f"unix:{os.path.join(self.work, name)}.migration"
        target.monitor().must("migrate-incoming", uri=uri)
        # Software emulation of QEMU 7.2 loses track of what a running guest writes while it is sent, without the shim
        # as with it: sums become wrong in one migration of a few. So it stands still until it runs at its new place,
        # where it touches what has not come.
        source.monitor().must("stop")
        last = source.round()
        source.monitor().must("migrate", uri=uri)

        def half():
            return source.monitor().must("query-migrate").get("ram", {}).get("transferred", 0) >= 50 << 20

        # What has come is merged there, and let go of when QEMU registers it.
        if not source.wait(lambda: half() and target.counter("pages_merged_total") >= MERGED, LIMIT):
            raise RuntimeError(f"does not get on: {source.monitor().must('query-migrate')}")
        source.monitor().must("migrate-start-postcopy")
        before, shared = self.counts(target), target.counter("pages_sharing")
        about = self.settled(source)
        self.settled(target)
        states = [e["data"]["status"] for e in target.monitor().events if e["event"] == "MIGRATION"]
        requests = about["ram"].get("postcopy-requests", 0)
        print(f"postcopy: merged {before[0]}, broken {before[1]}, sharing {shared} pages on their coming; "
              f"then {requests} pages asked for, {about['total-time']} ms in all, "
              f"standing still for {about.get('downtime')} ms")
        if before[0] < MERGED:
            self.errors.append(f"{name}: merged {before[0]} pages only on their coming; {target.complaints()}")
        if "postcopy-active" not in states or requests == 0:
            self.errors.append(f"{name}: not by postcopy: {states}, {requests} pages asked for")
        source.end()
        self.goes_on("after postcopy", target, before)
        if target.rounds() and target.rounds()[0] <= last:
            self.errors.append(f"{name}: round {last} when it began, and goes on with {target.rounds()[0]}")
        return target

    def step(self, what, step, *arguments):
        """One that fails does not keep the next from being tried. None: it failed."""
        try:
            return step(*arguments)
        except (RuntimeError, OSError) as error:
            self.errors.append(f"{what}: {error}; " + "; ".join(f"{m.name}: {m.complaints()}" for m in self.guests))
            return None

    def run(self):
        source = self.qemu("source")
        source.boot()
        self.goes_on("booted", source)
        self.step("background snapshot", self.snapshot, source)
        current = self.step("save and restore", self.save, source)
        for n in range(POSTCOPIES):
            current = current and self.step("postcopy", self.postcopy, current)


def main():
    if not os.path.exists("/dev/userfaultfd") and os.geteuid() != 0:
        skip("QEMU needs a userfaultfd for this (root, or /dev/userfaultfd)")
    with tempfile.TemporaryDirectory() as work:
        migration = Migration(work)
        try:
            migration.step("guest", migration.run)
        finally:
            for machine in migration.guests:
                machine.end()
        finish("migration", migration.errors)


main()
