#!/usr/bin/env python3
"""ksmuctl as the operator of a broker: what it shows, what it sets, and what it says to bad input.

  control_test.py alone KSMUD KSMUCTL            a broker without members
  control_test.py members KSMUD KSMUCTL SHIM     two members, under the shim
"""
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "preload"))
from control_support import PAGES, Broker, Checks, Member, usable, wait_for  # noqa: E402
from support import environment, skip  # noqa: E402

OTHER_USER = 12345
checks = Checks()
check = checks.check


def expect(broker, name, arguments, code, said="", **more):
    got = broker.ctl(*arguments, **more)
    check(name, got[0] == code and re.search(said, got[2] if code else got[1]), f"{arguments}: {got}, not {code} {said}")


def alone(ksmud, ctl):
    with tempfile.TemporaryDirectory(prefix="ksmu-control-") as directory:
        broker = Broker(ksmud, ctl, directory)
        try:
            bad_input(broker)
            expect(broker, "status without members", ["status"], 0, "0 members")
            expect(broker, "no members", ["members", "--json"], 0, r"^\[\]$")
            for value in ("5", "+6", "7\n"):
                expect(broker, f"set to {value!r}", ["set", "sleep_millisecs", value], 0)
                check(f"get after {value!r}", broker.value("sleep_millisecs") == str(int(value)), broker.value("sleep_millisecs"))
            expect(broker, "set by NAME=VALUE", ["set", "smart_scan=0"], 0)
            check("kept without members", broker.json("status")[0]["set"] == ["sleep_millisecs", "smart_scan"], broker.json("status"))
            check("a preset", broker.value("cpu_limit_percent") == "10")
            # KSM's advisor: while it is on, pages_to_scan is its own; and whatever the mode, it begins anew.
            expect(broker, "pages_to_scan", ["set", "pages_to_scan", "500"], 0)
            expect(broker, "scan-time", ["set", "advisor_mode", "scan-time"], 0)
            check("it begins anew", broker.value("pages_to_scan") == "0")
            expect(broker, "the advisor's", ["set", "pages_to_scan", "500"], 1, "advisor")
            expect(broker, "none", ["set", "advisor_mode", "none\n"], 0)
            expect(broker, "pages_to_scan again", ["set", "pages_to_scan", "600"], 0)
            # The other socket is another domain.
            expect(broker, "a named domain", ["get", "sleep_millisecs", "--domain", "shared"], 0, "^20$")
            check("its name", broker.json("status", "--domain", "shared")[0]["domain"] == "shared")
            expect(broker, "top", ["top", "--count", "2", "--interval", "1"], 0, "(?s)domain.*domain")
            two_at_once(broker)
            permission(broker)
            rude(broker)
            check("it lives", broker.process.poll() is None)
        finally:
            broker.end()
        expect(broker, "no broker", ["status"], 3, "no broker listens")


