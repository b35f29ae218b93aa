#!/usr/bin/env python3
"""The commands of ksmuctl that look at the machine and at processes.

  ksmuctl_test.py doctor KSMUCTL KSMUD        each situation that it has to name, made to happen to a child
  ksmuctl_test.py what_if KSMUCTL LAID_OUT    what it counts of processes whose memory this has laid out (ksmuctl/laid_out.c)
  ksmuctl_test.py map KSMUCTL LAID_OUT        the same for the picture
"""
import ctypes
import gzip
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "preload"))
from support import environment  # noqa: E402

STRANGER = 12345  # a user's number that nobody has
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 38, 22, 67, 68
SECCOMP_MODE_FILTER, ALLOW, KILL = 2, 0x7fff0000, 0x80000000
EPERM, ENOSYS = 0x50000 | 1, 0x50000 | 38
NUMBERS = {"x86_64": {"userfaultfd": 323, "memfd_create": 319, "process_vm_readv": 310, "fallocate": 285, "ioctl": 16},
           "aarch64": {"userfaultfd": 282, "memfd_create": 279, "process_vm_readv": 270, "fallocate": 47, "ioctl": 29}}
libc = ctypes.CDLL(None, use_errno=True)
passed, failed, skipped = [], [], []


def check(name, good, detail=""):
    (passed if good else failed).append(name)
    if not good:
        print(f"{name}: {detail}")


def skip(name, why):
    skipped.append((name, why))


def run(command, before=None, limit=120, **variables):
    try:
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, errors="replace", timeout=limit,
                              preexec_fn=before)
    except subprocess.TimeoutExpired:
        return None, "", "it did not end"
    return done.returncode, done.stdout, done.stderr


def filter_calls(names, action=EPERM):
    """For a child before it executes its program: these system calls are refused from then on."""
    numbers = [NUMBERS[platform.machine()][name] for name in names]
    code = [(0x20, 0, 0, 0)] + [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    code += [(0x06, 0, 0, ALLOW), (0x06, 0, 0, action)]
    text = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))

    def install():
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
            os._exit(99)
        assert buffer
    return install


def can_filter():
    return platform.machine() in NUMBERS and run(["true"], filter_calls(["fallocate"]))[0] == 0


# --- doctor ----------------------------------------------------------------------------------------------------------

class Doctor:
    def __init__(self, ksmuctl):
        self.ksmuctl = ksmuctl

    def ask(self, name, *options, before=None, prefix=(), broker=False, **variables):
        """The findings by their names, and the exit status, which has to agree with them."""
        if not broker:
            variables.setdefault("KSMU_BROKER", "none")
        status, out, err = run([*prefix, self.ksmuctl, "doctor", "--json", *options], before, **variables)
        try:
            answer = json.loads(out)
        except ValueError:
            check(name, False, (status, out[-500:], err[-500:]))
            return {}, status
        findings = {c["name"]: c for c in answer["checks"]}
        levels = [c["level"] for c in answer["checks"]]
        check(f"{name}: counts", (answer["problems"], answer["warnings"]) == (levels.count("problem"), levels.count("warning")), answer)
        check(f"{name}: status", status == (1 if "problem" in levels else 0), (status, levels))
        for finding in answer["checks"]:
            good = finding["cause"] and "\n" not in finding["cause"] + finding["mend"] and (finding["level"] == "ok") == (not finding["mend"])
            check(f"{name}: {finding['name']}: a cause, and a mend where there is something to mend", good, finding)
        return findings, status

    def expect(self, name, finding, level, cause, mend, *options, **more):
        """That finding is of that level, and says so."""
        found = self.ask(name, *options, **more)[0].get(finding, {})
        check(name, found.get("level") == level and cause in found.get("cause", "") and mend in found.get("mend", ""), found)
        return found


