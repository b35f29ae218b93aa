#!/usr/bin/env python3
"""ksmuctl metrics: both forms of text, held to their grammars; numbers beside those of ksmuctl status; names beside docs/metrics.md and the
dashboard; files for node_exporter; requests of HTTP.

  metrics_test.py alone KSMUD KSMUCTL            a broker without members
  metrics_test.py members KSMUD KSMUCTL SHIM     two members, under the shim
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "preload"))
from control_support import PAGES, Broker, Checks, Member, usable, wait_for  # noqa: E402
from support import environment, skip, tool  # noqa: E402

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OPEN, PLAIN = "application/openmetrics-text; version=1.0.0; charset=utf-8", "text/plain; version=0.0.4; charset=utf-8"
# What a Prometheus of today sends.
SCRAPE = ("GET /metrics HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Prometheus/2.42.0\r\nAccept: application/openmetrics-text;version=1.0.0,"
          "application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\nAccept-Encoding: gzip\r\n\r\n")
LABEL = r'([a-z_]+)="((?:[^"\\\n]|\\[\\"n])*)"'
SAMPLE = re.compile(rf"(ksmu_[a-z0-9_]+)(?:\{{({LABEL}(?:,{LABEL})*)\}})? (-?[0-9]+(?:\.[0-9]+)?)")
UNITS = ("bytes", "seconds", "ratio")
OTHER_USER = 12345
checks = Checks()
check = checks.check
ONE_UP = "# HELP ksmu_up 1 if the broker answers, else 0.\n# TYPE ksmu_up gauge\nksmu_up {}\n"


class Text:
    """A scrape: families[name of the samples] = (type, help), values[name, labels] = number. What breaks the form's grammar is in `wrong`."""

    def __init__(self, text, is_open):
        self.families, self.values, self.wrong = {}, {}, []
        lines = text.split("\n")
        if lines.pop() != "":
            self.wrong.append("its last line does not end")
        if is_open and (not lines or lines.pop() != "# EOF"):
            self.wrong.append("no # EOF at its end")
        names, family, head = set(), None, {}
        for line in lines:
            meta = re.fullmatch(r"# (HELP|TYPE|UNIT) (ksmu_[a-z0-9_]+) (.+)", line)
            if meta:
                word, name, rest = meta.groups()
                if word == "HELP":
                    if name in names:
                        self.wrong.append(f"{name} comes twice")
                    names.add(name)
                    family, head = name, {}
                if name != family or word in head or head.get("samples"):
                    self.wrong.append(f"out of place: {line}")
                head[word] = rest
                if word == "UNIT" and (not is_open or rest not in UNITS or not name.endswith("_" + rest)):
                    self.wrong.append(f"a unit that it cannot have: {line}")
                continue
            sample = SAMPLE.fullmatch(line)
            kind = head.get("TYPE")
            suffix = {"counter": "_total", "info": "_info"}.get(kind, "") if is_open else ""
            if not sample or sample[1] != (family or "") + suffix:
                self.wrong.append(f"no sample of {family}: {line}")
                continue
            if kind not in ("gauge", "counter", "info") or not (is_open or kind != "info"):
                self.wrong.append(f"{family} is of type {kind}")
            if (kind == "counter") != sample[1].endswith("_total"):
                self.wrong.append(f"_total is for counters, and for them all: {line}")
            unit = next((u for u in UNITS if family.endswith("_" + u) or family.endswith(f"_{u}_total")), None)
            if is_open and unit != head.get("UNIT"):
                self.wrong.append(f"{family} has unit {head.get('UNIT')}")
            head["samples"] = True
            self.families[sample[1]] = (kind, head.get("HELP"))
            unescaped = {name: re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value) for name, value in re.findall(LABEL, sample[2] or "")}
            key = (sample[1], tuple(sorted(unescaped.items())))
            if key in self.values:
                self.wrong.append(f"twice: {line}")
            self.values[key] = float(sample[len(sample.groups())])

    def of(self, name, **labels):
        return self.values.get((name, tuple(sorted(labels.items()))))

    def labels(self, name):
        return [dict(labels) for n, labels in self.values if n == name]


def expect(broker, name, arguments, code, said="", **more):
    got = broker.ctl(*arguments, **more)
    check(name, got[0] == code and re.search(said, got[2] if code else got[1]), f"{arguments}: {got}, not {code} {said}")