def bad_input(broker):
    for text in ("", "x", "1x", "x1", " 1", "1 ", "1\n\n", "\n", "1\r\n", "0x1", "1.0", "--", "+", "-", "+-1", "99999999999999999999", "-1", "-99999999999999999999"):
        for command in (["set", "run"], ["run"], ["set", "sleep_millisecs"]):
            expect(broker, f"{command} {text!r}", [*command, text], 2)
    for name, value in (("run", "3"), ("smart_scan", "2"), ("max_page_sharing", "1"), ("cpu_limit_percent", "101"),
                        ("sleep_millisecs", "9223372036854775807"), ("thp_min_duplicates", "513")):
        expect(broker, f"{name} {value}", ["set", name, value], 1, "at the least")
    expect(broker, "merge_across_nodes as it is", ["set", "merge_across_nodes", "1"], 0)
    expect(broker, "merge_across_nodes", ["set", "merge_across_nodes", "0"], 0)
    check("nodes are kept apart", broker.value("merge_across_nodes") == "0")
    expect(broker, "merge_across_nodes as it was", ["set", "merge_across_nodes", "1"], 0)
    expect(broker, "a counter", ["set", "pages_shared", "1"], 4, "counter")
    expect(broker, "no such tunable", ["set", "nonsense", "1"], 5)
    expect(broker, "nothing", ["set", "", "1"], 5)
    expect(broker, "no such name", ["get", "nonsense"], 5)
    for arguments in (["set"], ["set", "run"], ["set", "run", "1", "2"], ["run"], ["run", "1", "1"], ["get", "run", "run"], ["get", ""], ["status", "x"],
                      ["members", "x"], ["explain"], ["explain", "0"], ["explain", "x"], ["explain", "-3"], ["explain", "99999999999"], ["unmerge"],
                      ["unmerge", "1", "2"], ["status", "--nonsense"], ["status", "--user", "x"], ["status", "--user", "4294967296"], ["top", "--interval", "0"],
                      ["top", "--count", "x"], ["get", "run", "--pid", "x"], ["status", "--domain", "a/b"]):
        expect(broker, f"usage: {arguments}", arguments, 2)
    expect(broker, "a value is missing", ["status", "--socket"], 2, place=False)
    expect(broker, "a path that is too long", ["status", "--socket", "/" + "x" * 300], 2, place=False)
    expect(broker, "nobody there", ["status", "--socket", "/nonexistent/sock"], 3, place=False)
    expect(broker, "a file", ["status", "--socket", "/etc/passwd"], 3, place=False)
    expect(broker, "no such process", ["explain", str(os.getpid())], 5)
    expect(broker, "no such process to unmerge", ["unmerge", str(os.getpid())], 5)
    expect(broker, "no such process to set", ["set", "run", "1", "--pid", str(os.getpid())], 5)
    expect(broker, "no such user", ["get", "run", "--user", "4294967290"], 5)
    check("an error as JSON", broker.json("get", "nonsense").get("status") == 5, broker.json("get", "nonsense"))
    for command in ("status", "members", "get", "set", "run", "unmerge", "explain", "top"):
        expect(broker, f"{command} --help", [command, "--help"], 0, "exit status", place=False)


def two_at_once(broker):
    command = [broker.ctl_path, "set", "remerge_seconds"]
    both = [subprocess.Popen([*command, str(value), "--socket", broker.socket], env=environment(), stderr=subprocess.PIPE) for value in list(range(50, 62)) * 2]
    codes = [p.wait(60) for p in both]
    for p in both:
        p.stderr.close()
    # There are no more than 16 connections of a user; who comes in vain is told so.
    check("many at once", set(codes) <= {0, 1} and codes.count(0) >= 8, codes)
    check("one of them has won", 50 <= int(broker.value("remerge_seconds") or 0) < 62, broker.value("remerge_seconds"))


def permission(broker):
    if os.geteuid() != 0:
        checks.skip("permission", "needs root, to be somebody else")
        return

    def somebody():
        os.setgroups([])
        os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
        os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)

    probe = subprocess.run([broker.ctl_path, "--version"], preexec_fn=somebody, capture_output=True, check=False)
    if probe.returncode:
        checks.skip("permission", "the build is not readable by others")
        return
    expect(broker, "another user looks at its own", ["status", "--json"], 0, f'"domain": "default/{OTHER_USER}"', before=somebody)
    expect(broker, "and not at root's", ["get", "run", "--user", "0"], 5, before=somebody)
    expect(broker, "and sets nothing", ["set", "run", "0"], 4, "not permitted", before=somebody)
    expect(broker, "nor runs", ["run", "2"], 4, "not permitted", before=somebody)
    check("nothing was set", broker.value("run") == "1")
    expect(broker, "a socket that is not for it", ["status", "--domain", "shared"], 4, "may not connect", before=somebody)