def tree(work, name, files):
    root = os.path.join(work, name)
    for path, text in files.items():
        path = os.path.join(root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with (gzip.open if path.endswith(".gz") else open)(path, "wt") as f:
            f.write(text)
    return root


CONFIG = "".join(f"CONFIG_{name}=y\n" for name in ("KSM", "USERFAULTFD", "PTE_MARKER_UFFD_WP", "PROC_PAGE_MONITOR", "MEMFD_CREATE",
                                                    "CROSS_MEMORY_ATTACH"))
GOOD = {"proc/sys/kernel/osrelease": "6.12.9-amd64\n", "boot/config-6.12.9-amd64": "# comment\n" + CONFIG,
        "proc/sys/vm/max_map_count": "1048576\n", "proc/sys/vm/unprivileged_userfaultfd": "1\n", "sys/kernel/mm/ksm/run": "0\n"}


def copies(doctor, work):
    """Other machines' files, as sosreport copies them."""
    def expect(name, files, *what):
        doctor.expect(name, *what, "--root", tree(work, name.replace(" ", "_"), {k: v for k, v in (GOOD | files).items() if v is not None}))

    findings, status = doctor.ask("a good copy", "--root", tree(work, "good", GOOD))
    check("a good copy: no problem", status == 0 and {f["level"] for f in findings.values()} == {"ok"}, findings)
    check("a good copy: only what files tell", set(findings) == {"kernel", "config", "rights", "maps", "ksm"}, findings)
    check("a good copy: CONFIG_KSM", "CONFIG_KSM=y" in findings["config"]["cause"], findings)
    expect("old kernel", {"proc/sys/kernel/osrelease": "6.7.12-amd64\n"}, "kernel", "problem", "Linux 6.7.12-amd64 is too old: 6.8", "6.8 or newer")
    expect("old kernel of Debian 12", {"proc/sys/kernel/osrelease": None, "proc/version": "Linux version 6.1.0-18-amd64 (debian) #1\n",
                                       "etc/os-release": 'ID=debian\nVERSION_ID="12"\n'},
           "kernel", "problem", "Linux 6.1.0-18-amd64 is too old", "apt-get install -t bookworm-backports linux-image-")
    expect("newer kernel", {"proc/sys/kernel/osrelease": "7.0.0\n", "boot/config-7.0.0": CONFIG}, "kernel", "ok", "7.0.0", "")
    expect("no kernel", {"proc/sys/kernel/osrelease": "what\n"}, "kernel", "problem", "cannot be told", "")
    expect("no CONFIG_USERFAULTFD", {"boot/config-6.12.9-amd64": CONFIG.replace("CONFIG_USERFAULTFD=y", "# CONFIG_USERFAULTFD is not set")},
           "config", "problem", "without CONFIG_USERFAULTFD; CONFIG_KSM=y", "CONFIG_USERFAULTFD")
    expect("no CONFIG_KSM", {"boot/config-6.12.9-amd64": CONFIG.replace("CONFIG_KSM=y\n", "")}, "config", "ok", "CONFIG_KSM=n", "")
    expect("packed config", {"boot/config-6.12.9-amd64": None, "proc/config.gz": CONFIG}, "config", "ok", "/proc/config.gz", "")
    expect("no config", {"boot/config-6.12.9-amd64": None}, "config", "warning", "can be read", "grep -E 'CONFIG_(KSM")
    expect("small map limit", {"proc/sys/vm/max_map_count": "32768\n"}, "maps", "problem", "vm.max_map_count is 32,768", "sysctl -w vm.max_map_count=")
    expect("default map limit", {"proc/sys/vm/max_map_count": "65530\n"}, "maps", "warning", "vm.max_map_count is 65,530", "sysctl -w vm.max_map_count=")
    expect("no rights for all", {"proc/sys/vm/unprivileged_userfaultfd": "0\n"}, "rights", "warning", "is 0", "sysctl -w vm.unprivileged_userfaultfd=1")
    expect("no KSM", {"sys/kernel/mm/ksm/run": None}, "ksm", "ok", "does not need it", "")
    ksm = {"sys/kernel/mm/ksm/run": "1\n", "sys/kernel/mm/ksm/pages_shared": "48911\n", "sys/kernel/mm/ksm/pages_sharing": "90090\n",
           "proc/77/ksm_stat": "ksm_rmap_items 5\nksm_merge_any: no\n", "proc/77/maps": "7f0000000000-7f0000001000 r-xp 0 00:00 1 /usr/lib/libc.so.6\n"}
    expect("KSM elsewhere", ksm, "ksm", "warning", "48,911 pages shared, 90,090 sharing", "echo 2 > /sys/kernel/mm/ksm/run")
    ours = {"proc/78/ksm_stat": "ksm_rmap_items 0\nksm_merge_any: yes\n",
            "proc/78/maps": "7f0000000000-7f0000001000 r--p 0 00:01 9 /memfd:ksmu-frames (deleted)\n"}
    expect("KSM on the same memory", ksm | ours, "ksm", "problem", "the same memory as ksmu, in process 78", "echo 2 > /sys/kernel/mm/ksm/run")
    advised = {"proc/78/ksm_stat": "ksm_rmap_items 12\nksm_merge_any: no\n"}
    expect("KSM by madvise on the same memory", ksm | ours | advised, "ksm", "problem", "in process 78", "echo 2 > /sys/kernel/mm/ksm/run")
    expect("KSM, not on ksmu's", ksm | ours | {"proc/78/ksm_stat": "ksm_rmap_items 0\nksm_merge_any: no\n"}, "ksm", "warning", "beside ksmu", "")


def filters(doctor):
    if not can_filter():
        return skip("filters", "seccomp filters are not permitted here, or this machine's numbers of system calls are not written down")
    # ioctl is what a device would be asked by: neither way is left.
    for name, action in (("EPERM", EPERM), ("ENOSYS", ENOSYS), ("SIGSYS", KILL)):
        for calls in (["memfd_create"], ["process_vm_readv"]):
            doctor.expect(f"filter: {calls[0]} {name}", "calls", "problem", f"(seccomp) refuses {calls[0]}", f"SystemCallFilter={calls[0]}",
                          before=filter_calls(calls, action))
    device = os.access("/dev/userfaultfd", os.R_OK | os.W_OK)
    both = filter_calls(["userfaultfd", "ioctl"])
    found = doctor.expect("filter: userfaultfd, ioctl", "rights", "problem", "(seccomp), as containers have it, refuses userfaultfd",
                          "docker run --device /dev/userfaultfd", before=both)
    check("filter: how a container's profile allows it", "seccomp=PROFILE" in found.get("mend", ""), found)
    doctor.expect("filter: both are named", "calls", "problem", "userfaultfd, ioctl", "SystemCallFilter=userfaultfd, ioctl", before=both)
    doctor.expect("filter: the trial", "trial", "problem", "the library says (", "above", before=both)
    if device:
        findings = doctor.ask("filter: the device serves", before=filter_calls(["userfaultfd"]))[0]
        good = findings and findings["calls"]["level"] == findings["rights"]["level"] == "ok" and "by /dev/userfaultfd" in findings["rights"]["cause"]
        check("filter: the device serves", good, findings)


def without_rights(doctor, work):
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return skip("without rights", "it takes root and setpriv to give the rights up")
    other = Doctor(shutil.copy(doctor.ksmuctl, os.path.join(work, "ksmuctl")))
    drop = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    if open("/proc/sys/vm/unprivileged_userfaultfd").read().strip() == "1" or run(drop + ["test", "-w", "/dev/userfaultfd"])[0] == 0:
        skip("without rights", "everybody may use userfaultfd here")
    else:
        found = other.expect("without rights", "rights", "problem", f"{STRANGER} has no right to userfaultfd", "vm.unprivileged_userfaultfd=1", prefix=drop)
        check("without rights: the device", f"setfacl -m u:{STRANGER}:rw /dev/userfaultfd" in found.get("mend", ""), found)
        if os.path.exists("/dev/userfaultfd"):
            other.expect("without rights: the device alone", "device", "warning", "may not open /dev/userfaultfd", "setfacl", prefix=drop)
    lock = ["setpriv", "--inh-caps=-ipc_lock", "--bounding-set=-ipc_lock"]

    def locked(limit):
        return lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    doctor.expect("nothing can be locked", "memlock", "problem", "no page can be locked", "LimitMEMLOCK=", prefix=lock, before=locked(0))
    doctor.expect("little can be locked", "memlock", "warning", "65,536 bytes", "ulimit -l", prefix=lock, before=locked(65536))
    doctor.expect("enough can be locked", "memlock", "ok", "8,388,608", "", prefix=lock, before=locked(8 << 20))


def limits(doctor, usable):
    def limit(which, value):
        return lambda: resource.setrlimit(which, (value, value))
    doctor.expect("few descriptors", "nofile", "problem", "RLIMIT_NOFILE is 20:", "ulimit -n", before=limit(resource.RLIMIT_NOFILE, 20))
    doctor.expect("not many descriptors", "nofile", "warning", "RLIMIT_NOFILE is 256:", "LimitNOFILE", before=limit(resource.RLIMIT_NOFILE, 256))
    doctor.expect("small files", "fsize", "problem", "RLIMIT_FSIZE is 1,048,576 bytes", "ulimit -f", before=limit(resource.RLIMIT_FSIZE, 1 << 20))
    doctor.expect("smallish files", "fsize", "warning", "RLIMIT_FSIZE is 4,194,304 bytes", "LimitFSIZE", before=limit(resource.RLIMIT_FSIZE, 4 << 20))
    if not usable:
        return skip("trial under limits", "the library does not work here without limits either")
    doctor.expect("trial: few descriptors", "trial", "problem", "the library says (EMFILE)", "ulimit -n", before=limit(resource.RLIMIT_NOFILE, 10))
    doctor.expect("trial: small files", "trial", "problem", "0 of 64 equal pages", "limits", before=limit(resource.RLIMIT_FSIZE, 1 << 20))
    doctor.expect("trial: a bad variable", "trial", "problem", "(EINVAL): a tunable's variable", "env | grep KSMU_", KSMU_PAGES_TO_SCAN="many")


def merged_by_ksm(doctor):
    def inherit():
        if libc.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
            os._exit(99)
    asks = "import ctypes; print(ctypes.CDLL(None).prctl(68, 0, 0, 0, 0))"
    status, out, _ = run([sys.executable, "-c", asks], inherit)
    if status == 99 or out.strip() != "1":
        return skip("KSM by PR_SET_MEMORY_MERGE", "this kernel has none, or it does not outlive exec")
    with open("/sys/kernel/mm/ksm/run") as f:
        runs = f.read().strip() == "1"
    doctor.expect("KSM by PR_SET_MEMORY_MERGE", "ksm", "problem" if runs else "warning", "the same that ksmu merges (PR_SET_MEMORY_MERGE", "MemoryKSM=no",
                  before=inherit)


def stranger(path, ready):
    """In a forked child, which listens there for as long as it lives."""
    os.setgid(STRANGER)
    os.setuid(STRANGER)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.bind(path)
        s.listen()
        os.write(ready, b"x")
        time.sleep(600)


def brokers(doctor, work, ksmud):
    def expect(name, level, cause, mend, *options, **more):
        return doctor.expect(name, "broker", level, cause, mend, *options, broker=True, **more)

    path = os.path.join(work, "nobody.sock")
    expect("no broker", "problem", f"{path}: there is no broker's socket", f"ksmud --socket {path}", "--socket", path)
    expect("no broker, not asked for", "warning", "each process is merged by itself alone", "ksmud &", XDG_RUNTIME_DIR=work)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.bind(path)
    expect("nobody listens", "problem", "nobody listens", f"ksmud --socket {path}", KSMU_BROKER=path)
    expect("none wanted", "ok", "none is wanted", "", KSMU_BROKER="none")
    expect("relative path", "problem", "begin with '/'", "correct --socket", "--socket", "here.sock")
    expect("domain's name", "problem", "a domain's name", "correct", "--domain", "../x")
    expect("no socket", "problem", "nobody listens", "ksmud", "--socket", shutil.copy("/etc/passwd", os.path.join(work, "file")))

    path = os.path.join(work, "default.sock")
    with open(os.path.join(work, "log"), "w") as log:
        broker = subprocess.Popen([ksmud, "--socket", path, "--domain", "web"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        for _ in range(500):
            if broker.poll() is not None or os.path.exists(os.path.join(work, "web.sock")):
                break
            time.sleep(0.01)
        expect("a broker", "ok", f"{path}: ", "", "--socket", path)
        expect("a domain", "ok", os.path.join(work, "web.sock"), "", "--socket", path, "--domain", "web")
        expect("no such domain", "problem", os.path.join(work, "other.sock"), "ksmud", "--socket", path, "--domain", "other")
        status, out, _ = run([doctor.ksmuctl, "doctor", "--socket", path, "--domain", "web", "--domain", "other"])
        check("two domains", status == 1 and out.count(" broker ") == 2 and "    mend: ksmud --socket" in out, out)
    finally:
        broker.send_signal(signal.SIGTERM)
        broker.wait()

    if os.geteuid() != 0:
        return skip("a stranger's broker", "it takes root to be a stranger")
    place = os.path.join(work, "stranger")
    os.mkdir(place, 0o755)
    os.chown(place, STRANGER, STRANGER)
    expect("a stranger's directory", "problem", "there is no broker's socket", "ksmud", "--socket", os.path.join(place, "x.sock"))
    path = os.path.join(place, "default.sock")
    ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stranger(path, ready[1])
        finally:
            os._exit(1)
    try:
        os.read(ready[0], 1)
        expect("a stranger's socket", "problem", f"was made by a stranger, user {STRANGER}", "/etc/ksmu/brokers", "--socket", path)
        os.chown(place, 0, 0)
        os.chown(path, 0, 0)
        expect("a stranger's broker", "problem", f"is a stranger's broker, of user {STRANGER}", "/etc/ksmu/brokers", "--socket", path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def doctor_cases(ksmuctl, ksmud):
    with tempfile.TemporaryDirectory() as work:
        os.chmod(work, 0o755)
        doctor = Doctor(ksmuctl)
        findings, _ = doctor.ask("here")
        usable = findings.get("trial", {}).get("level") == "ok"
        check("here: all is looked at", set(findings) == {"kernel", "config", "rights", "device", "calls", "memlock", "nofile", "fsize", "maps", "ksm",
                                                         "trial", "broker"}, findings)
        for arguments in (["--what"], ["--socket"], ["--root", os.path.join(work, "none")], ["here"]):
            status, out, err = run([ksmuctl, "doctor"] + arguments)
            check(f"usage: {arguments}", status == 2 and not out and "usage: ksmuctl doctor" in err, (status, out, err))
        status, out, _ = run([ksmuctl, "doctor", "--help"])
        check("--help", status == 0 and out.startswith("usage: ksmuctl doctor"), out)
        status, out, _ = run([ksmuctl, "--help"])
        check("the list", status == 0 and "  doctor " in out and "  exec " in out, out)
        copies(doctor, work)
        limits(doctor, usable)
        merged_by_ksm(doctor)
        without_rights(doctor, work)
        brokers(doctor, work, ksmud)
        if usable:
            filters(doctor)
        else:
            skip("filters", findings.get("trial", {}).get("cause", "the library does not work here without filters either"))


# --- what-if and map -------------------------------------------------------------------------------------------------

class LaidOut:
    """A process whose memory is known, laid out piece by piece."""
    def __init__(self, program, *items):
        self.process = subprocess.Popen([program, *items], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid, self.left = self.process.pid, len(items)

    def __enter__(self):
        self.process.stdout.readline()
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def step(self):
        """The addresses of the next piece: start and bytes."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self.left -= 1
        return [int(number, 16) for number in self.process.stdout.readline().split()]

    def all(self):
        return [self.step() for _ in range(self.left)]

    def rss(self):
        with open(f"/proc/{self.pid}/statm") as f:
            return int(f.read().split()[1])


def huge_pages():
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as f:
            return "[never]" not in f.read()
    except OSError:
        return False


def bad_processes(ksmuctl, command, program, *more):
    """What any command answers that looks at a process."""
    def expect(name, status, text, *arguments, before=None, prefix=()):
        got, out, err = run([*prefix, ksmuctl, command, *arguments, *more], before)
        check(f"{command}: {name}", got == status and text in err and not out, (got, out, err))

    for pid in ("abc", "12x", "0", "-1", "+5", " 5", "", "0x10", "1.5", "2147483648", "99999999999999999999", "-99999999999999999999"):
        expect(f"PID '{pid}'", 2, "is no process's number", pid)
    expect("no PID", 2, "no process is named")
    expect("an option", 2, "unknown option --what", "--what", "1")
    status, out, _ = run([ksmuctl, command, "--help"])
    check(f"{command} --help", status == 0 and out.startswith(f"usage: ksmuctl {command}"), out)
    gone = subprocess.Popen(["true"])
    gone.wait()
    expect("no such process", 1, f"there is no process {gone.pid}", str(gone.pid))
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    expect("a zombie", 1, f"process {zombie.pid} has ended", str(zombie.pid))
    zombie.wait()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    expect("a thread", 1, f"{thread.native_id} is a thread, not a process", str(thread.native_id))
    stop.set()
    thread.join()
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return skip(f"{command}: no right", "it takes root and setpriv to give the rights up")
    if os.path.exists("/proc/2/comm") and open("/proc/2/comm").read().strip() == "kthreadd":
        expect("the kernel's", 1, "process 2 has no memory of its own", "2")
    else:
        skip(f"{command}: the kernel's", "process 2 is none")
    with tempfile.TemporaryDirectory() as work, LaidOut(program) as process:
        os.chmod(work, 0o755)
        other = shutil.copy(ksmuctl, work)
        drop = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        status, out, err = run([*drop, other, command, str(process.pid), *more])
        check(f"{command}: no right", status == 1 and f"process {process.pid} may not be looked at: run ksmuctl as its user" in err and not out, (status, err))


def what_if(ksmuctl, *arguments, before=None):
    status, out, err = run([ksmuctl, "what-if", "--json", *map(str, arguments)], before)
    if status != 0:
        check(f"what-if {arguments}", False, (status, err))
        return None
    counts = json.loads(out)
    parts = ("zero", "duplicates_within", "duplicates_across", "unique", "changing", "shared_already")
    check("what-if: it adds up", counts["looked_at"] == sum(counts[part] for part in parts), counts)
    saved = counts["zero"] + counts["duplicates_within"] + counts["duplicates_across"]
    check("what-if: what is saved", (counts["saved_pages"], counts["saved_bytes"]) == (saved, saved * counts["page_bytes"]), counts)
    return counts


def difference(after, before):
    """What has been laid out in between; the rest of the process keeps still."""
    if not after or not before:
        return {}
    return {k: after[k] - before[k] for k in after if isinstance(after[k], int) and not isinstance(after[k], bool)
            and k not in ("page_bytes", "saved_pages", "saved_bytes", "seconds") and after[k] != before[k]}


def what_if_cases(ksmuctl, program):
    bad_processes(ksmuctl, "what-if", program)
    for arguments in (["--seconds", "x", "1"], ["--seconds", "-1", "1"], ["--max-pages", "0", "1"], ["--max-pages"], ["1", "1"]):
        status, out, err = run([ksmuctl, "what-if", *arguments])
        check(f"what-if {arguments}", status == 2 and "usage:" in err and not out, (status, err))
    now = ["--seconds", 0]
    pieces = [("unique:100", {"looked_at": 100, "unique": 100}),
              ("same:50:7", {"looked_at": 50, "unique": 1, "duplicates_within": 49}),
              ("same:300:8", {"looked_at": 300, "unique": 1, "duplicates_within": 299}),
              ("same:10:7", {"looked_at": 10, "duplicates_within": 10}),
              ("zero:1000", {"looked_at": 1000, "zero": 1000}),
              ("read:200", {"kernel_zero": 200}),
              ("frames:40", {"frames": 30, "looked_at": 10, "unique": 10}),
              ("sparse:64", {"looked_at": 64, "unique": 64})]
    with LaidOut(program, *[item for item, _ in pieces], "same:1:9", "churn:70") as process:
        before = what_if(ksmuctl, *now, process.pid)
        first = before
        for item, expected in pieces:
            process.step()
            rss = process.rss()
            after = what_if(ksmuctl, *now, process.pid)
            check(f"what-if {item}", difference(after, before) == expected, (difference(after, before), expected))
            check(f"what-if {item}: nothing is made by looking", process.rss() == rss, (process.rss(), rss))
            before = after
        check("what-if: complete", before["complete"] and before["ksm"] in (0, None), before)
        part = what_if(ksmuctl, *now, "--max-pages", 500, process.pid)
        check("what-if --max-pages", part and not part["complete"] and part["looked_at"] == 500, part)
        # Two processes, in one domain.
        with LaidOut(program, "same:20:8", "same:5:1000", "unique:30", "zero:4") as other:
            alone = what_if(ksmuctl, *now, process.pid)
            empty = what_if(ksmuctl, *now, process.pid, other.pid)
            other.all()
            both = what_if(ksmuctl, *now, process.pid, other.pid)
            expected = {"looked_at": 59, "duplicates_across": 1, "duplicates_within": 19 + 4, "unique": 31, "zero": 4}
            check("what-if of two", difference(both, empty) == expected, (difference(both, empty), expected))
            check("what-if of two: pids", both["pids"] == [process.pid, other.pid] and alone["duplicates_across"] == 0, both)
            status, out, _ = run([ksmuctl, "what-if", "--seconds", "0", str(process.pid), str(other.pid)])
            check("what-if: text", status == 0 and f"processes: {process.pid} {other.pid}\n" in out
                  and f"{'would be saved':22} {both['saved_pages']:14,} pages" in out, out)
        process.step()
        still = what_if(ksmuctl, "--seconds", 1, process.pid)
        process.step()
        churned = what_if(ksmuctl, "--seconds", 1, process.pid)
        check("what-if churn", difference(churned, still) == {"looked_at": 70, "changing": 70}, difference(churned, still))
        check("what-if: of the whole", still["unique"] - first["unique"] == 100 + 2 + 10 + 64 + 1, still)
        ending = subprocess.Popen([ksmuctl, "what-if", "--seconds", "4", str(process.pid)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(1)
        process.process.kill()
        out, err = ending.communicate()
        check("what-if: it ends meanwhile", ending.returncode == 1 and not out and f"process {process.pid} has ended" in err, (ending.returncode, out, err))
    if can_filter():
        with LaidOut(program, "read:200", "same:9:1", "frames:8") as process:
            process.all()
            new, old = what_if(ksmuctl, *now, process.pid), what_if(ksmuctl, *now, process.pid, before=filter_calls(["ioctl"]))
            expected = {"kernel_zero": -200, "looked_at": 200, "shared_already": 200}  # what only PAGEMAP_SCAN tells
            check("what-if without PAGEMAP_SCAN", difference(old, new) == expected, (difference(old, new), expected))
            status, out, err = run([ksmuctl, "what-if", str(process.pid)], filter_calls(["process_vm_readv"]))
            check("what-if without process_vm_readv", status == 1 and not out and "may not be looked at" in err, (status, out, err))
    else:
        skip("what-if without PAGEMAP_SCAN", "seccomp filters are not permitted here")
    with LaidOut(program, "forked:90") as process:
        before = what_if(ksmuctl, *now, process.pid)
        process.step()
        after = what_if(ksmuctl, *now, process.pid)
        good = after["looked_at"] == before["looked_at"] + 90 and 90 <= after["shared_already"] <= after["looked_at"]
        check("what-if forked", good and after["ksm"] in (0, None), (before, after))
        # Pinned for reading, a page that is shared would be copied.
        again = what_if(ksmuctl, *now, process.pid)
        check("what-if forked: still shared afterwards", difference(again, after) == {}, difference(again, after))
    if not huge_pages():
        return skip("what-if huge", "there are no transparent huge pages here")
    with LaidOut(program, "huge:1024") as process:
        before = what_if(ksmuctl, *now, process.pid)
        process.step()
        found = difference(what_if(ksmuctl, *now, process.pid), before)
        if found.get("huge") in (None, 512):
            skip("what-if huge", "the kernel had no huge pages to give")
        else:
            check("what-if huge", found == {"looked_at": 1024, "unique": 1024, "huge": 1024}, found)


SVG = "{http://www.w3.org/2000/svg}"
CLASSES = ("shared", "zero", "private", "huge", "file", "swapped", "absent")


def picture(ksmuctl, pid, file, before=None):
    """The picture's root, and the pages of each kind: by the legend, and printed, which have to agree."""
    status, out, err = run([ksmuctl, "map", str(pid), "-o", file], before)
    if status != 0:
        check("map", False, (status, err))
        return None, {}, []
    root = xml.etree.ElementTree.parse(file).getroot()
    legend = {}
    for kind in CLASSES:
        text = "".join(root.find(f"{SVG}g[@id='legend-{kind}']/{SVG}text").itertext())
        legend[kind] = int(re.search(r": ([\d,]+) pages", text)[1].replace(",", ""))
    printed = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in out.splitlines()[1:]}
    check("map: printed as drawn", printed == legend, (printed, legend))
    # And so do the cells.
    cells = dict.fromkeys(CLASSES, 0)
    for title in root.iter(f"{SVG}title"):
        for kind, pages in re.findall(r" ([a-z]+) (\d+)(?= |$)", title.text[title.text.rindex(":"):]):
            cells[kind] += int(pages)
    check("map: the cells add up", cells == legend | {"absent": 0}, (cells, legend))
    ranges = [[int(x, 16) for x in title.text.split(" ")[0].split("-")] for title in root.iter(f"{SVG}title")]
    check("map: in the order of addresses", all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:])), ranges[:3])
    check("map: its size", os.path.getsize(file) < 2_500_000, os.path.getsize(file))
    return root, legend, ranges


def map_cases(ksmuctl, program):
    with tempfile.TemporaryDirectory() as work:
        file = os.path.join(work, "file.svg")
        bad_processes(ksmuctl, "map", program, "-o", file)
        check("map: nothing is drawn of what cannot be looked at", not os.path.exists(file))
        for arguments, text in ((["1"], "-o FILE.svg"), (["1", "-o"], "wants a file"), (["1", "2", "-o", file], "one process")):
            status, out, err = run([ksmuctl, "map", *arguments])
            check(f"map {arguments}", status == 2 and text in err and not out, (status, err))
        pieces = [("unique:1000", {"private": 1000}), ("zero:16", {"private": 16}), ("read:500", {"zero": 500}),
                  ("frames:40", {"shared": 30, "private": 10}), ("sparse:64", {"private": 64, "absent": (16 << 40) // 4096 - 64})]
        with LaidOut(program, *[item for item, _ in pieces]) as process:
            for path, why in ((os.path.join(work, "no", "file.svg"), "No such file"), (work, "Is a directory"), ("/dev/full", "No space left")):
                status, out, err = run([ksmuctl, "map", str(process.pid), "-o", path])
                check(f"map -o {why}", status == 1 and f"{path}: {why}" in err and not out, (status, err))
            _, before, _ = picture(ksmuctl, process.pid, file)
            for item, expected in pieces:
                start, size = process.step()
                rss = process.rss()
                _, after, ranges = picture(ksmuctl, process.pid, file)
                found = {kind: after[kind] - before[kind] for kind in after}
                found["absent"] += found.pop("file")  # more of the program itself, that has been run for this
                found = {kind: pages for kind, pages in found.items() if pages}
                check(f"map {item}", found == expected, (found, expected))
                check(f"map {item}: nothing is made by looking", process.rss() == rss, (process.rss(), rss))
                inside = sum(1 for a, b in ranges if a < start + size and b > start)
                check(f"map {item}: where it is", inside >= 1, (hex(start), ranges[:3]))
                before = after
            check("map: sparse memory is drawn where it is", inside == 64, inside)
        if can_filter():
            with LaidOut(program, "read:500", "frames:40", "unique:20") as process:
                process.all()
                new, old = picture(ksmuctl, process.pid, file)[1], picture(ksmuctl, process.pid, file, filter_calls(["ioctl"]))[1]
                expected = new | {"zero": new["zero"] - 500, "private": new["private"] + 500}
                check("map without PAGEMAP_SCAN", old == expected, (old, expected))
        else:
            skip("map without PAGEMAP_SCAN", "seccomp filters are not permitted here")
        # More cells than there can be, far from each other; and with names that are no XML.
        with LaidOut(program, "sparse:20000") as process:
            _, before, _ = picture(ksmuctl, process.pid, file)
            process.step()
            _, after, ranges = picture(ksmuctl, process.pid, file)
            good = after["private"] - before["private"] == 20000 and 1000 < len(ranges) <= 4096
            check("map: many cells", good, (before, after, len(ranges)))
        odd = shutil.copy(program, os.path.join(work, "a<b>&\"\x01]]>"))
        with LaidOut(odd, "unique:10") as process:
            process.all()
            root, _, _ = picture(ksmuctl, process.pid, file)
            check("map: a name that is no XML", root is not None and any('a<b>&"' in "".join(t.itertext()) for t in root.iter(f"{SVG}text")), "")
        if not huge_pages():
            return skip("map huge", "there are no transparent huge pages here")
        with LaidOut(program, "huge:1024") as process:
            _, before, _ = picture(ksmuctl, process.pid, file)
            process.step()
            _, after, _ = picture(ksmuctl, process.pid, file)
            if after["huge"] - before["huge"] < 1024:
                skip("map huge", "the kernel had no huge pages to give")
            else:
                check("map huge", (after["huge"], after["private"]) == (before["huge"] + 1024, before["private"]), (before, after))


def main():
    what, arguments = sys.argv[1], [os.path.abspath(a) for a in sys.argv[2:]]
    {"doctor": doctor_cases, "what_if": what_if_cases, "map": map_cases}[what](*arguments)
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    for name, why in skipped:
        print(f"skipped 1: {name}: {why}")
    for name in failed:
        print("FAILED", name.replace(" ", "_"))
    sys.exit(1 if failed else 0)


main()
