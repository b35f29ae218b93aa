"""A broker, and members of it, as the tests of its operators have them."""
import json
import os
import signal
import subprocess
import sys
import time

from support import environment

PAGES = 1024  # of each member


class Checks:
    """Named ones, counted, and told as run_test reads it."""

    def __init__(self):
        self.passed, self.failed, self.skipped = [], [], []

    def check(self, name, good, detail=""):
        (self.passed if good else self.failed).append(name)
        if not good:
            print(f"{name}: {detail}", flush=True)

    def skip(self, name, why):
        self.skipped.append((name, why))

    def finish(self):
        for name, why in self.skipped:
            print(f"skipped: {name}: {why}")
        print(f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped")
        for name in self.failed:
            print("FAILED", name)
        sys.exit(1 if self.failed else 0)


class Broker:
    def __init__(self, ksmud, ctl, directory):
        os.chmod(directory, 0o755)
        self.program, self.ctl_path, self.socket = ksmud, ctl, directory + "/default.sock"
        self.start()

    def start(self):
        self.process = subprocess.Popen([self.program, "--socket", self.socket, "--domain", "shared", "--log", "info"], stdin=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, env=environment())
        end = time.monotonic() + 20
        while time.monotonic() < end and self.ctl("status")[0] != 0:
            time.sleep(0.05)

    def ctl(self, *arguments, before=None, place=True, limit=60):
        command = [self.ctl_path, *arguments] + (["--socket", self.socket] if place else [])
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment(), timeout=limit, preexec_fn=before)
        except subprocess.TimeoutExpired:
            return None, "", "it did not end"
        return done.returncode, done.stdout, done.stderr

    def json(self, *arguments):
        code, out, err = self.ctl(*arguments, "--json")
        try:
            return json.loads(out)
        except json.JSONDecodeError:
            return {"no JSON": out + err, "code": code}

    def value(self, name, *more):
        return self.ctl("get", name, *more)[1].strip()

    def end(self):
        self.process.terminate()
        self.process.wait(20)


MEMBER = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
pages = int(sys.argv[1])
at = libc.mmap(None, pages * 4096, 3, 0x22, -1, 0)
libc.madvise(at, pages * 4096, 15)
for i in range(pages):
    ctypes.memmove(at + i * 4096, bytes([i % 251 + 1, i // 251 + 1]) * 2048, 4096) if i % 8 else ctypes.memset(at + i * 4096, 0, 4096)
if libc.madvise(at, pages * 4096, 12):
    print("no", flush=True)
print(hex(at), flush=True)
for line in sys.stdin:
    good = all(ctypes.string_at(at + i * 4096, 4096) == (bytes([i % 251 + 1, i // 251 + 1]) * 2048 if i % 8 else bytes(4096)) for i in range(pages))
    print("good" if good else "bad", flush=True)
"""


class Member:
    def __init__(self, shim, where):
        self.process = subprocess.Popen([sys.executable, "-c", MEMBER, str(PAGES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment(LD_PRELOAD=shim, KSMU_BROKER=where, KSMU_SLEEP_MILLISECS="1", KSMU_CPU_LIMIT_PERCENT="50"))
        self.pid, self.start = self.process.pid, self.process.stdout.readline().strip()

    def is_right(self):
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() == "good"

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def wait_for(what, seconds=40):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.2)
    return False


def usable(shim):
    code = "import ctypes;k=ctypes.CDLL('libksmu.so.0');k.ksmu_last_error.restype=ctypes.c_char_p;print(k.ksmu_start(None,0) or '', k.ksmu_last_error().decode())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(LD_PRELOAD=shim, KSMU_BROKER="none", LD_LIBRARY_PATH=os.path.dirname(shim)),
                          capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 0 and not done.stdout.strip(), done.stdout.strip() or done.stderr.strip()