def rude(broker):
    """Operators that speak the protocol as nobody does: dropped, and nobody else notices."""
    def packet(kind, number, body=b"", count=1, length=None, reserved=0):
        return struct.pack("=IHHII", 16 + len(body) if length is None else length, kind, count, number, reserved) + body

    hello = packet(128, 1, struct.pack("=II", 2, 0))
    cases = {"a question first": [packet(129, 1, bytes(8))], "hello twice": [hello, hello], "an unknown kind": [hello, packet(150, 2, bytes(8))],
             "a broker's kind": [packet(192, 1, bytes(40))], "a short one": [hello[:-1]], "a wrong length": [packet(128, 1, struct.pack("=II", 1, 0), length=20)],
             "no number": [packet(128, 0, struct.pack("=II", 1, 0))], "reserved bits": [packet(128, 1, struct.pack("=II", 1, 1))],
             "two entries": [packet(128, 1, bytes(16), count=2)], "a member's question": [hello, packet(2, 3, bytes(4))],
             "a tunable out of range": [hello, packet(131, 2, struct.pack("=IIIIq", 1, 0, 32, 0, 1))],
             "another version": [packet(128, 1, struct.pack("=II", 77, 0))]}
    for name, packets in cases.items():
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.settimeout(10)
            s.connect(broker.socket)
            try:
                for one in packets:
                    s.send(one)
                while s.recv(65536):
                    pass
                good = True
            except (BrokenPipeError, ConnectionResetError):
                good = True
            except socket.timeout:
                good = False
        check(f"dropped: {name}", good)
    # One that asks and asks, and reads nothing.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(broker.socket)
        s.setblocking(False)
        s.send(hello)
        try:
            for i in range(100000):
                s.send(packet(129, i + 2, bytes(8)))
        except OSError:
            pass
        expect(broker, "beside one that reads nothing", ["status"], 0)


# --- members -----------------------------------------------------------------------------------------------------------

def members(ksmud, ctl, shim):
    good, why = usable(shim)
    if not good:
        skip(f"the library cannot start here: {why}")
    with tempfile.TemporaryDirectory(prefix="ksmu-control-") as directory:
        broker = Broker(ksmud, ctl, directory)
        both = []
        try:
            both = [Member(shim, broker.socket) for _ in range(2)]
            with_members(broker, both, shim)
        finally:
            for member in both:
                member.end()
            broker.end()


def merged(broker):
    return int(broker.value("pages_merged") or -1)


