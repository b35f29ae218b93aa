#!/usr/bin/env python3
"""The kernel's own test programs of its memory calls, without the shim and with it: kernel_tests_test.py SHIM WORK

From Debian's linux-source-6.1, what needs a C compiler and nothing else; each must end with the status that it ends with without
the shim, merging automatically (KSMU_AUTO=1, mappings from 64 KiB on). WORK keeps the sources and the programs between runs.
Skipped where the package is not installed. KSMU_KERNEL_SOURCE names another tree.
"""
import glob
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile

from support import counter, environment, finish, skip

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
LIMIT = 300 if LONG else 60
# Not: what takes huge pages set aside, or a machine's settings changed, or minutes (they are for the long form).
PROGRAMS = ["madv_populate", "map_fixed_noreplace", "map_populate", "mlock-random-test", "mlock2-tests", "mrelease_test",
            "mremap_dontunmap", "mremap_test", "on-fault-limit", "transhuge-stress", "ksm_tests", "soft-dirty"]
WANTED = re.compile(r"tools/testing/selftests/((vm|mm)/[^/]*\.[ch]|kselftest[^/]*\.h|kselftest/[^/]*\.h)$|mm/gup_test\.h$")
SLOW = {"transhuge-stress", "mremap_test"}
# Statuses by arguments: ksm_tests says SKIP where the kernel's KSM is not to be had.
ARGUMENTS = {"ksm_tests": [["-M", "-p", "10"], ["-U"], ["-Z", "-p", "10"], ["-H"]], "transhuge-stress": [["-d", "5"]]}
# ksm_tests sets the kernel's KSM and asks it what it has merged: it is the kernel's own, and not for the shim.
LEFT_OUT = {"ksm_tests": "it asks the kernel's KSM, which is told of nothing"}


def find_sources(work):
    """The directory of the programs' sources."""
    given = os.environ.get("KSMU_KERNEL_SOURCE")
    trees = [given] if given else [os.path.join(work, "kernel-tests")]
    for tree in trees:
        for name in ("mm", "vm"):
            found = os.path.join(tree, "tools/testing/selftests", name)
            if os.path.isdir(found):
                return found
    archives = glob.glob("/usr/src/linux-source-6.*.tar.xz")
    if given or not archives:
        skip("there are no kernel sources (linux-source-6.1)")
    os.makedirs(trees[0], exist_ok=True)
    with tarfile.open(sorted(archives)[0]) as archive:
        for member in archive:
            inside = re.sub(r"^[^/]*/", "", member.name)
            if member.isfile() and WANTED.match(inside):
                member.name = inside
                archive.extract(member, trees[0])
    return find_sources(work) if any(os.path.isdir(os.path.join(trees[0], "tools/testing/selftests", n)) for n in ("mm", "vm")) else skip(
        "the kernel's sources have no tests of memory calls")


def run(command, work, **variables):
    try:
        done = subprocess.run(command, cwd=work, env=environment(**variables), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "none", ""
    return done.returncode, done.stdout + done.stderr


def main():
    shim, cache = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        skip("there is no C compiler")
    sources = find_sources(cache)
    errors, left, same, merged = [], [], [], 0
    with tempfile.TemporaryDirectory() as work:
        for name in PROGRAMS:
            source = os.path.join(sources, name + ".c")
            if name in LEFT_OUT:
                left.append(f"{name} ({LEFT_OUT[name]})")
                continue
            if name in SLOW and not LONG:
                left.append(f"{name} (minutes)")
                continue
            if not os.path.exists(source):
                left.append(f"{name} (not there)")
                continue
            program = os.path.join(work, name)
            more = [f for f in (os.path.join(sources, "vm_util.c"),) if os.path.exists(f) and "vm_util.h" in open(source).read()]
            built = subprocess.run([compiler, "-O1", "-w", "-I", sources, source, *more, "-o", program, "-lrt", "-lpthread"],
                                   capture_output=True, text=True)
            if built.returncode:
                found = re.search(r"error: (.*)", built.stderr)
                left.append(f"{name} (not to be built: {found[1] if found else built.stderr[-100:]})")
                continue
            for arguments in ARGUMENTS.get(name, [[]]):
                plain, _ = run([program, *arguments], work)
                if plain == "none":
                    left.append(f"{name} (does not end in {LIMIT} s without the shim)")
                    continue
                stats = os.path.join(work, "stats")
                status, said = run([program, *arguments], work, LD_PRELOAD=shim, KSMU_AUTO="1", KSMU_AUTO_MIN="64K",
                                   KSMU_SLEEP_MILLISECS="0", KSMU_CPU_LIMIT_PERCENT="100", KSMU_STATS=stats)
                merged += counter(stats, "pages_merged_total")
                if status != plain:
                    errors.append(f"{name} {' '.join(arguments)}: status {status}, without the shim {plain}: {said[-400:]}")
                else:
                    same.append(f"{name} {status}")
    print("status as without the shim:", ", ".join(same) or "none", f"; merged {merged}")
    for what in left:
        print("left out:", what)
    if not same and not errors:
        skip("none of the kernel's programs could be built")
    finish("kernel_tests", errors)


main()
