#!/usr/bin/env python3
"""A guest without an operating system under /dev/kvm, without the shim and with it: kvm_test.py KVM_GUEST SHIM

tests/preload/kvm_guest.c (or that file, compiled here). Skipped where /dev/kvm gives no machine. Broken pages are merged again at
once: it is the processor that writes them, and the kernel where a machine is emulated, by plain copying.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

from support import environment, finish, skip

ROUNDS = "200" if os.environ.get("KSMU_TEST_LONG") == "1" else "10"


def main():
    program, shim = (os.path.abspath(a) for a in sys.argv[1:3])
    errors = []
    with tempfile.TemporaryDirectory() as work:
        if program.endswith(".c"):
            compiler = shutil.which("cc") or shutil.which("gcc")
            if not compiler:
                skip("there is no C compiler")
            subprocess.run([compiler, "-O1", "-g", "-Wall", "-Wextra", program, "-o", os.path.join(work, "kvm_guest"), "-ldl"],
                           check=True)
            program = os.path.join(work, "kvm_guest")
        said = []
        for variables in ({}, dict(LD_PRELOAD=shim, KSMU_SLEEP_MILLISECS="0", KSMU_CPU_LIMIT_PERCENT="100", KSMU_REMERGE_SECONDS="0")):
            try:
                done = subprocess.run([program, ROUNDS], env=environment(**variables), capture_output=True, text=True, timeout=280)
            except subprocess.TimeoutExpired:
                errors.append(f"the guest does not end{' under the shim' if variables else ''}")
                break
            if done.returncode == 77:
                skip(done.stdout.strip().removeprefix("skipped: "))
            said.append((done.returncode, done.stdout))
            if done.returncode != 0:
                errors.append(f"status {done.returncode}{' under the shim' if variables else ''}: {done.stdout[-300:]} {done.stderr[-300:]}")
            if variables:
                found = re.search(r"merged (\d+) broken (\d+)", done.stderr)
                print(f"{done.stdout.strip()}; {found[0] if found else done.stderr[-200:]}")
        if len(said) == 2 and said[0] != said[1] and not errors:
            errors.append(f"{said[1]} under the shim, {said[0]} without it")
    finish("kvm_guest", errors)


main()
