#!/usr/bin/env python3
"""What the shim costs a program that never uses it: start_test.py SHIM

The time from fork to the end of /bin/true, without the shim and with it in turn, median of each (on a busy machine its fastest
tenth); and what the shim asks the
loader for besides libc and the C++ runtime: nothing of Abseil above all, which the library is built with.
"""
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

from support import environment, finish, skip

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
RUNS, MOST_MS = (1000 if LONG else 200), 1.5
# The library itself, libc's parts, the compiler's runtimes, and the kernel's and the loader's own.
USUAL = re.compile(r"^(libksmu\.so.*|libc\.so\.6|libm\.so\.6|libpthread\.so\.0|libdl\.so\.2|librt\.so\.1|"
                   r"libstdc\+\+\.so\.6|libgcc_s\.so\.1|linux-vdso\.so\.1|linux-gate\.so\.1|ld-linux.*|libatomic\.so\.1)$")
SANITIZERS = re.compile(r"^lib(asan|tsan|ubsan|lsan)\.so")


def once(program, variables):
    began = time.perf_counter()
    pid = os.posix_spawn(program, [program], variables)
    _, status = os.waitpid(pid, 0)
    took = time.perf_counter() - began
    return took * 1000, status


def main():
    shim = os.path.abspath(sys.argv[1])
    program = shutil.which("true")
    errors = []
    if not shutil.which("readelf") and not shutil.which("ldd"):
        skip("there is no readelf and no ldd")
    named, sanitized = set(), False
    if shutil.which("readelf"):
        text = subprocess.run(["readelf", "-d", shim], capture_output=True, text=True, env=environment(LC_ALL="C")).stdout
        named |= set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*)\]", text))
    if shutil.which("ldd"):
        text = subprocess.run(["ldd", shim], capture_output=True, text=True, env=environment(LC_ALL="C")).stdout
        named |= {os.path.basename(line.split()[0]) for line in text.splitlines() if line.split()}
        if "not found" in text:
            errors.append(f"not found: {text}")
    for name in sorted(named):
        if SANITIZERS.match(name):
            sanitized = True
        elif not USUAL.match(name):
            errors.append(f"the shim pulls in {name}")
    if not any(name.startswith("libksmu.so") or name.startswith("libc.so") for name in named):
        errors.append(f"what the shim needs cannot be read: {named}")
    print("pulled in:", " ".join(sorted(named)))

    plain, preloaded = environment(), environment(LD_PRELOAD=shim)
    without, with_it = [], []
    for i in range(RUNS + 10):
        for variables, times in ((plain, without), (preloaded, with_it)):
            took, status = once(program, variables)
            if status:
                errors.append(f"status {status}")
            if i >= 10:  # the files are in memory by then
                times.append(took)
    more = statistics.median(with_it) - statistics.median(without)
    print(f"{statistics.median(without):.2f} ms without the shim, {statistics.median(with_it):.2f} ms with it, medians of {RUNS}: "
          f"{more:.2f} ms more")
    # Where others have the processors, the medians are of their time slices: what the fastest tenth took is the program's own.
    tenth = [statistics.quantiles(times, n=10)[0] for times in (without, with_it)]
    print(f"{tenth[0]:.2f} ms and {tenth[1]:.2f} ms, fastest tenth of each: {tenth[1] - tenth[0]:.2f} ms more; "
          f"load {os.getloadavg()[0]:.1f}")
    if os.getloadavg()[0] > os.cpu_count() / 2:
        more = min(more, tenth[1] - tenth[0])
    # A sanitizer's own start is not the shim's.
    if more > MOST_MS and not sanitized:
        errors.append(f"a program that never uses the shim starts {more:.2f} ms later: more than {MOST_MS}")
    finish("start", errors[:5])


main()
