#!/usr/bin/env python3
"""The emulator of examples/libvirt with the options that libvirt starts QEMU with: merged all the same, and the rest of QEMU's sandbox stays.

  libvirt_test.py KSMUCTL-DIRECTORY
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WRAPPER = SOURCE + "/examples/libvirt/qemu-ksmu"
SANDBOX = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
MACHINE = ["-accel", "tcg", "-m", "64", "-nodefaults", "-nographic", "-serial", "none", "-monitor", "none"]
passed, failed = [], []


def skip(reason):
    print(f"skipped 1: {reason}\n0 passed, 0 failed, 1 skipped")
    sys.exit(77)


def check(name, good, what=""):
    (passed if good else failed).append(name)
    print(f"{'ok' if good else 'FAILED'} {name}{'' if good else ': ' + str(what)}", flush=True)


def counters(path):
    try:
        with open(path) as f:
            return {name: int(value) for name, value in (line.split() for line in f)}
    except (OSError, ValueError):
        return {}


class Guest:
    def __init__(self, directory, *arguments):
        self.stats, self.log = directory + "/stats", directory + "/log"
        environment = dict(os.environ, PATH=sys.argv[1] + ":" + os.environ["PATH"], KSMU_STATS=self.stats + ":1", KSMU_LOG=self.log,
                           KSMU_CPU_LIMIT_PERCENT="100", KSMU_BROKER="none")
        self.output = open(directory + "/output", "w+")
        self.process = subprocess.Popen([WRAPPER, *MACHINE, *arguments], stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output,
                                        env=environment)

    def until(self, condition, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if condition(counters(self.stats)):
                return True
            time.sleep(0.2)
        return False

    def said(self):
        self.output.seek(0)
        log = open(self.log).read() if os.path.exists(self.log) else ""
        return f"{self.output.read()}{log}{counters(self.stats)}"

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "killed"
        finally:
            self.output.close()


def main():
    if not shutil.which("/usr/bin/qemu-system-x86_64"):
        skip("qemu-system-x86_64 is not installed")
    usable = subprocess.run([SOURCE + "/scripts/check-kernel"], capture_output=True, text=True)
    if usable.returncode != 0:
        skip(usable.stderr.strip())
    with tempfile.TemporaryDirectory(prefix="ksmu-libvirt-") as directory:
        guest = Guest(directory, *SANDBOX)
        merging = guest.until(lambda c: c.get("regions", 0) > 0 and c.get("ksm_zero_pages", 0) + c.get("pages_merged", 0) > 0, 90)
        check("a guest under libvirt's sandbox is merged", merging, guest.said())
        with open(f"/proc/{guest.process.pid}/status") as f:
            check("the sandbox is there", "Seccomp:\t2" in f.read())
        with open(f"/proc/{guest.process.pid}/cmdline") as f:
            words = f.read().split("\0")[:-1]
        expected = [*MACHINE, SANDBOX[0], SANDBOX[1].replace("resourcecontrol=deny", "resourcecontrol=allow")]
        check("nothing else is changed", words[1:] == expected, words)
        check("it ends as QEMU does", guest.end() == 0)
    with tempfile.TemporaryDirectory(prefix="ksmu-libvirt-") as directory:
        # What <nosharepages/> becomes.
        guest = Guest(directory, "-machine", "mem-merge=off", *SANDBOX)
        started = guest.until(lambda c: "regions" in c, 60)
        guest.until(lambda c: c.get("regions", 0) > 0, 4)
        check("nosharepages is obeyed", started and counters(guest.stats).get("regions") == 0 and guest.process.poll() is None, guest.said())
        guest.end()
    print(f"{len(passed)} passed, {len(failed)} failed, 0 skipped")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


sys.exit(main())
