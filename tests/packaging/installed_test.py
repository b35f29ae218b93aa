#!/usr/bin/env python3
"""Installs the Debian packages into a root file system of its own (clean_root.py), where no systemd runs; uses them, and removes them.

  installed_test.py DIRECTORY-OF-THE-PACKAGES
"""
import os
import re
import signal
import subprocess
import sys
import time

import clean_root

HERE = os.path.dirname(os.path.abspath(__file__))
CONSUMER = os.path.join(clean_root.SOURCE, "tests/consumer")
STATUS = re.compile(r"domain \S+: members (\d+), frames (\d+), .* merged (\d+) MiB")
passed, failed = [], []


def check(name, good, what=""):
    (passed if good else failed).append(name)
    print(f"{'ok' if good else 'FAILED'} {name}{'' if good else ': ' + str(what)}", flush=True)


def members_share(root):
    """ksmud where root's is, and two programs that know nothing of it: of two equal memories one is left."""
    broker = root.start("ksmud", stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not os.path.exists(root.root + "/run/ksmu/default.sock") and time.monotonic() < deadline:
        time.sleep(0.05)
    members = [root.start("ksmuctl", "exec", "--stats", f"/tmp/stats-{i}:1", "--", "python3", "/tmp/member.py", stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, environment={"KSMU_CPU_LIMIT_PERCENT": "100", "KSMU_LOG": "stderr"})
               for i in range(2)]
    try:
        os.set_blocking(broker.stderr.fileno(), False)
        said, seen, deadline = "", None, time.monotonic() + 60
        while time.monotonic() < deadline and broker.poll() is None:
            broker.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
            said += broker.stderr.read() or ""
            found = STATUS.findall(said)
            seen = tuple(map(int, found[-1])) if found else None
            # Two times 8 MiB in the same 64 contents, each of which has 256 sharers at most.
            if seen and seen[0] == 2 and 0 < seen[1] <= 64 + 2 and seen[2] >= 15:
                break
        check("two programs share their pages", seen and seen[0] == 2 and 0 < seen[1] <= 66 and seen[2] >= 15, f"{seen}\n{said}")
        ends = [m.communicate("")[0].strip() + f" ({m.returncode})" for m in members]
        check("their bytes are right", all(e.endswith("0 pages wrong (0)") for e in ends), ends)
        broker.terminate()
        check("the broker ends", broker.wait(20) == 0 and not os.path.exists(root.root + "/run/ksmu/default.sock"), broker.returncode)
    finally:
        for process in [*members, broker]:
            if process.poll() is None:
                process.kill()
            process.wait()


def consumers(root):
    """As a program out there: against libksmu-dev, and nothing else."""
    os.mkdir(root.root + "/tmp/consumer")
    for name in ("CMakeLists.txt", "consumer.c", "consumer.cc"):
        root.copy(os.path.join(CONSUMER, name), "/tmp/consumer/")
    version = root.run("pkg-config", "--modversion", "ksmu").strip()
    for kind, flags in (("shared", "--cflags --libs"), ("static", "--static --cflags --libs")):
        root.run("sh", "-ec", f"cd /tmp/consumer; cc {'-static' if kind == 'static' else ''} consumer.c $(pkg-config {flags} ksmu) -o {kind}")
        said = root.run(f"/tmp/consumer/{kind}", version, may_fail=True)
        check(f"pkg-config, {kind}", said.strip() and "fail" not in said.lower(), said)
    root.run("cmake", "-S", "/tmp/consumer", "-B", "/tmp/consumer/build", "-DCONSUMER_LANGUAGES=CXX", f"-DCONSUMER_VERSION={version}")
    root.run("cmake", "--build", "/tmp/consumer/build")
    needed = root.run("readelf", "-d", "/tmp/consumer/build/shared")
    check("find_package", "libksmu.so.0" in needed and root.run("/tmp/consumer/build/shared", version), needed)
    # A package of somebody's that links the library gets its dependency from shlibs.
    os.mkdir(root.root + "/tmp/consumer/debian")
    with open(root.root + "/tmp/consumer/debian/control", "w") as f:
        f.write("Source: consumer\n\nPackage: consumer\nArchitecture: any\n")
    said = root.run("sh", "-c", "cd /tmp/consumer && dpkg-shlibdeps -O shared")
    check("shlibs", f"libksmu0 (>= {version})" in said, said)


def main():
    clean_root.need("dpkg-shlibdeps", "pkg-config", "cmake", "cc", "readelf")
    packages = clean_root.find_packages(sys.argv[1])
    root = clean_root.CleanRoot()
    try:
        root.mount_proc()
        for path in [*packages, os.path.join(HERE, "member.py")]:
            root.copy(path, "/tmp/")
        before = {path for path in root.left(())}
        accounts = root.run("cat", "/etc/passwd", "/etc/group")
        said = root.run("dpkg", "-i", *("/tmp/" + os.path.basename(p) for p in packages))
        check("installs without a word of warning", not re.search(r"warning|error|fail", said, re.I), said)
        check("user and groups", root.run("getent", "passwd", "ksmud") and root.run("getent", "group", "ksmu", "ksmud"))
        check("the shim is where it is looked for", "libksmu_preload" in root.run("ksmuctl", "exec", "--", "grep", "-o", "libksmu_preload", "/proc/self/maps"))
        check("manual pages are found", "ksmud" in root.run("man", "-w", "8", "ksmud") and "libksmu" in root.run("man", "-w", "3", "libksmu"))
        consumers(root)
        usable = subprocess.run([os.path.join(clean_root.SOURCE, "scripts/check-kernel")], capture_output=True, text=True)
        if usable.returncode == 0:
            members_share(root)
        else:
            print(f"skipped 1: {usable.stderr.strip()}")
        # A file that the administrator has changed stays when the package is removed, and goes when it is purged.
        with open(root.root + "/etc/default/ksmud", "a") as f:
            f.write('KSMUD_OPTIONS="--log info"\n')
        root.run("dpkg", "-i", "/tmp/" + os.path.basename(packages[-1]))
        root.run("dpkg", "-r", "ksmu")
        check("configuration outlives removal", os.path.exists(root.root + "/etc/default/ksmud") and not os.path.exists(root.root + "/usr/bin/ksmud"))
        said = root.run("dpkg", "-P", "ksmu", "libksmu-dev", "libksmu0")
        check("purges without a word of warning", not re.search(r"warning|error|fail", said, re.I), said)
        left = root.left(before)
        check("nothing is left", not left, left)
        check("no account is left", root.run("cat", "/etc/passwd", "/etc/group") == accounts)
        check("ldconfig knows it no more", "libksmu" not in root.run("ldconfig", "-p"))
    finally:
        root.close()
    skipped = 0 if usable.returncode == 0 else 1
    print(f"{len(passed)} passed, {len(failed)} failed, {skipped} skipped")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


sys.exit(main())
