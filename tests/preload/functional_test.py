#!/usr/bin/env python3
"""The list of the kernel's own tests of KSM, asked of the shim: functional_test.py FUNCTIONAL SHIM

Each case of tests/preload/functional.c without the shim and with it: exact, and promised (KSMU_NO_RAW_DISCARDS=1). The two must
print the same; "WRONG" is what is said where merging, or its end, cannot be seen. FUNCTIONAL may be the .c file.
"""
import os
import shutil
import subprocess
import sys
import tempfile

from support import environment, finish, skip

# Nothing but the program's threads writes there: what waits for others (MADV_WIPEONFORK) need not.
VARIANTS = {"": {"KSMU_REMERGE_SECONDS": "0"}, " promised": {"KSMU_REMERGE_SECONDS": "0", "KSMU_NO_RAW_DISCARDS": "1"}}


def run(command, **variables):
    try:
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, errors="replace", timeout=120)
    except subprocess.TimeoutExpired as e:
        return "none", (e.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def main():
    program, shim = (os.path.abspath(a) for a in sys.argv[1:3])
    errors, cases = [], 0
    with tempfile.TemporaryDirectory() as work:
        if program.endswith(".c"):
            compiler = shutil.which("cc") or shutil.which("gcc")
            if not compiler:
                skip("there is no C compiler")
            subprocess.run([compiler, "-O1", "-g", "-Wall", "-Wextra", program, "-o", os.path.join(work, "functional"), "-ldl"],
                           check=True)
            program = os.path.join(work, "functional")
        names = run([program])[1].split()
        for name in names:
            plain = run([program, name])
            if plain[0] != 0 or "WRONG" in plain[1]:
                errors.append(f"{name}, without the shim: status {plain[0]}, {plain[1][-200:]}")
                continue
            for suffix, variables in VARIANTS.items():
                cases += 1
                status, said = run([program, name], LD_PRELOAD=shim, **variables)
                if (status, said) != plain:
                    ours, theirs = said.splitlines(), plain[1].splitlines()
                    first = next((f"{b!r} and not {a!r}" for a, b in zip(theirs, ours) if a != b), f"ends behind {ours[-1:]}")
                    errors.append(f"{name}{suffix}: status {status}; {first}; {[line for line in ours if 'WRONG' in line][:3]}")
    print(f"{cases} cases")
    if cases < 20 and not errors:
        errors.append("too few")
    finish("functional", errors)


main()
