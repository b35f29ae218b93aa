#!/usr/bin/env python3
"""The preloaded shim, on programs that know nothing of it.

  preload_test.py semantics PROGRAM SHIM KSMUCTL     each case of tests/preload/program.c, without the shim and with it
  preload_test.py corners PROGRAM SHIM KSMUCTL       the same with tests/preload/corners.c
  preload_test.py allocators MALLOCS SHIM ALLOCATOR  an allocator preloaded before and behind the shim; and libc's own
  preload_test.py around PROGRAM SHIM KSMUCTL        the environment, the log, statistics, ksmuctl exec, falling back

KSMU_TEST_LONG=1: more rounds, longer.
"""
import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "preload"))
from support import environment  # noqa: E402

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
passed, failed, skipped = [], [], []
FLAT_OUT = {"KSMU_SLEEP_MILLISECS": "0", "KSMU_CPU_LIMIT_PERCENT": "100"}


def check(name, good, detail=""):
    (passed if good else failed).append(name)
    if not good:
        print(f"{name}: {detail}")


def skip(name, why):
    skipped.append((name, why))


def run(command, preload="", limit=240, **variables):
    if preload:
        variables["LD_PRELOAD"] = preload
    try:
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired as e:
        return None, (e.stdout or b"").decode(errors="replace"), "it did not end"
    return done.returncode, done.stdout, done.stderr


def usable(shim):
    """Whether the library can start here: what it says where it cannot."""
    log = tempfile.NamedTemporaryFile(mode="r")
    run(["/bin/true"], shim, KSMU_LOG=log.name, KSMU_AUTO="1")
    code, out, err = run([sys.executable, "-c", "import ctypes;k=ctypes.CDLL('libksmu.so.0');"
                          "k.ksmu_last_error.restype=ctypes.c_char_p;"
                          "print(k.ksmu_start(None,0) or '', k.ksmu_last_error().decode())"],
                         shim, LD_LIBRARY_PATH=os.path.dirname(shim))
    return "" if code == 0 and not out.strip() else (out.strip() or err.strip())


def semantics(program, shim, _ksmuctl, least=20):
    cases = run([program])[1].split()
    check("cases", len(cases) >= least, cases)
    for name in cases:
        # No device writes here: what waits for one (MADV_WIPEONFORK, UFFDIO_REGISTER) is not to wait for a minute.
        variables = {"KSMU_REMERGE_SECONDS": "0" if name == "handed_over" else "1"}
        if name == "automatic":
            variables["KSMU_AUTO"] = "1"
        variants = [("", variables)]
        # With discards done by the library, and once more with the scanner at it all the time.
        if name != "automatic":
            variants += [(" promised", variables | {"KSMU_NO_RAW_DISCARDS": "1"}), (" flat out", variables | FLAT_OUT)]
        plain = run([program, name])
        for suffix, more in variants:
            for _ in range(20 if LONG else 1):
                code, out, err = run([program, name], shim, **more)
                same = (code, out) == plain[:2]
                difference = [line for line in out.splitlines() if line not in plain[1].splitlines()][:5]
                check(name + suffix, same, f"status {code} and not {plain[0]}; {difference} {err[-300:]}")
                if not same:
                    break


def corners(program, shim, ksmuctl):
    semantics(program, shim, ksmuctl, 6)


def allocators(mallocs, shim, strict):
    seconds = "60" if LONG else "4"
    candidates = [("strict", strict, 1000)]
    for name in ("jemalloc", "tcmalloc_minimal", "mimalloc"):
        candidates.append((name, ctypes.util.find_library(name), 0 if name == "tcmalloc_minimal" else 100))
    candidates.append(("libc's", "", 0))
    merged_by = {}
    for name, library, least in candidates:
        if library is None:
            skip(name, f"there is no lib{name} here")
            continue
        orders = [("shim first", f"{shim}:{library}"), ("shim last", f"{library}:{shim}")] if library else [("alone", shim)]
        for order, preload in orders:
            # What is freed again at once is not merged: on a busy machine it takes longer to come by enough.
            for length in (seconds, "25"):
                code, out, err = run([mallocs, length], preload, KSMU_AUTO="1", KSMU_AUTO_MIN="64K", **FLAT_OUT)
                found = re.search(r"merged (\d+) broken (\d+) wrong (\d+)", out)
                if code != 0 or not found or int(found[1]) >= least:
                    break
            check(f"{name}, {order}", code == 0 and found is not None, f"status {code}: {out[-200:]} {err[-300:]}")
            if found:
                merged_by[f"{name}, {order}"] = (int(found[1]), int(found[2]))
                # tcmalloc takes its memory by sbrk, and libc's malloc by calls inside libc: not the shim's to merge. Preloaded
                # before the shim, tcmalloc's own mmap stands in its way.
                if int(found[1]) < least:
                    check(f"{name}, {order}: merged", False, f"only {found[1]} pages")
    print("merged, broken:", "; ".join(f"{k}: {a}, {b}" for k, (a, b) in merged_by.items()))