def metrics(broker, *arguments, name="metrics", code=0):
    got, out, err = broker.ctl("metrics", *arguments)
    text = Text(out, True)
    check(f"{name}: OpenMetrics", got == code and not text.wrong, f"{got} {text.wrong} {err}")
    return text


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


# --- without members -----------------------------------------------------------------------------------------------------

def alone(ksmud, ctl):
    with tempfile.TemporaryDirectory(prefix="ksmu-metrics-") as directory:
        broker = Broker(ksmud, ctl, directory)
        try:
            bad_options(broker, directory)
            text = metrics(broker)
            check("it is up", text.of("ksmu_up") == 1 and text.of("ksmu_frames_limit_bytes") > 0, text.values)
            text = metrics(broker, "--domain", "shared")
            check("one domain", {l["domain"] for l in text.labels("ksmu_saved_bytes")} == {"shared"}, text.values)
            text = metrics(broker, "--user", "4294967290", name="a domain that is not there", code=5)
            check("the broker is up without it", text.of("ksmu_up") == 1 and set(text.families) == {"ksmu_up", "ksmu_frames_limit_bytes"}, text.values)
            others(broker)
            requests(broker)
            textfile(broker, directory)
            slow(broker)
            repeated(broker, ksmud, directory)
        finally:
            if broker.process.poll() is None:
                broker.end()
        got, out, err = broker.ctl("metrics")
        check("no broker", got == 3 and out == ONE_UP.format(0) + "# EOF\n" and "no broker listens" in err, (got, out, err))
        got, out, err = broker.ctl("metrics", "--textfile", directory + "/none.prom")
        check("no broker, to a file", got == 3 and read(directory + "/none.prom") == ONE_UP.format(0), (got, err))
        status, headers, body = ask(broker, SCRAPE)
        check("no broker, over HTTP", status == 200 and body == ONE_UP.format(0) + "# EOF\n", (status, headers, body))


def bad_options(broker, directory):
    path = directory + "/bad.prom"
    for arguments in (["x"], ["--nonsense"], ["--textfile"], ["--textfile", ""], ["--textfile", directory + "/"], ["--every", "5"], ["--every"],
                      ["--textfile", path, "--every", "0"], ["--textfile", path, "--every", "-1"], ["--textfile", path, "--every", "86401"],
                      ["--textfile", path, "--every", "1.5"], ["--textfile", path, "--every", "x"], ["--textfile", path, "--http"], ["--http", "--every", "1"],
                      ["--json"], ["--user", "x"], ["--domain", "a/b"], ["--domain", ""]):
        expect(broker, f"usage: {arguments}", ["metrics", *arguments], 2)
    check("nothing was written", not os.path.exists(path))
    got, out, err = broker.ctl("metrics", "--socket", "/" + "x" * 300, place=False)
    check("a path that is too long", got == 2 and not out, (got, out, err))
    expect(broker, "--help", ["metrics", "--help"], 0, "(?s)--members.*--textfile PATH.*--every SECONDS.*--http.*exit status", place=False)


def others(broker):
    if os.geteuid() != 0:
        checks.skip("another user", "needs root, to be somebody else")
        return

    def somebody():
        os.setgroups([])
        os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
        os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)

    try:
        probe = subprocess.run([broker.ctl_path, "--version"], preexec_fn=somebody, capture_output=True, check=False).returncode
    except PermissionError:
        probe = 1
    if probe:
        checks.skip("another user", "the build is not readable by others")
        return
    got, out, err = broker.ctl("metrics", before=somebody)
    text = Text(out, True)
    check("another user is shown its own", got == 0 and {l["domain"] for l in text.labels("ksmu_saved_bytes")} == {f"default/{OTHER_USER}"}, (got, out, err))


# --- HTTP ----------------------------------------------------------------------------------------------------------------

def command(broker, *arguments):
    return [broker.ctl_path, "metrics", *arguments, "--socket", broker.socket]


def split(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    found = re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z ]+", first)
    good = found and headers.get("content-length") == str(len(body)) and headers.get("connection") == "close"
    return int(found[1]) if good else answer, headers, body.decode()


