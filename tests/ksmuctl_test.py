#!/usr/bin/env python3
"""The commands of ksmuctl that look at the machine and at processes.

  ksmuctl_test.py doctor KSMUCTL KSMUD   each situation that it has to name, made to happen to a child
"""
import ctypes
import gzip
import json
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

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
    expect("KSM, not on ksmu's", ksm | ours | {"proc/78/ksm_stat": "ksm_rmap_items 0\nksm_merge_any: no\n"}, "ksm", "warning", "beside ksmu", "")


def filters(doctor):
    if platform.machine() not in NUMBERS:
        return skip("filters", f"the numbers of system calls of {platform.machine()} are not written down")
    if run(["true"], filter_calls(["fallocate"]))[0] != 0:
        return skip("filters", "seccomp filters are not permitted here")
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


def main():
    what, arguments = sys.argv[1], [os.path.abspath(a) for a in sys.argv[2:]]
    {"doctor": doctor_cases}[what](*arguments)
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    for name, why in skipped:
        print(f"skipped 1: {name}: {why}")
    for name in failed:
        print("FAILED", name.replace(" ", "_"))
    sys.exit(1 if failed else 0)


main()
