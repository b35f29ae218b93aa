#!/usr/bin/env python3
"""Random memory calls, without the shim and with it: fuzz_test.py [FUZZ] SHIM [options]

FUZZ is tests/preload/fuzz.c compiled; without it, or where it is a .c file, it is compiled here. Each seed is a sequence of calls,
run first without the shim, then with it: exact, promised (KSMU_NO_RAW_DISCARDS=1), and with broken pages merged again at once.
What is printed must be the same, and every page must hold what it must hold. Then two threads at a time, whose contents alone
are looked at.

  --seed N      this seed only (and the variants in which it failed are printed with a command that repeats it)
  --steps N     so many calls in each sequence: to make one that fails shorter
  --seconds N   how long in all; 60, with KSMU_TEST_LONG=1 20 minutes
  --variant V   only this one: exact, promised, again, race
"""
import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from support import environment, finish, skip

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
# No write of the kernel's takes a second here: what waits for them (UFFDIO_REGISTER, MADV_WIPEONFORK) is not to wait for a minute.
FLAT_OUT = {"KSMU_SLEEP_MILLISECS": "0", "KSMU_CPU_LIMIT_PERCENT": "100", "KSMU_REMERGE_SECONDS": "1"}
# Each at the scanner's full speed. With remerge_seconds 0 the kernel's own writes are not promised (ksmu.h).
VARIANTS = {"exact": (FLAT_OUT, []), "promised": (FLAT_OUT | {"KSMU_NO_RAW_DISCARDS": "1"}, []),
            "again": (FLAT_OUT | {"KSMU_REMERGE_SECONDS": "0"}, ["no_kernel_writes"])}
LIMIT = 120 if LONG else 60


def run(command, **variables):
    """Status, lines and what it said in the end; what hangs is ended with its children."""
    process = subprocess.Popen(command, env=environment(**variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
    try:
        out, err = process.communicate(timeout=LIMIT)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        status = f"none in {LIMIT} s"
    return status, out.splitlines(), err


def counts(err):
    found = re.search(r"merged (\d+) broken (\d+)", err)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def differs(plain, shim):
    for i, (a, b) in enumerate(zip(plain, shim)):
        if a != b:
            return f"{a!r} without the shim, {b!r} with it (line {i + 1})"
    return None if len(plain) == len(shim) else f"{len(shim)} lines and not {len(plain)}, the last {shim[-1:]}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seconds", type=float, default=1200 if LONG else 60)
    parser.add_argument("--variant", choices=[*VARIANTS, "race"])
    options = parser.parse_args()
    shim = os.path.abspath(options.files[-1])
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fuzz.c")
    fuzz = os.path.abspath(options.files[0]) if len(options.files) > 1 else source
    errors, merged, broken, seeds, lines, races = [], 0, 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as work:
        if fuzz.endswith(".c"):
            compiler = shutil.which("cc") or shutil.which("gcc")
            if not compiler:
                skip("there is no C compiler")
            subprocess.run([compiler, "-O1", "-g", "-Wall", "-Wextra", fuzz, "-o", os.path.join(work, "fuzz"), "-pthread", "-ldl"],
                           check=True)
            fuzz = os.path.join(work, "fuzz")
        decisions, steps = os.path.join(work, "decisions"), str(options.steps)
        until = time.monotonic() + options.seconds
        seed = options.seed if options.seed is not None else int(time.time()) % 1000000 if LONG else 1
        print(f"from seed {seed} on")

        def repeat(variant):
            return f"  again: fuzz_test.py FUZZ SHIM --seed {seed} --steps {steps} --variant {variant}"

        # A sequence that fails once is enough of it; a few are, of the test.
        while len(errors) < 5:
            for variant, (variables, more) in VARIANTS.items():
                if options.variant not in (None, variant):
                    continue
                # Without it, as the same: what it says depends on what it is told to leave out.
                status, plain, err = run([fuzz, str(seed), steps, decisions, "plain", *more])
                if status != 0:
                    errors.append(f"seed {seed}, without the shim: status {status}, {plain[-1:]} {err[-300:]}")
                    break
                status, said, err = run([fuzz, str(seed), steps, decisions, "shim", *more], LD_PRELOAD=shim, **variables)
                difference = differs(plain, said)
                wrong = [line for line in said if line.startswith("WRONG")]
                if status != 0 or difference or wrong:
                    errors.append(f"seed {seed}, {variant}: status {status}; {'; '.join(wrong[:2])}; {difference} {err[-300:]}\n"
                                  + repeat(variant))
                a, b = counts(err)
                merged, broken, lines = merged + a, broken + b, lines + len(said)
            if options.variant in (None, "race"):
                status, said, err = run([fuzz, "race", str(seed), steps], LD_PRELOAD=shim, **FLAT_OUT)
                if status != 0:
                    errors.append(f"seed {seed}, race: status {status}, {said[-1:]} {err[-300:]}\n{repeat('race')}")
                a, b = counts(err)
                merged, broken, races = merged + a, broken + b, races + 1
            seeds += 1
            if options.seed is not None or time.monotonic() > until:
                break
            seed += 1
    print(f"{seeds} seeds of {steps} calls, {lines} lines compared, {races} with two threads; merged {merged}, broken {broken}")
    if options.seed is None and not errors and (merged < 1000 or broken < 100):
        errors.append(f"merged {merged} and broken {broken} pages only")
    finish("fuzz", errors)


main()
