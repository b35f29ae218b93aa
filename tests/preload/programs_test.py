#!/usr/bin/env python3
"""Programs as Debian has them under the shim: programs_test.py testers|python|git|node|servers SHIM

Each does what it does without the shim, beside the scanner flat out, and what it prints or leaves behind is compared
with a run without. Programs that take their memory from libc's malloc get jemalloc, preloaded as well: what libc maps
inside libc is not merged. What is not installed is skipped, program by program; KSMU_TEST_LONG=1 is the long form.
"""
import concurrent.futures
import ctypes
import glob
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

from support import counter, environment

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
SECONDS = 600 if LONG else 20
HERE = os.path.dirname(os.path.abspath(__file__))
SHIM = os.path.abspath(sys.argv[2])
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14


class Skipped(Exception):
    pass


def need(*programs):
    """Their paths. memtester is where only root looks."""
    found = [shutil.which(p, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin") for p in programs]
    for name, path in zip(programs, found):
        if not path:
            raise Skipped(f"{name} is not installed")
    return found[0] if len(found) == 1 else found


def jemalloc():
    found = glob.glob("/usr/lib/*/libjemalloc.so.2") + glob.glob("/usr/lib*/libjemalloc.so.2")
    if not found:
        raise Skipped("libjemalloc.so.2 is not installed")
    return found[0]


class Shimmed:
    """The environment of programs under the shim, and the counters of all their processes."""

    def __init__(self, work, *objects, **variables):
        self.directory = tempfile.mkdtemp(dir=work)
        self.log = os.path.join(self.directory, "log")
        # Nothing is spared for being written often: no back-off.
        flat_out = dict(KSMU_SLEEP_MILLISECS="0", KSMU_CPU_LIMIT_PERCENT="100", KSMU_SMART_SCAN="0")
        self.variables = environment(LD_PRELOAD=":".join((SHIM,) + objects), KSMU_LOG=self.log,
                                     KSMU_STATS=os.path.join(self.directory, "%p.stats") + ":1",
                                     **(flat_out | variables))

    def total(self, name):
        return sum(counter(f, name) for f in glob.glob(os.path.join(self.directory, "*.stats")))

    def said(self):
        if not os.path.exists(self.log):
            return "the log is empty"
        with open(self.log, errors="replace") as f:
            return f.read()[-600:]

    def report(self, name, errors, excuse=None):
        """Prints what was merged. Too little of it is an error unless the program cannot have more: `excuse`."""
        merged, broken = self.total("pages_merged_total"), self.total("cow_breaks")
        processes = len(glob.glob(os.path.join(self.directory, "*.stats")))
        why = f"; {excuse}" if excuse else ""
        print(f"{name}: merged {merged}, broken {broken} pages in {processes} processes{why}", flush=True)
        if (merged < 1000 or broken < 100) and not excuse:
            errors.append(f"merged {merged} and broken {broken} pages only: {self.said()}")


def run(command, variables, seconds, ends=True, **more):
    """(what it printed, its exit status). The process and its children are ended after that time: `ends` says that they
    should have ended by themselves."""
    process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, process_group=0, **more)
    try:
        out, _ = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL if ends else signal.SIGTERM)
        out, _ = process.communicate()
        status = f"none after {seconds} s" if ends else 0
    return out.decode(errors="replace"), status


# --- testers of memory -----------------------------------------------------------------------------------------------


def stress_ng(work, errors):
    program = need("stress-ng")
    shimmed = Shimmed(work)
    out, status = run([program, "--vm", "2", "--vm-bytes", "64M", "--vm-method", "all", "--vm-madvise", "mergeable",
                       "--verify", "--timeout", str(SECONDS), "--temp-path", work],
                      shimmed.variables, SECONDS + 120, cwd=work)
    if status != 0 or "successful run completed" not in out or re.search(r"fail:|error:", out):
        errors.append(f"status {status}: {out[-1000:]}")
    shimmed.report("stress-ng", errors)


def stressapptest(work, errors):
    program = need("stressapptest")
    shimmed = Shimmed(work, jemalloc(), KSMU_AUTO="1")
    # It pauses now and then: memory is quiet, and then all of it is written at once.
    out, status = run([program, "-s", str(SECONDS), "-M", "128", "-m", "1", "-i", "1", "--pause_delay", "5",
                       "--pause_duration", "3"], shimmed.variables, SECONDS + 120, cwd=work)
    if status != 0 or "Status: PASS" not in out or "with 0 hardware incidents, 0 errors" not in out:
        errors.append(f"status {status}: {out[-1000:]}")
    shimmed.report("stressapptest", errors)