def around(program, shim, ksmuctl):
    with tempfile.TemporaryDirectory() as work:
        log, stats = os.path.join(work, "log"), os.path.join(work, "stats.%p")

        def logged():
            try:
                with open(log) as f:
                    return f.read()
            except FileNotFoundError:
                return ""
            finally:
                if os.path.exists(log):
                    os.unlink(log)

        # Silent, unless told.
        code, out, err = run(["/bin/echo", "hello"], shim, KSMU_FOO="1", KSMU_AUTO="1")
        check("silent", (code, out, err) == (0, "hello\n", ""), (code, out, err))
        run(["/bin/true"], shim, KSMU_LOG=log, KSMU_FOO="1", KSMU_RUN="yes", KSMU_AUTO_MIN="lots", KSMU_AUTO="maybe")
        text = logged()
        for what in ("KSMU_FOO: there is no such variable", "KSMU_RUN=yes: not a number", "KSMU_AUTO_MIN=lots", "KSMU_AUTO=maybe"):
            check(f"log: {what}", what in text, text)
        # A value out of range: the library does not start, says why, and the kernel gets the advice.
        code, out, err = run([program, "kernel"], shim, KSMU_LOG=log, KSMU_CPU_LIMIT_PERCENT="900")
        text = logged()
        check("log: out of range", "out of range" in text, text)
        check("falls back to the kernel", out == run([program, "kernel"])[1], out)
        # By name.
        for variables, active in ((dict(KSMU_ONLY="other,prog*"), True), (dict(KSMU_ONLY="other"), False),
                                  (dict(KSMU_EXCLUDE="x,*ram"), False), (dict(KSMU_EXCLUDE="other"), True)):
            shutil.copy(program, os.path.join(work, "program"))
            out = run([os.path.join(work, "program"), "is_merging"], shim, **variables)[1]
            check(f"by name: {variables}", out == f"{int(active)}\n", out)
        # Statistics: in the end, and on the way.
        code, out, err = run([program, "write"], shim, KSMU_STATS=stats)
        files = [n for n in os.listdir(work) if n.startswith("stats.")]
        text = open(os.path.join(work, files[0])).read() if len(files) == 1 else ""
        merged = re.search(r"^pages_merged_total (\d+)$", text, re.M)
        check("statistics", merged is not None and int(merged[1]) >= 64, (files, text[:200]))
        # Somebody else's mmap before ours: nothing may be merged.
        other = os.path.join(work, "other.so")
        source = os.path.join(work, "other.c")
        with open(source, "w") as f:
            f.write("#define _GNU_SOURCE\n#include <sys/syscall.h>\n#include <unistd.h>\n"
                    "void *mmap(void *a, unsigned long b, int c, int d, int e, long f)"
                    "{ return (void *)syscall(SYS_mmap, a, b, c, d, e, f); }\n")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if not compiler:
            skip("another shim", "there is no C compiler")
        else:
            subprocess.run([compiler, "-shared", "-fPIC", source, "-o", other], check=True)
            out = run([program, "is_merging"], f"{other}:{shim}", KSMU_LOG=log)[1]
            text = logged()
            check("another's mmap", out == "0\n" and "mmap goes to" in text and "nothing is merged" in text, out + text)
        # Without the right to userfaultfd the kernel's own advice is what the program gets.
        if os.geteuid() != 0 or not shutil.which("setpriv"):
            skip("without rights", "it takes root and setpriv to give the rights up")
        else:
            os.chmod(work, 0o755)
            copies = [shutil.copy(f, work) for f in (program, shim, os.path.join(os.path.dirname(shim), "libksmu.so.0"))]
            for copy in copies:
                os.chmod(copy, 0o755)
            drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
            plain = run(drop + [copies[0], "kernel"])
            code, out, err = run(drop + ["env", f"LD_PRELOAD={copies[1]}", "KSMU_LOG=stderr", copies[0], "kernel"])
            rights = open("/proc/sys/vm/unprivileged_userfaultfd").read().strip() if os.path.exists("/proc/sys/vm/unprivileged_userfaultfd") else "0"
            if rights == "1":
                skip("without rights", "vm.unprivileged_userfaultfd is 1")
            else:
                check("without rights", (code, out) == plain[:2] and "not merging here" in err, (code, out, err))

        # ksmuctl.
        code, out, err = run([ksmuctl, "exec", "--auto", "--set", "cpu_limit_percent=20", "--", program, "is_merging"])
        check("ksmuctl exec", (code, out) == (0, "1\n"), (code, out, err))
        check("ksmuctl: its status", run([ksmuctl, "exec", "sh", "-c", "exit 7"])[0] == 7)
        for arguments, status in ((["exec", "/no/such"], 127), (["exec", "/etc/passwd"], 126), (["exec"], 2), (["nonsense"], 2), ([], 2),
                                  (["exec", "--set", "cpu_limit_percent=900", "true"], 2), (["exec", "--set", "foo=1", "true"], 2),
                                  (["exec", "--set", "foo", "true"], 2), (["exec", "--stats"], 2), (["exec", "--what", "true"], 2)):
            code, out, err = run([ksmuctl] + arguments)
            check(f"ksmuctl {' '.join(arguments)}", code == status and err, (code, err))
        before = run([ksmuctl, "exec", "sh", "-c", "echo $LD_PRELOAD"], "libm.so.6")[1]
        check("ksmuctl keeps preloads", before.strip().endswith(":libm.so.6"), before)


def main():
    what, arguments = sys.argv[1], [os.path.abspath(a) for a in sys.argv[2:]]
    why = usable(arguments[1])
    if why:
        print(f"skipped: the library cannot be started: {why}")
        sys.exit(77)
    {"semantics": semantics, "corners": corners, "allocators": allocators, "around": around}[what](*arguments)
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    for name, reason in skipped:
        print(f"skipped 1: {name}: {reason}")
    for name in failed:
        print("FAILED", re.sub(r"\s+", "_", name))
    sys.exit(1 if failed else 0)


main()