def ask(broker, request, *arguments, keep_open=True, parts=1):
    """As systemd does it: one socket for both directions. The client closes nothing until it has its answer."""
    request = request.encode("latin-1") if isinstance(request, str) else request
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen(command(broker, "--http", *arguments), stdin=theirs, stdout=theirs, env=environment())
        theirs.close()
        ours.settimeout(20)
        answer = b""
        try:
            for i in range(parts):
                ours.sendall(request[len(request) * i // parts:len(request) * (i + 1) // parts])
                time.sleep(0.02 if parts > 1 else 0)
            if not keep_open:
                ours.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            while data := ours.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        except socket.timeout:
            process.kill()
        code = process.wait(20)
    status, headers, body = split(answer)
    return (status if code == 0 else f"ended with {code}", headers, body)


def requests(broker):
    def answers(name, request, want, kind=None, **more):
        status, headers, body = ask(broker, request, **more)
        check(f"HTTP: {name}", status == want and (kind is None or headers.get("content-type") == kind), (status, headers, body[:200]))
        return headers, body

    def get(path="/metrics", version="1.1", **headers):
        return f"GET {path} HTTP/{version}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"

    _, body = answers("as Prometheus asks", SCRAPE, 200, OPEN)
    check("HTTP: OpenMetrics", not Text(body, True).wrong and Text(body, True).of("ksmu_up") == 1, Text(body, True).wrong)
    _, body = answers("without Accept", get(Host="x"), 200, PLAIN)
    check("HTTP: the text format", not Text(body, False).wrong and Text(body, False).of("ksmu_up") == 1, Text(body, False).wrong)
    for accept, kind in (("*/*", PLAIN), ("text/plain", PLAIN), ("application/openmetrics-text", OPEN), ("Application/OpenMetrics-Text ; Version=1", PLAIN),
                         ("application/openmetrics-text;q=0", PLAIN), ("application/openmetrics-text;q=0.3,text/plain;q=0.9", PLAIN),
                         ("text/plain;q=0.2, application/openmetrics-text;version=0.0.1;q=0.8", OPEN), ("application/openmetrics-text;version=2.0.0", PLAIN),
                         ("text/html,application/openmetrics-text;q=nonsense", PLAIN), (",;=,;q", PLAIN)):
        answers(f"Accept: {accept}", get(Accept=accept), 200, kind)
    answers("/", get("/"), 200)
    answers("HTTP/1.0", get(version="1.0"), 200)
    answers("a query", get("/metrics?x=/y"), 200)
    answers("an absolute target", get("http://localhost:9946/metrics"), 200)
    answers("bare newlines", "GET /metrics HTTP/1.1\nHost: x\n\n", 200)
    answers("byte by byte", SCRAPE, 200, OPEN, parts=len(SCRAPE))
    answers("one that closes its side", get(), 200, keep_open=False)
    for path in ("/metric", "/metrics/", "/metricsx", "/../metrics", "//", "/favicon.ico", "http://localhost/other"):
        answers(f"{path} is not there", get(path), 404)
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "get", "BREW"):
        headers, _ = answers(f"method {method}", f"{method} /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405)
        check(f"HTTP: Allow, {method}", headers.get("allow") == "GET", headers)
    answers("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
    for name, request in (("nothing", ""), ("half a line", "GET /met"), ("headers that break off", "GET / HTTP/1.1\r\nHost: x\r\n"), ("an empty line", "\r\n\r\n")):
        answers(name, request, 400, keep_open=False)
    # These are told at once, while they could still send more.
    for name, request in (("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), ("zeros", bytes(20)), ("words", "hello\r\n\r\n"), ("HTTP/0.9", "GET /\r\n\r\n"),
                          ("no version", "GET /metrics X\r\n\r\n"), ("an odd version", "GET / HTTP/1.11\r\n\r\n"), ("two targets", "GET / / HTTP/1.1\r\n\r\n"),
                          ("no target", "GET  HTTP/1.1\r\n\r\n"), ("no path", get("metrics")), ("a method that is none", "G(T / HTTP/1.1\r\n\r\n"),
                          ("a header without a colon", "GET / HTTP/1.1\r\nHost\r\n\r\n"), ("a header without a name", "GET / HTTP/1.1\r\n: x\r\n\r\n"),
                          ("a space before the colon", "GET / HTTP/1.1\r\nHost : x\r\n\r\n"), ("a folded header", "GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n"),
                          ("a carriage return", "GET / HTTP/1.1\r\nA: b\rc\r\n\r\n")):
        begun = time.monotonic()
        answers(name, request, 400)
        check(f"HTTP: at once, {name}", time.monotonic() - begun < 3, time.monotonic() - begun)
    answers("long, and within bounds", get(X="y" * 8000), 200)
    answers("too long a header", get(X="y" * 100_000), 431)
    answers("too long a line", "GET /" + "x" * 100_000, 431)


def slow(broker):
    """Those that take time, at the same time; and a broker that is stopped."""
    ours, theirs = socket.socketpair()
    begun = time.monotonic()
    with ours:
        process = subprocess.Popen(command(broker, "--http"), stdin=theirs, stdout=theirs, env=environment())
        theirs.close()
        ours.sendall(b"GET /metrics HTTP/1.1\r\nHost")
        broker.process.send_signal(signal.SIGSTOP)
        try:
            status, _, body = ask(broker, SCRAPE)
        finally:
            broker.process.send_signal(signal.SIGCONT)
        check("a broker that does not answer, over HTTP", status == 200 and body == ONE_UP.format(0) + "# EOF\n" and time.monotonic() - begun < 9.5, (status, body))
        ours.settimeout(20)
        answer = b""
        while data := ours.recv(65536):
            answer += data
        code, took = process.wait(20), time.monotonic() - begun
    check("HTTP: one that does not end", split(answer)[0] == 408 and code == 0 and 3 < took < 9.5, (answer, code, took))


# --- files ---------------------------------------------------------------------------------------------------------------

def textfile(broker, directory):
    path = directory + "/ksmu.prom"
    os.mkdir(directory + "/a.prom")
    before = set(os.listdir(directory))
    expect(broker, "a directory is in its place", ["metrics", "--textfile", directory + "/a.prom"], 1, "a.prom")
    expect(broker, "there is no such directory", ["metrics", "--textfile", directory + "/no/ksmu.prom"], 1, "no/ksmu.prom")
    check("nothing is left of it", set(os.listdir(directory)) == before, os.listdir(directory))
    expect(broker, "into a file", ["metrics", "--textfile", path], 0, "^$", before=lambda: os.umask(0o077))
    text = Text(read(path), False)
    check("the text format", not text.wrong and text.of("ksmu_up") == 1 and "# UNIT" not in read(path) and "# EOF" not in read(path), text.wrong)
    check("readable by all", os.stat(path).st_mode & 0o7777 == 0o644, oct(os.stat(path).st_mode))
    # Who has opened the old one reads it to its end, whatever comes in its place.
    with open(path, encoding="utf-8") as old:
        expect(broker, "into it again", ["metrics", "--textfile", path, "--domain", "shared"], 0)
        check("the old one is whole", not Text(old.read(), False).wrong and os.fstat(old.fileno()).st_ino != os.stat(path).st_ino)
    check("the new one is there", {l["domain"] for l in Text(read(path), False).labels("ksmu_saved_bytes")} == {"shared"}, read(path))
    check("nothing is left beside it", set(os.listdir(directory)) == before | {"ksmu.prom"}, os.listdir(directory))
    here = os.getcwd()
    os.chdir(directory)
    try:
        expect(broker, "a relative path", ["metrics", "--textfile", "here.prom"], 0)
        check("it is there", Text(read("here.prom"), False).of("ksmu_up") == 1)
    finally:
        os.chdir(here)


def repeated(broker, ksmud, directory):
    path = directory + "/again.prom"
    before = set(os.listdir(directory))

    def up():
        return Text(read(path), False).of("ksmu_up") if os.path.exists(path) else None

    def start(*more):
        return subprocess.Popen(command(broker, "--textfile", path, "--every", "1", *more), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())

    process = start()
    try:
        check("every: it is written", wait_for(lambda: up() == 1), process.poll())
        first = os.stat(path).st_mtime_ns
        check("every: and again", wait_for(lambda: os.stat(path).st_mtime_ns != first))
        broker.end()
        check("every: the broker has gone", wait_for(lambda: up() == 0) and read(path) == ONE_UP.format(0), read(path))
        first = os.stat(path).st_mtime_ns
        check("every: and that again", wait_for(lambda: os.stat(path).st_mtime_ns != first))
        broker = Broker(ksmud, broker.ctl_path, directory)
        try:
            check("every: there is another one", wait_for(lambda: up() == 1), read(path))
            process.terminate()
            _, said = process.communicate(timeout=20)
            check("every: it ends", process.returncode == 0, (process.returncode, said))
            check("every: it says once that there is no broker", said.count("\n") == 1 and "no broker listens" in said, said)
            check("every: nothing is left", set(os.listdir(directory)) <= before | {"default.sock", "shared.sock"}, os.listdir(directory))
            expect(broker, "every: bad from the start", ["metrics", "--textfile", directory + "/no/x.prom", "--every", "1"], 1, "no/x.prom")
        finally:
            broker.end()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# --- with members --------------------------------------------------------------------------------------------------------

def pages(name):
    return lambda d: d["counters"][name] * d["page_bytes"]


def counter(name, scale=1):
    return lambda d: d["counters"][name] / scale


# Of a domain, from what `status --json` says of it.
OF_DOMAIN = {
    "ksmu_domain_members": lambda d: len(d["members"]), "ksmu_domain_unreported_members": lambda d: sum(m["reported_ms"] is None for m in d["members"]),
    "ksmu_domain_left_members": lambda d: d["left"], "ksmu_run": lambda d: d["tunables"]["run"], "ksmu_cpu_limit_ratio": lambda d: d["tunables"]["cpu_limit_percent"] / 100,
    "ksmu_saved_bytes": lambda d: d["saved_bytes"], "ksmu_net_saved_bytes": lambda d: d["net_bytes"], "ksmu_tracked_bytes": pages("pages_tracked"),
    "ksmu_merged_bytes": pages("pages_merged"), "ksmu_frames_bytes": lambda d: d["frames"] * d["page_bytes"], "ksmu_zero_bytes": pages("ksm_zero_pages"),
    "ksmu_unique_bytes": pages("pages_unshared"), "ksmu_changing_bytes": pages("pages_volatile"), "ksmu_unmerge_needs_bytes": counter("unmerge_bytes"),
    "ksmu_region_bytes": counter("region_bytes"), "ksmu_regions": counter("regions"), "ksmu_metadata_bytes": counter("metadata_bytes"),
    "ksmu_broker_metadata_bytes": lambda d: d["broker_bytes"], "ksmu_mappings": counter("maps_used"), "ksmu_children": counter("children"),
    "ksmu_gate_max_seconds": counter("gate_max_us", 1e6), "ksmu_gate_p99_seconds": counter("gate_p99_us", 1e6), "ksmu_members_cpu_seconds": lambda d: d["cpu_ns"] / 1e9,
    "ksmu_members_cow_breaks": counter("cow_breaks"), "ksmu_members_full_scans": counter("full_scans"), "ksmu_members_pages_scanned": counter("pages_scanned"),
    "ksmu_members_pages_merged": counter("pages_merged_total"), "ksmu_members_gates": counter("gate_count"),
}
# Of a member, from its entry there; with the domain's page size put in.
OF_MEMBER = {
    "ksmu_member_run": lambda m: m["tunables"]["run"], "ksmu_member_tracked_bytes": pages("pages_tracked"), "ksmu_member_merged_bytes": pages("pages_merged"),
    "ksmu_member_zero_bytes": pages("ksm_zero_pages"), "ksmu_member_unique_bytes": pages("pages_unshared"), "ksmu_member_changing_bytes": pages("pages_volatile"),
    "ksmu_member_unmerge_needs_bytes": counter("unmerge_bytes"), "ksmu_member_metadata_bytes": counter("metadata_bytes"), "ksmu_member_mappings": counter("maps_used"),
    "ksmu_member_gate_max_seconds": counter("gate_max_us", 1e6), "ksmu_member_gate_p99_seconds": counter("gate_p99_us", 1e6),
    "ksmu_member_cpu_seconds_total": lambda m: m["cpu_ns"] / 1e9, "ksmu_member_cow_breaks_total": counter("cow_breaks"), "ksmu_member_full_scans_total": counter("full_scans"),
    "ksmu_member_pages_scanned_total": counter("pages_scanned"), "ksmu_member_pages_swept_total": counter("pages_swept"),
    "ksmu_member_pages_skipped_total": counter("pages_skipped"), "ksmu_member_pages_merged_total": counter("pages_merged_total"),
    "ksmu_member_pages_remerged_total": counter("pages_remerged"), "ksmu_member_discards_total": counter("discards"), "ksmu_member_gates_total": counter("gate_count"),
}
# Times that run on while one looks, and who it is.
OTHERS = {"ksmu_up", "ksmu_frames_limit_bytes", "ksmu_unmerged_bytes", "ksmu_member_info", "ksmu_member_unanswered_seconds", "ksmu_member_report_age_seconds"}


def members(ksmud, ctl, shim):
    good, why = usable(shim)
    if not good:
        skip(f"the library cannot start here: {why}")
    with tempfile.TemporaryDirectory(prefix="ksmu-metrics-") as directory:
        broker = Broker(ksmud, ctl, directory)
        both = []
        try:
            both.append(Member(shim, broker.socket))
            # A program may call itself whatever it likes.
            plain, sys.executable = sys.executable, directory + '/a"b\\n\\\n\udcff'
            os.symlink(plain, sys.executable)
            try:
                both.append(Member(shim, broker.socket))
            finally:
                sys.executable = plain
            with_members(broker, both, directory)
        finally:
            for member in both:
                member.end()
            broker.end()


def with_members(broker, both, directory):
    check("two members", wait_for(lambda: len(broker.json("members")) == 2), broker.json("members"))
    check("merged", wait_for(lambda: int(broker.value("pages_merged") or -1) >= 2 * PAGES * 7 // 8), broker.ctl("status"))
    check("zero", wait_for(lambda: int(broker.value("ksm_zero_pages")) >= 2 * PAGES // 8), broker.value("ksm_zero_pages"))
    text = metrics(broker, "--members")
    agrees(broker)
    domain = text.labels("ksmu_saved_bytes")[0]["domain"]
    parts = [text.of(f"ksmu_{part}_bytes", domain=domain) for part in ("merged", "zero", "unique", "changing")]
    check("the balance", text.of("ksmu_tracked_bytes", domain=domain) ==
          sum(parts) + sum(text.of("ksmu_unmerged_bytes", **labels) for labels in text.labels("ksmu_unmerged_bytes") if labels["domain"] == domain), text.values)
    check("saved", text.of("ksmu_saved_bytes", domain=domain) > 0 and
          text.of("ksmu_saved_bytes", domain=domain) == parts[0] - text.of("ksmu_frames_bytes", domain=domain) + parts[1], text.values)
    names = {labels["pid"]: labels["name"] for labels in text.labels("ksmu_member_info")}
    check("who they are", set(names) == {str(m.pid) for m in both} and names[str(both[1].pid)] == 'a"b\\n\\?\u00ff', names)
    check("counters are of single members, since sums of them can fall",
          all("member" in dict(labels) and "pid" in dict(labels) for name, labels in text.values if text.families[name][0] == "counter"))
    check("and sums have no member", not any(name.startswith("ksmu_member_") for name in metrics(broker).families))
    bounded(broker, text)
    documented(text)
    dashboard(text)
    promtool(broker, directory)
    unread(broker)

    both[1].end()
    check("one has gone", wait_for(lambda: len(broker.json("members")) == 1), broker.json("members"))
    later = metrics(broker, "--members")
    check("with its series", {labels["pid"] for labels in later.labels("ksmu_member_cpu_seconds_total")} == {str(both[0].pid)}, later.values)
    check("and a gauge has fallen", 0 < later.of("ksmu_members_pages_merged", domain=domain) < text.of("ksmu_members_pages_merged", domain=domain), later.values)


def agrees(broker):
    """With `status`, at a moment at which nothing changes between two looks at it."""
    for _ in range(50):
        before = broker.json("status")
        text = Text(broker.ctl("metrics", "--members")[1], True)
        after = broker.json("status")
        for state in (before, after):
            for member in (m for d in state for m in d["members"]):
                member["joined_ms"] = member["unanswered_ms"] = 0
                member["reported_ms"] = member["reported_ms"] and 1
        if before == after:
            break
        time.sleep(0.3)
    else:
        check("numbers agree with status", False, "it never stood still")
        return
    wrong = []
    for d in before:
        at = {"domain": d["domain"]}
        wrong += [(name, text.of(name, **at), of(d)) for name, of in OF_DOMAIN.items() if text.of(name, **at) != of(d)]
        for name, n in d["counters"].items():
            if name.startswith("unmerged_") and text.of("ksmu_unmerged_bytes", reason=name[9:], **at) != n * d["page_bytes"]:
                wrong.append((name, n))
        for m in d["members"]:
            m["page_bytes"] = d["page_bytes"]
            found = [labels for labels in text.labels("ksmu_member_run") if labels["pid"] == str(m["pid"])]
            if len(found) != 1:
                wrong.append((m["pid"], found))
                continue
            wrong += [(name, text.of(name, **found[0]), of(m)) for name, of in OF_MEMBER.items() if text.of(name, **found[0]) != of(m)]
    check("numbers agree with status", not wrong, wrong)
    check("all of them", set(text.families) == set(OF_DOMAIN) | set(OF_MEMBER) | OTHERS, set(text.families) ^ (set(OF_DOMAIN) | set(OF_MEMBER) | OTHERS))


def bounded(broker, text):
    """How many series there are without --members is told in the document, and does not depend on who is there."""
    count = int(re.search(r"times (\d+)\b", read(SOURCE + "/docs/metrics.md"))[1])
    alone_text = metrics(broker)
    domains = len(alone_text.labels("ksmu_saved_bytes"))
    check("series of a domain", len(alone_text.values) == 2 + domains * count, (len(alone_text.values), domains, count))
    check("the same numbers with --members", set(alone_text.values) < set(text.values), set(alone_text.values) - set(text.values))


def documented(text):
    document = read(SOURCE + "/docs/metrics.md")
    rows = {name: (kind, about) for name, kind, about in re.findall(r"^\| `(ksmu_\w+)` \| (\w+) \|(?: [^|]*\|)? ([^|]*) \|$", document, re.M)}
    check("docs/metrics.md has them, with type and help", rows == text.families,
          [(name, rows.get(name), text.families.get(name)) for name in set(rows) | set(text.families) if rows.get(name) != text.families.get(name)])
    named = set(re.findall(r"\bksmu_[a-z0-9_]*[a-z0-9]\b(?!…|_…)", document))
    check("and names no others", named <= set(text.families), named - set(text.families))


def dashboard(text):
    board = json.loads(read(SOURCE + "/packaging/grafana/ksmu.json"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]] + [v["definition"] for v in board["templating"]["list"] if "definition" in v]
    named = set(re.findall(r"\bksmu_\w+", " ".join(asked)))
    check("the dashboard's metrics are there", len(asked) > 10 and named and named <= set(text.families), named - set(text.families))
    wanted = {"ksmu_saved_bytes", "ksmu_merged_bytes", "ksmu_frames_bytes", "ksmu_zero_bytes", "ksmu_unmerged_bytes", "ksmu_members_cpu_seconds", "ksmu_domain_members",
              "ksmu_members_cow_breaks", "ksmu_gate_p99_seconds"}
    check("and it shows what it should", wanted <= named, wanted - named)
    variables = {v["name"] for v in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board))) - {"__rate_interval", "__all"}
    check("its variables", {"datasource", "domain"} <= variables and used == variables, (used, variables))
    check("its rates are of counters", all(text.families[name][0] == "counter" for name in re.findall(r"\brate\((ksmu_\w+)", " ".join(asked))))
    labels = {label for _, found in text.values for label, _ in found} | {"instance"}
    check("its labels", set(re.findall(r"(\w+)=~", " ".join(asked))) <= labels)


def promtool(broker, directory):
    path = directory + "/ksmu.prom"
    expect(broker, "a file with members", ["metrics", "--members", "--textfile", path], 0)
    check("the text format, with members", not Text(read(path), False).wrong, Text(read(path), False).wrong)
    if not tool("promtool"):
        checks.skip("promtool", "promtool (of Debian's package prometheus) is not there")
        return
    for name, text, want in (("takes the file", read(path), True), ("would see a fault", read(path).replace("_total", "_sum"), False)):
        done = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False)
        check(f"promtool {name}", (done.returncode == 0 and not done.stderr and not done.stdout) == want, done)


def unread(broker):
    """One that asks, and reads nothing: it is given up after 10 s."""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        ours.sendall(SCRAPE.encode())
        begun = time.monotonic()
        process = subprocess.Popen(command(broker, "--http", "--members"), stdin=theirs, stdout=theirs, env=environment())
        theirs.close()
        try:
            code = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        took = time.monotonic() - begun
    check("HTTP: one that does not read", code == 6 and 8 < took < 13, (code, took))


def main():
    what, *rest = sys.argv[1:]
    {"alone": alone, "members": members}[what](*rest)
    checks.finish()


main()
