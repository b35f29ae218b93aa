#!/usr/bin/env python3
"""redis-server with its jemalloc under the shim, merged automatically: redis_test.py SHIM

Values of 64 KiB in a few contents; BGSAVE (a fork of the whole heap) again and again while clients write into them and the
scanner runs flat out; then the dump is loaded by a server without the shim, and must have the digest of what was saved. 64 MB;
with KSMU_TEST_LONG=1, 500 MB.
"""
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

from support import counter, environment, finish, skip

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
KEYS, ROUNDS = (8000, 20) if LONG else (1000, 4)
BYTES = 64 * 1024


class Client:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")

    def __call__(self, *words):
        words = [w if isinstance(w, bytes) else str(w).encode() for w in words]
        self.socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
        return self.answer()

    def answer(self):
        line = self.file.readline()[:-2]
        kind, rest = line[:1], line[1:]
        if kind in b"+:":
            return rest
        if kind == b"-":
            raise RuntimeError(rest.decode())
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        return [self.answer() for _ in range(int(rest))]


class Server:
    """The multi-call binary of redis-tools: what it is, its first argument says."""

    def __init__(self, binary, work, name, **variables):
        self.path = os.path.join(work, name + ".sock")
        self.log = os.path.join(work, name + ".log")
        self.process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", self.path, "--dir", work, "--save", "", "--logfile", self.log,
             "--enable-debug-command", "yes", "--daemonize", "no", "--dbfilename", "dump.rdb"],
            executable=binary, env=environment(**variables), stdin=subprocess.DEVNULL)
        for _ in range(600):
            if os.path.exists(self.path):
                break
            if self.process.poll() is not None:
                raise RuntimeError(f"redis-server ended with {self.process.returncode}: {open(self.log).read()[-500:]}")
            time.sleep(0.05)
        self.client = Client(self.path)
        while True:
            try:
                self.client("PING")
                return
            except RuntimeError:  # loading its dump
                time.sleep(0.05)

    def end(self):
        self.process.terminate()
        self.process.wait(60)


def bench(path):
    """Requests a second and the 99th percentile in ms, of SET and GET."""
    tool = shutil.which("redis-benchmark")
    if not tool:
        return {}
    out = subprocess.run([tool, "-s", path, "-t", "set,get", "-n", "60000", "-d", "200", "-r", "10000", "--csv"],
                         capture_output=True, text=True, timeout=300).stdout
    return {m[0]: (float(m[1]), float(m[6])) for m in (re.findall(r'"([^"]*)"', line) for line in out.splitlines()[1:]) if len(m) > 6}


def main():
    shim = os.path.abspath(sys.argv[1])
    binary = shutil.which("redis-check-rdb")
    if not binary:
        skip("there is no redis-server or redis-check-rdb (redis-tools)")
    with tempfile.TemporaryDirectory() as work:
        stats = os.path.join(work, "stats")
        server = Server(binary, work, "merged", LD_PRELOAD=shim, KSMU_AUTO="1", KSMU_SLEEP_MILLISECS="0", KSMU_CPU_LIMIT_PERCENT="100",
                        KSMU_STATS=stats + ".%p:1")
        stats += f".{server.process.pid}"
        try:
            client = server.client
            for key in range(KEYS):
                client("SET", f"key:{key}", bytes([65 + key % 7]) * BYTES)

            for _ in range(600):
                if counter(stats, "pages_merged") > KEYS * 8:
                    break
                time.sleep(0.1)
            over = threading.Event()
            errors = []

            def write(seed):
                try:
                    chance, mine = random.Random(seed), Client(server.path)
                    while not over.is_set():
                        key = f"key:{chance.randrange(KEYS)}"
                        if chance.random() < 0.7:
                            mine("SETRANGE", key, chance.randrange(BYTES), bytes([chance.randrange(256)]))
                        elif chance.random() < 0.7:
                            mine("SET", key, bytes([65 + chance.randrange(7)]) * BYTES)
                        else:
                            mine("APPEND", key, "x" * chance.randrange(10000))
                        if chance.random() < 0.02:
                            time.sleep(0.01)
                except Exception as error:  # noqa: a thread's failure is the test's
                    errors.append(repr(error))

            for round_ in range(ROUNDS):
                over.clear()
                writers = [threading.Thread(target=write, args=(round_ * 10 + i,)) for i in range(3)]
                for writer in writers:
                    writer.start()
                time.sleep(1)
                client("BGSAVE")  # beside the writers: a point in time that nobody can name
                while b"rdb_bgsave_in_progress:1" in client("INFO", "persistence"):
                    time.sleep(0.02)
                over.set()
                for writer in writers:
                    writer.join()
                if b"rdb_last_bgsave_status:ok" not in client("INFO", "persistence"):
                    errors.append("a BGSAVE failed")
                # And one that can be named.
                digest = client("DEBUG", "DIGEST")
                client("BGSAVE")
                while b"rdb_bgsave_in_progress:1" in client("INFO", "persistence"):
                    time.sleep(0.02)
                again = Server(binary, work, f"plain{round_}")
                try:
                    if again.client("DEBUG", "DIGEST") != digest:
                        errors.append(f"round {round_}: the dump is not what was saved")
                    if round_ == ROUNDS - 1:
                        plain, merged = bench(again.path), bench(server.path)
                        for name in plain:
                            if name in merged:
                                print(f"{name}: {merged[name][0] / plain[name][0]:.2f} of the requests, p99 {merged[name][1]} ms beside {plain[name][1]} ms")
                finally:
                    again.end()
            time.sleep(1.5)
            merged, broken = counter(stats, "pages_merged_total"), counter(stats, "cow_breaks")
            print(f"merged {merged}, broken {broken}, sharing {counter(stats, 'pages_sharing')} pages, gate p99 {counter(stats, 'gate_p99_us')} us")
            if merged < 1000 or broken < 100:
                errors.append(f"merged {merged} and broken {broken} pages only")
        finally:
            server.end()
        finish("redis", errors)


main()