def with_members(broker, both, shim):
    a, b = both
    check("two members", wait_for(lambda: len(broker.json("members")) == 2), broker.json("members"))
    check("merged", wait_for(lambda: merged(broker) >= 2 * PAGES * 7 // 8), broker.ctl("status"))
    check("zero", wait_for(lambda: int(broker.value("ksm_zero_pages")) >= 2 * PAGES // 8), broker.value("ksm_zero_pages"))
    status = broker.json("status")[0]
    check("saved", status["saved_bytes"] == (status["counters"]["pages_merged"] - status["frames"] + status["counters"]["ksm_zero_pages"]) * status["page_bytes"] > 0, status)
    # By KSM's names, of the domain: each frame is there once.
    def agrees():
        now = broker.json("status")[0]
        return [broker.value("pages_shared"), broker.value("pages_sharing")] == [str(now["frames"]), str(now["counters"]["pages_merged"] - now["frames"])]
    check("get of the domain", wait_for(agrees), broker.ctl("get"))
    check("by whom", sorted(m["pid"] for m in status["members"]) == sorted([a.pid, b.pid]), status)
    text = broker.ctl("status")[1]
    check("for people", all(word in text for word in ("saved", "cost", "by whom", "not merged", str(a.pid))), text)
    counters = broker.json("members")[0]["counters"]
    check("the balance", counters["pages_tracked"] == counters["pages_merged"] + counters["ksm_zero_pages"] + counters["pages_unshared"] + counters["pages_volatile"] +
          sum(n for name, n in counters.items() if name.startswith("unmerged_")), counters)
    explained = broker.json("explain", str(a.pid))
    mine = [r for r in explained.get("regions", []) if r["start"] <= int(a.start, 16) < r["end"]]
    check("explain", len(mine) == 1 and mine[0]["pages_merged"] >= PAGES * 7 // 8 and mine[0]["pages_zero"] >= PAGES // 8, explained)
    expect(broker, "explain for people", ["explain", str(a.pid)], 0, "merged")

    # Set for all, and for those to come.
    expect(broker, "set for all", ["set", "sleep_millisecs", "3"], 0)
    check("it is in all of them", wait_for(lambda: [m["tunables"]["sleep_millisecs"] for m in broker.json("members")] == [3, 3]), broker.json("members"))
    expect(broker, "set for one", ["set", "sleep_millisecs", "4", "--pid", str(b.pid)], 0)
    check("it is in one", wait_for(lambda: sorted(m["tunables"]["sleep_millisecs"] for m in broker.json("members")) == [3, 4]), broker.json("members"))
    check("get of one", broker.value("sleep_millisecs", "--pid", str(b.pid)) == "4" and broker.value("sleep_millisecs") == "3")
    c = Member(shim, broker.socket)
    try:
        check("one that comes later", wait_for(lambda: broker.value("sleep_millisecs", "--pid", str(c.pid)) == "3"), broker.json("members"))
    finally:
        c.end()
    check("it has gone", wait_for(lambda: len(broker.json("members")) == 2), broker.json("members"))

    expect(broker, "max_page_sharing while shared", ["set", "max_page_sharing", "8"], 1, "while pages are shared")
    # Everything back, in all; nothing merged again meanwhile.
    # Also of those that have said nothing for a while, since nothing has changed.
    expect(broker, "at rest", ["run", "0"], 0)
    time.sleep(7)
    expect(broker, "run 2", ["run", "2"], 0)
    check("nothing is merged when it returns", merged(broker) == 0, broker.ctl("status"))
    check("regions stay", int(broker.value("regions")) >= 2, broker.value("regions"))
    check("bytes", a.is_right() and b.is_right())
    check("no frames", wait_for(lambda: broker.json("status")[0]["frames"] == 0, 20), broker.ctl("status"))
    expect(broker, "max_page_sharing", ["set", "max_page_sharing", "8"], 0)
    expect(broker, "run 1", ["run", "1"], 0)
    check("merged again", wait_for(lambda: merged(broker) >= PAGES, 60), broker.ctl("status"))
    # One alone.
    expect(broker, "unmerge", ["unmerge", str(a.pid)], 0)
    check("of one", broker.value("pages_merged", "--pid", str(a.pid)) == "0", broker.value("pages_merged", "--pid", str(a.pid)))
    check("the other goes on", broker.value("run", "--pid", str(b.pid)) == "1")
    expect(broker, "run 0", ["run", "0"], 0)
    check("run is 0 in both", wait_for(lambda: [m["tunables"]["run"] for m in broker.json("members")] == [0, 0]), broker.json("members"))
    expect(broker, "still heard with run 0", ["set", "smart_scan", "0"], 0)

    # One that does not answer is said to be silent, after a second, and holds up nobody else.
    a.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    expect(broker, "set with a stopped member", ["set", "sleep_millisecs", "9"], 6, f"{a.pid}: does not answer")
    check("in time", time.monotonic() - begun < 8, time.monotonic() - begun)
    expect(broker, "explain of a stopped member", ["explain", str(a.pid)], 6, "does not answer")
    expect(broker, "explain of the other", ["explain", str(b.pid)], 0)
    a.process.send_signal(signal.SIGCONT)
    check("it hears of it later", wait_for(lambda: broker.value("sleep_millisecs", "--pid", str(a.pid)) == "9"), broker.json("members"))
    expect(broker, "explain, now that it goes on", ["explain", str(a.pid)], 0)
    check("bytes at the end", a.is_right() and b.is_right())

    # What the domain has set goes with it: a broker that is killed leaves nobody behind who merges nothing, or at another's pace.
    broker.process.kill()
    broker.process.wait()
    broker.start()
    check("they join the next one", wait_for(lambda: len(broker.json("members")) == 2), broker.json("members"))
    own = {"run": 1, "sleep_millisecs": 1, "smart_scan": 1, "max_page_sharing": 256}
    check("with what they had before", wait_for(lambda: all(m["tunables"][name] == value for m in broker.json("members") for name, value in own.items())), broker.json("members"))
    check("and merge", wait_for(lambda: merged(broker) >= PAGES, 60), broker.ctl("status"))
    check("bytes under another broker", a.is_right() and b.is_right())


def main():
    what, *rest = sys.argv[1:]
    {"alone": alone, "members": members}[what](*rest)
    checks.finish()


main()
