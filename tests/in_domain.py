#!/usr/bin/env python3
"""Runs a program whose processes join a broker's domain, and looks at the broker meanwhile and afterwards.

  in_domain.py KSMUD [--also N] [--excuse REGEX] -- PROGRAM [ARG...]

A broker of its own is started for it; KSMU_BROKER says where. --also N: so many more of the same program run beside it, in the
same domain; what they print is shown where they fail. --excuse REGEX: for programs that print a line that begins with FAILED for
each failure, and exit with 1: no failure where all such lines match. For what docs/limits.md has about domains.

Exit status: the program's, where that is not 0 (128 and the signal's number where one has ended it). 1 where something is wrong
with the broker: it has not lived to see the end; it has dropped a member; ten seconds after the end there is something left in
it; nobody has joined it, or nothing was ever published, so that nothing has been tested.
"""
import argparse
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

EVERY = 0.05  # seconds from one look at the broker to the next
CLEAN_WITHIN = 10
DOMAIN = re.compile(r"^ksmud: domain \S+: members (\d+), frames (\d+), left (\d+), places (\d+),", re.M)
SUM = re.compile(r"^ksmud: \d+ domains, .*\n", re.M)
PR_SET_PDEATHSIG = 1


def with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)  # not what a test means that signals its group


class Broker:
    def __init__(self, ksmud, directory):
        self.socket, self.log_path = directory + "/default.sock", directory + "/log"
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen([ksmud, "--socket", self.socket, "--log", "info"], stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, preexec_fn=with_parent)
        self.asked_at = None  # how long the log was then
        self.most_members = self.most_frames = self.looks = 0

    def log(self, start=0):
        with open(self.log_path, errors="replace") as f:
            f.seek(start)
            return f.read()

    def wait_until_it_listens(self, seconds=10):
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s, contextlib.suppress(OSError):
                s.connect(self.socket)
                return True
            time.sleep(0.01)
        return False

    def look(self):
        """Hears what was asked, asks again. None while there is no answer: else members, frames, left, places, of all domains."""
        if self.process.poll() is not None:
            return None
        answer = None
        if self.asked_at is not None:
            said = self.log(self.asked_at)
            end = SUM.search(said)
            if not end:
                return None
            answer = [sum(column) for column in zip((0, 0, 0, 0), *(map(int, d) for d in DOMAIN.findall(said[:end.end()])))]
            self.most_members, self.most_frames = max(self.most_members, answer[0]), max(self.most_frames, answer[1])
            self.looks += 1
        self.asked_at = os.path.getsize(self.log_path)
        self.process.send_signal(signal.SIGUSR1)
        return answer

    def wait_until_clean(self, seconds):
        """Empty, or what is left."""
        end = time.monotonic() + seconds
        last = "it does not answer"
        while self.process.poll() is None and time.monotonic() < end:
            answer = self.look()
            if answer == [0, 0, 0, 0]:
                return ""
            if answer:
                last = ", ".join(f"{what} {n}" for what, n in zip(("members", "frames", "left", "places"), answer))
            time.sleep(EVERY)
        return last

    def trouble(self, clean):
        """Sentences about what is wrong with it."""
        log = self.log()
        joined = len(re.findall(r" joined$", log, re.M))
        # It does not say everything if there is much to be said.
        least = "at least " if re.search(r"^ksmud: \.\.\. and \d+ lines more$", log, re.M) else ""
        print(f"in_domain: {least}{joined} members joined, {self.most_members} at once; {self.most_frames} frames at most, as seen in "
              f"{self.looks} looks", flush=True)
        if self.process.poll() is not None:
            yield f"the broker has ended, with status {self.process.returncode}"
        elif clean:
            yield f"{CLEAN_WITHIN} s after the end there is left: {clean}"
        dropped = [line for line in log.splitlines() if "dropped:" in line]
        if dropped:
            yield f"{len(dropped)} members were dropped: " + "; ".join(dropped[:5])
        if not joined:
            yield "nobody has joined the domain: nothing was tested"
        elif not self.most_frames:
            yield "nothing was published in the domain: nothing was tested"

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def status_of(process):
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def judge(process, output, excuse, beside):
    """Its status, once it has ended; its output, where that was kept."""
    status = status_of(process)
    if not output:
        return status
    output.seek(0)
    lines = output.read().splitlines()
    failures = [line for line in lines if line.startswith("FAILED")]
    if status == 1 and excuse and failures and all(re.search(excuse, line) for line in failures):
        print(f"in_domain: excused: {'; '.join(failures)}")
        status = 0
    if not beside or status:
        print("".join(f"{'beside it| ' if beside else ''}{line}\n" for line in lines), end="")
    if beside and status:
        print(f"in_domain: one beside it: status {status}")
    sys.stdout.flush()
    return status


def run(broker, command, also, excuse, directory):
    environment = dict(os.environ, KSMU_BROKER=broker.socket)
    environment.pop("KSMU_DOMAIN", None)
    # Kept where it is to be looked at, or would mix with that of others.
    outputs = [open(f"{directory}/output{i}", "w+", errors="replace") if i or excuse else None for i in range(also + 1)]
    processes = []
    try:
        for output in outputs:
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output and subprocess.STDOUT,
                                              env=environment))
        while any(p.poll() is None for p in processes):
            broker.look()
            time.sleep(EVERY)
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()
    statuses = [judge(p, output, excuse, i > 0) for i, (p, output) in enumerate(zip(processes, outputs))]
    return next((status for status in statuses if status), 0)


def main():
    parser = argparse.ArgumentParser(usage="in_domain.py KSMUD [--also N] [--excuse REGEX] -- PROGRAM [ARG...]")
    parser.add_argument("ksmud")
    parser.add_argument("--also", type=int, default=0)
    parser.add_argument("--excuse")
    own = sys.argv[1:sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args = parser.parse_args(own)
    command = sys.argv[len(own) + 2:]
    if not command:
        parser.error("no program given")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="ksmu-in-domain-") as directory:
        broker = Broker(args.ksmud, directory)
        try:
            if not broker.wait_until_it_listens():
                print(f"in_domain: the broker does not start: {broker.log()}")
                return 1
            status = run(broker, command, args.also, args.excuse, directory)
            if status == 77:
                return status  # nothing of it is possible here
            trouble = list(broker.trouble(broker.wait_until_clean(CLEAN_WITHIN)))
            for sentence in trouble:
                print(f"in_domain: FAILED: {sentence}", flush=True)
            return status or (1 if trouble else 0)
        finally:
            broker.end()


sys.exit(main())