def lock_nothing():
    """In the child, before it executes: no right to lock memory, for root neither."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))


def memtester(work, errors):
    program = need("memtester")

    def test(shimmed, **more):
        # For so long, however far it comes: through everything once at least where the machine is idle.
        out, status = run([program, "24M"], shimmed.variables, SECONDS / 2, ends=False, cwd=work, **more)
        # How far it is, and what rubs that out again.
        out = re.sub("((setting|testing) +[0-9]+|[-|/\\\\])? *\b+", "", out)
        passed = len(re.findall(r": *ok$", out, re.M))
        if status != 0 or "FAILURE" in out or "Stuck Address" not in out or passed < 2:
            errors.append(f"status {status}, {passed} tests passed: {out[-1000:]}")
        return out, passed

    shimmed = Shimmed(work, jemalloc(), KSMU_AUTO="1")
    out, passed = test(shimmed, preexec_fn=lock_nothing)
    if "unlocked" not in out:
        errors.append(f"it has locked its memory after all: {out[-300:]}")
    shimmed.report(f"memtester, unlocked, {passed} tests", errors)
    shimmed = Shimmed(work, jemalloc(), KSMU_AUTO="1")
    out, passed = test(shimmed)
    shimmed.report(f"memtester, {passed} tests", errors,
                   "it locks its memory, and that is not merged" if "locked." in out else None)


# --- Python's own tests ----------------------------------------------------------------------------------------------


def python(work, errors):
    program = "/usr/bin/python3.11"
    if not os.path.exists(program) or not os.path.exists("/usr/lib/python3.11/test/test_mmap.py"):
        raise Skipped("libpython3.11-testsuite is not installed")
    names = ["test.test_" + m for m in ("mmap", "fork1", "gc", "threading", "memoryview")]
    if LONG:
        names += ["test.test_" + m for m in (
            "subprocess", "multiprocessing_fork", "multiprocessing_spawn", "multiprocessing_forkserver",
            "concurrent_futures", "array", "bytes", "list", "signal", "threadsignals", "posix", "faulthandler",
            "ctypes", "weakref", "asyncio", "dict", "pickle", "io", "resource", "os")]
    else:
        names += ["test.test_subprocess." + c for c in ("ProcessTestCase", "RunFuncTestCase", "POSIXProcessTestCase")]
        names += ["test.test_multiprocessing_fork.WithProcessesTest" + c for c in ("Process", "Pool", "Queue")]
    runner = os.path.join(HERE, "python_tests.py")

    def results(variables, name, seconds, *only):
        """{test: ok, failed or skipped}"""
        path = os.path.join(work, name + ".txt")
        here = tempfile.mkdtemp(dir=work)
        if os.path.exists(path):
            os.unlink(path)
        out, status = run([program, runner, path] + list(only), variables, seconds, cwd=here)
        if not os.path.exists(path):
            raise RuntimeError(f"Python's tests do not run: {status}, {out[-1000:]}")
        with open(path) as f:
            found = dict(line.rstrip("\n").rsplit(" ", 1) for line in f)
        return found, out, status

    limit = 3600 if LONG else 500
    shimmed = Shimmed(work, KSMU_AUTO="1", KSMU_AUTO_MIN="64K")
    # Side by side: much of it is waiting.
    with concurrent.futures.ThreadPoolExecutor() as both:
        runs = [both.submit(results, variables, name, limit, *names)
                for variables, name in ((environment(), "plain"), (shimmed.variables, "merged"))]
        (plain, out, status), (merged, merged_out, merged_status) = (r.result() for r in runs)
    if plain.pop("end", "") != "ok":
        raise RuntimeError(f"without the shim, status {status}: {out[-1000:]}")
    if merged.pop("end", "") != "ok":
        errors.append(f"status {merged_status}: {merged_out[-2000:]}")
    for test in sorted(plain.keys() | merged.keys()):
        if plain.get(test, "ok") != "ok" or merged.get(test) == plain.get(test):
            continue
        # What fails now and then by itself is none of the shim's failures.
        again = [results(environment(), "again", limit, test)[0].get(test) for _ in range(3)]
        if "failed" not in again:
            text = re.search(rf"^=+\n\w+: {re.escape(test.split('.')[-1])} .*?(?=^=+$)", merged_out, re.M | re.S)
            text = text[0] if text else merged_out
            errors.append(f"{test}: {merged.get(test)} under the shim only\n{text[-2000:]}")
        else:
            print(f"{test} does not count: without the shim {[plain.get(test)] + again}")
    ok, ok_without = (sum(r == "ok" for r in found.values()) for found in (merged, plain))
    print(f"Python: {ok} of {len(merged)} tests ok, {ok_without} of {len(plain)} without the shim")
    if ok < 300:
        errors.append(f"only {ok} tests ran: {out[-500:]}")
    shimmed.report("Python", errors)


# --- git -------------------------------------------------------------------------------------------------------------


def git(work, errors):
    program = need("git")
    shimmed = Shimmed(work, jemalloc(), KSMU_AUTO="1", KSMU_AUTO_MIN="64K")
    date = "1700000000 +0000"
    fixed = dict(HOME=work, GIT_CONFIG_NOSYSTEM="1", GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@b",
                 GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@b", GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date,
                 LC_ALL="C")
    # One thread: what deltas are found, and with them the names of packs, depends on nothing then. In a file: the other
    # side of a clone does not see what the command line says.
    with open(os.path.join(work, ".gitconfig"), "w") as f:
        f.write("[pack]\nthreads = 1\n[gc]\nauto = 0\n[init]\ndefaultBranch = main\n")
    plain = environment(**fixed)
    shim = shimmed.variables | fixed

    def call(variables, where, *words):
        out, status = run([program, "-C", where, *words], variables, 1200 if LONG else 240)
        if status != 0:
            raise RuntimeError(f"git {' '.join(words)}: {status}, {out[-1000:]}")
        return out

    # Large files of the same pages in a few orders, some text, and a history over both.
    origin, chance = os.path.join(work, "origin"), random.Random(7)
    blocks = [chance.randbytes(64) * 64 for _ in range(16)]
    call(plain, work, "init", "-q", origin)
    for commit in range(24 if LONG else 8):
        for n in range(3):
            with open(os.path.join(origin, f"large{n}"), "wb") as f:
                for _ in range(1500):
                    f.write(chance.choice(blocks))
                f.write(b"%d" % commit)
        for n in range(20):
            with open(os.path.join(origin, f"text{n}"), "a") as f:
                f.write("".join(f"{chance.randrange(1000)} of {n}\n" for _ in range(50)))
        call(plain, origin, "add", "-A")
        call(plain, origin, "commit", "-q", "-m", f"{commit}")

    def state(where):
        packs = sorted(os.path.basename(p) for p in glob.glob(os.path.join(where, ".git/objects/pack/*.pack")))
        return {"objects": sorted(call(plain, where, "cat-file", "--batch-check", "--batch-all-objects").splitlines()),
                "references": call(plain, where, "show-ref", "--head"),
                "status": call(plain, where, "status", "--porcelain"), "packs": packs}

    states, said = {}, {}
    for kind, variables in (("plain", plain), ("merged", shim)):
        for round_ in range(4 if LONG and kind == "merged" else 1):
            copy = os.path.join(work, f"{kind}{round_}")
            said[kind] = call(variables, work, "clone", "-q", "--no-local", origin, copy)
            said[kind] += call(variables, copy, "fsck", "--full", "--strict")
            states[kind] = [state(copy)]
            said[kind] += call(variables, copy, "gc", "-q", "--aggressive", "--prune=now")
            said[kind] += call(variables, copy, "fsck", "--full", "--strict")
            # What was packed under the shim is read without it.
            said[kind] += call(plain, copy, "fsck", "--full", "--strict")
            states[kind].append(state(copy))
            said[kind] = "\n".join(line for line in said[kind].splitlines() if "%" not in line)
            for a, b in zip(states["plain"], states[kind]):
                errors += [f"{what} differ: {a[what]!s:.300} {b[what]!s:.300}" for what in a if a[what] != b[what]]
            if said[kind] != said["plain"]:
                errors.append(f"git says {said[kind]!r} and not {said['plain']!r}")
    if not states["plain"][1]["packs"]:
        errors.append("nothing was packed")
    print(f"git: {len(states['merged'][1]['objects'])} objects in {len(states['merged'][1]['packs'])} pack")
    shimmed.report("git", errors)


# --- node and SQLite -------------------------------------------------------------------------------------------------


def compare(name, command, variables, shimmed, seconds, errors, **more):
    """The same output without the shim and with it. Returns it."""
    expected, status = run(command, variables, seconds, **more)
    if status != 0 or not expected:
        raise RuntimeError(f"{name} does not work without the shim: {status}, {expected[-1000:]}")
    out, status = run(command, shimmed.variables, seconds, **more)
    if status != 0:
        errors.append(f"{name}: status {status}: {out[-1000:]}")
    elif out != expected:
        a, b = expected.splitlines(), out.splitlines()
        first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        errors.append(f"{name}: line {first} of its output differs: {a[first:first + 1]} {b[first:first + 1]}")
    return out


def node(work, errors):
    program = need("node")
    malloc = jemalloc()
    shimmed = Shimmed(work, malloc, KSMU_AUTO="1", KSMU_AUTO_MIN="64K")
    command = [program, "--expose-gc", os.path.join(HERE, "equal.js"), "200" if LONG else "14"]
    compare("node", command, environment(LD_PRELOAD=malloc), shimmed, 1800 if LONG else 200, errors)
    shimmed.report("node", errors)


def sqlite(work, errors):
    program = need("sqlite3")
    malloc = jemalloc()
    # Database pages of 64 KiB, whose insides are many equal pages; all in the cache.
    rows, rounds = 160, 80 if LONG else 5
    script = [".bail on", "PRAGMA page_size=65536;", "PRAGMA cache_size=-400000;", "PRAGMA temp_store=MEMORY;",
              "CREATE TABLE t(id INTEGER PRIMARY KEY, n INT, v TEXT);", "CREATE INDEX i ON t(n);",
              f"INSERT INTO t WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<{rows}) "
              "SELECT x, x%7, replace(hex(zeroblob(100000)), '00', char(97+x%5,97+x%5)) FROM c;"]
    for n in range(rounds):
        letters = 2 * chr(65 + n % 20)
        script += [f"UPDATE t SET v=replace(hex(zeroblob(100000)), '00', '{letters}'), n=n+1 WHERE id%5={n}%5;",
                   # Only read for a while: what is in the cache is still.
                   f"SELECT {n}, count(*), sum(length(v)), sum(n), sum(unicode(substr(v,5000))) FROM t;",
                   "SELECT count(DISTINCT substr(v,1,1000)), max(length(replace(v,'a',''))) FROM t;",
                   "SELECT count(*) FROM t a, t b WHERE a.v=b.v AND a.id<b.id;",
                   "BEGIN;", f"DELETE FROM t WHERE id%11={n}%11;", "PRAGMA integrity_check;", ".sha3sum", "ROLLBACK;",
                   f"UPDATE t SET v=v||'{n}' WHERE id%13={n}%13;", "PRAGMA integrity_check;"]
    script.append(".sha3sum")
    script.append("SELECT n, count(*), length(v), substr(v,1,9) FROM t GROUP BY n, v ORDER BY 1,2,3,4;")
    path = os.path.join(work, "script.sql")
    with open(path, "w") as f:
        f.write("\n".join(script) + "\n")
    shimmed = Shimmed(work, malloc, KSMU_AUTO="1", KSMU_AUTO_MIN="64K")
    command = [program, ":memory:", f".read {path}"]
    out = compare("SQLite", command, environment(LD_PRELOAD=malloc), shimmed, 1800 if LONG else 200, errors)
    if (good := out.splitlines().count("ok")) != 2 * rounds:
        errors.append(f"{good} checks of {2 * rounds} are ok: {out[-500:]}")
    shimmed.report("SQLite", errors)


# --- memcached and a JVM ---------------------------------------------------------------------------------------------


class Memcached:
    def __init__(self, program, path, variables):
        self.process = subprocess.Popen([program, "-s", path, "-m", "256", "-t", "2", "-u", "root"], env=variables,
                                        stdin=subprocess.DEVNULL)
        for _ in range(600):
            if os.path.exists(path) or self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")

    def send(self, verb, key, value):
        self.socket.sendall(b"%s %s 0 0 %d\r\n%s\r\n" % (verb, key, len(value), value))
        return self.file.readline()

    def get(self, key):
        self.socket.sendall(b"get %s\r\n" % key)
        line = self.file.readline()
        if line == b"END\r\n":
            return None
        value = self.file.read(int(line.split()[3]) + 2)[:-2]
        self.file.readline()
        return value

    def end(self):
        self.socket.close()
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "none after 60 s"


def memcached(work, errors):
    program = need("memcached")
    shimmed = Shimmed(work, jemalloc(), KSMU_AUTO="1", KSMU_AUTO_MIN="64K")
    server = Memcached(program, os.path.join(work, "memcached"), shimmed.variables)
    chance, known = random.Random(11), {}
    end = time.time() + (SECONDS if LONG else 12)
    reads = 0
    try:
        while time.time() < end and not errors:
            for _ in range(60):
                key = b"k%d" % chance.randrange(1200)
                filled = bytes([65 + chance.randrange(6)]) * chance.randrange(30_000, 60_000)
                if chance.random() < 0.8:
                    if server.send(b"set", key, filled) == b"STORED\r\n":
                        known[key] = filled
                    else:
                        errors.append(f"set {key} fails")
                elif key in known:
                    part = b"%d" % chance.randrange(10 ** 9)
                    if server.send(b"append", key, part) == b"STORED\r\n":
                        known[key] += part
            if len(known) > 1000:
                time.sleep(0.2)
            for key in chance.sample(sorted(known), min(len(known), 300)):
                value = server.get(key)
                reads += 1
                if value != known[key]:
                    errors.append(f"{key}: {'nothing' if value is None else f'{len(value)} other bytes'}")
        time.sleep(1.2)
        for key in known:
            if server.get(key) != known[key]:
                errors.append(f"{key} is another at the end")
        shimmed.report(f"memcached, {reads} values compared", errors)
    finally:
        status = server.end()
    if status not in (0, -signal.SIGTERM):
        errors.append(f"memcached ends with {status}")


def java(work, errors):
    program = need("java")
    modules = subprocess.run([program, "--list-modules"], capture_output=True, text=True, env=environment()).stdout
    if "jdk.compiler" not in modules:
        raise Skipped("this Java has no compiler (openjdk-17-jdk-headless)")
    source = os.path.join(HERE, "Equal.java")
    classes = os.path.join(work, "classes")
    command = [program, "-m", "jdk.compiler/com.sun.tools.javac.Main", "-d", classes, source]
    out, status = run(command, environment(), 300)
    if status != 0:
        raise RuntimeError(f"Equal.java is not compiled: {status}, {out[-1000:]}")
    for collector in ("Serial", "G1") + (("Parallel",) if LONG else ()):
        shimmed = Shimmed(work, KSMU_AUTO="1")
        command = [program, "-Xms192m", "-Xmx192m", f"-XX:+Use{collector}GC", "-XX:-UsePerfData",
                   f"-XX:ErrorFile={work}/hs_err", "-cp", classes, "Equal", "200" if LONG else "8"]
        compare(f"java, {collector}", command, environment(), shimmed, 1800 if LONG else 200, errors, cwd=work)
        shimmed.report(f"java, {collector}", errors)


GROUPS = {"testers": (stress_ng, stressapptest, memtester), "python": (python,), "git": (git,), "node": (node, sqlite),
          "servers": (memcached, java)}


def main():
    passed, failed, skipped = 0, [], []
    for program in GROUPS[sys.argv[1]]:
        errors, began = [], time.time()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            try:
                program(work, errors)
            except Skipped as why:
                skipped.append(f"{program.__name__}: {why}")
                continue
            except Exception:  # whatever it is, it is the test's failure, and the next program's turn
                errors.append(traceback.format_exc())
        print(f"{program.__name__}: {time.time() - began:.0f} s")
        for error in errors[:20]:
            print(f"{program.__name__}: {error}")
        passed += not errors
        failed += [program.__name__] if errors else []
    print(f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped")
    for why in skipped:
        print(f"skipped 1: {why}")
    for name in failed:
        print("FAILED", name)
    sys.exit(1 if failed else 0 if passed else 77)


main()
