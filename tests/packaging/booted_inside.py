"""What booted_test.py runs as a service of the systemd that it boots: the packages as an administrator has them."""
import glob
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

PACKAGES = [name for p in ("libksmu0", "libksmu-dev", "ksmu") for name in glob.glob(f"/test/{p}_*.deb")]
DEFAULT, WEB = "/run/ksmu/default.sock", "/run/ksmu/ksmu-web.sock"
METRICS, PROM = "/run/ksmu/metrics.sock", "/var/lib/prometheus/node-exporter/ksmu.prom"
passed, failed = [], []


def run(*command, may_fail=True):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=120)
    return done.stdout.strip() if may_fail or done.returncode == 0 else sys.exit(f"{command}: {done.stdout}")


def check(name, good, what=""):
    (passed if good else failed).append(name)
    print(f"{'ok' if good else 'FAILED'} {name}{'' if good else ': ' + str(what)}", flush=True)


def state(unit):
    return run("systemctl", "is-active", unit)


def show(name, unit="ksmud.service"):
    return run("systemctl", "show", "--value", "-p", name, unit)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def knock(path):
    """Connects as a member does, and hears whose broker it is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(20)
        s.connect(path)
        return int.from_bytes(s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], sys.byteorder)


def status():
    """What the broker says of its domains, by the journal."""
    run("systemctl", "kill", "-s", "USR1", "ksmud.service")
    time.sleep(0.5)
    return run("journalctl", "-u", "ksmud", "-b", "-o", "cat", "--no-pager")


def shared(pattern):
    said = status().rsplit("listens on what it was handed", 1)[-1]  # what the last broker says
    found = re.findall(r"domain " + pattern + r": members (\d+), frames (\d+), .* merged (\d+) MiB", said)
    return found and int(found[-1][0]) == 2 and int(found[-1][1]) > 0 and int(found[-1][2]) >= 15


def members(user, **environment):
    variables = dict(os.environ, KSMU_CPU_LIMIT_PERCENT="100", KSMU_LOG="stderr", **environment)
    return [subprocess.Popen(["setpriv", "--reuid", user, "--regid", user, "--init-groups", "ksmuctl", "exec", "--", "python3", "/test/member.py"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables) for _ in range(2)]


def end(processes):
    return [p.communicate("")[0].strip() + f" ({p.returncode})" for p in processes]


def right(ends):
    return all(e.endswith("0 pages wrong (0)") for e in ends)


def service():
    check("after installation the socket listens, and no broker runs", state("ksmud.socket") == "active" and state("ksmud.service") == "inactive")
    check("it will after a boot", run("systemctl", "is-enabled", "ksmud.socket") == "enabled")
    user = knock(DEFAULT)
    check("who connects starts the broker", until(lambda: state("ksmud.service") == "active"), run("systemctl", "status", "ksmud"))
    check("members see root's broker", user == 0, user)
    pid = show("MainPID")
    check("which is the user ksmud's", run("ps", "-o", "user=", "-p", pid) == "ksmud", run("ps", "-fp", pid))
    check("without a privilege", "CapEff:\t0000000000000000" in open(f"/proc/{pid}/status").read())
    check("by io_uring, if the kernel permits it", "by io_uring" in status() or open("/proc/sys/kernel/io_uring_disabled").read().strip() != "0", status())
    seed = open("/run/ksmud/seed").read()

    run("systemctl", "restart", "ksmud")
    check("restart", state("ksmud.service") == "active" and state("ksmud.socket") == "active" and show("MainPID") != pid)
    check("the seed outlives it", open("/run/ksmud/seed").read() == seed)
    pid = show("MainPID")
    run("systemctl", "kill", "-s", "KILL", "ksmud")
    check("a broker that is killed comes back", until(lambda: state("ksmud.service") == "active" and show("MainPID") not in (pid, "0")))
    check("on the same socket", knock(DEFAULT) == 0)

    run("systemctl", "stop", "ksmud")
    check("stop", state("ksmud.service") == "inactive" and state("ksmud.socket") == "inactive" and not os.path.exists(DEFAULT),
          run("systemctl", "status", "ksmud.socket"))
    run("systemctl", "start", "ksmud")
    check("start", state("ksmud.service") == "active" and knock(DEFAULT) == 0, run("systemctl", "status", "ksmud"))

    with open("/etc/default/ksmud", "w") as f:
        f.write('KSMUD_OPTIONS="--nonsense"\n')
    run("systemctl", "reset-failed", "ksmud")  # or the limit of starts in ten seconds would do what is tested
    run("systemctl", "restart", "ksmud")
    time.sleep(3)
    said = run("journalctl", "-u", "ksmud", "-b", "-o", "cat", "--no-pager")
    check("usage is not tried again", state("ksmud.service") == "failed" and said.count("unknown option --nonsense") == 1, said[-600:])
    with open("/etc/default/ksmud", "w") as f:
        f.write('KSMUD_OPTIONS="--log info --max-frames 100000"\n')
    run("systemctl", "reset-failed", "ksmud", "ksmud.socket")
    run("systemctl", "restart", "ksmud")
    check("options", "--max-frames" in open(f"/proc/{show('MainPID')}/cmdline").read())


def accounts():
    run("useradd", "--system", "--groups", "ksmu", "alice", may_fail=False)
    run("groupadd", "--system", "ksmu-web", may_fail=False)
    run("useradd", "--system", "--groups", "ksmu,ksmu-web", "bob", may_fail=False)
    # As the rule for udev has it, which does not run here.
    if not os.path.exists("/dev/userfaultfd"):
        return
    run("chgrp", "ksmu", "/dev/userfaultfd", may_fail=False)
    run("chmod", "660", "/dev/userfaultfd", may_fail=False)


def nodes():
    """With nodes kept apart the broker makes calls that it makes nowhere else: the filter of the service has to permit them."""
    with open("/etc/default/ksmud", "w") as f:
        f.write('KSMUD_OPTIONS="--merge-across-nodes 0 --log info"\n')
    run("systemctl", "restart", "ksmud")
    said = run("journalctl", "-u", "ksmud", "-b", "-o", "cat", "--no-pager", "-n", "5")
    if "knows no NUMA nodes" in said or "without libnuma" in said:
        global skipped
        skipped += 1
        print("skipped 1: nodes kept apart: this kernel knows no NUMA nodes, or ksmud was built without libnuma")
    else:
        both = members("alice")
        check("nodes kept apart, two programs share", until(lambda: shared(r"default/\d+"), 60), status())
        ends = end(both)
        check("their bytes are right there", right(ends), ends)
    with open("/etc/default/ksmud", "w") as f:
        f.write('KSMUD_OPTIONS="--log info"\n')
    run("systemctl", "reset-failed", "ksmud", "ksmud.socket")
    run("systemctl", "restart", "ksmud")


def sharing():
    both = members("alice")
    alone = until(lambda: shared(r"default/\d+"), 60)
    check("two programs of a user's share their pages", alone, status())
    # The broker goes: nobody notices.
    run("systemctl", "restart", "ksmud")
    check("and again after a restart", until(lambda: shared(r"default/\d+"), 60), status())
    ends = end(both)
    check("their bytes are right", right(ends), ends)

    run("systemctl", "stop", "ksmud")
    run("systemctl", "enable", "--now", "ksmud@ksmu-web.socket")
    run("systemctl", "start", "ksmud")
    check("a named domain's socket", os.path.exists(WEB) and state("ksmud.service") == "active", run("systemctl", "status", "ksmud@ksmu-web.socket", "ksmud"))
    outside = subprocess.run(["setpriv", "--reuid", "alice", "--regid", "alice", "--init-groups", "python3", "-c",
                              f"import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect('{WEB}')"], capture_output=True, text=True)
    check("is closed to who is not in its group", "PermissionError" in outside.stderr, outside.stderr)
    both = members("bob", KSMU_DOMAIN="ksmu-web")
    check("members of a named domain share", until(lambda: shared("ksmu-web"), 60), status())
    ends = end(both)
    check("their bytes are right, too", right(ends), ends)


def scrape():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(20)
        s.connect(METRICS)
        s.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = ""
        while data := s.recv(65536):
            answer += data.decode()
    return answer


def metrics():
    """For Prometheus: what the administrator enables, and nobody else."""
    check("no metrics unless asked for", not os.path.exists(METRICS) and state("ksmu-textfile.service") == state("ksmu-metrics.socket") == "inactive")
    run("systemctl", "enable", "--now", "ksmu-metrics.socket")
    about = run("stat", "-c", "%A %U %G", METRICS)
    check("the socket of the metrics", about == "srw-rw---- root ksmud", about)
    answer = scrape()
    check("a scrape", answer.startswith("HTTP/1.1 200 ") and "\nksmu_up 1\n" in answer and 'ksmu_saved_bytes{domain="' in answer,
          answer + run("journalctl", "-u", "ksmu-metrics@*", "-b", "--no-pager"))
    check("and it leaves no unit behind", until(lambda: "ksmu-metrics@" not in run("systemctl", "list-units", "--all", "--plain", "--no-legend", "ksmu-metrics@*")),
          run("systemctl", "list-units", "--all", "ksmu-metrics@*"))
    if not os.path.exists(os.path.dirname(PROM)):
        run("systemctl", "start", "ksmu-textfile")
        check("nothing is started where node_exporter is not", state("ksmu-textfile") == "inactive" and not os.path.exists("/run/ksmu-textfile"))
        os.makedirs(os.path.dirname(PROM))
    run("systemctl", "enable", "--now", "ksmu-textfile")
    # As node_exporter does, as a user who is nobody here.
    found = until(lambda: "\nksmu_up 1\n" in run("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "cat", PROM))
    check("a file for node_exporter", found, run("ls", "-lL", PROM) + run("journalctl", "-u", "ksmu-textfile", "-b", "--no-pager"))
    check("by the broker's user", run("ps", "-o", "user=", "-p", show("MainPID", "ksmu-textfile")) == "ksmud")
    run("systemctl", "stop", "ksmu-textfile")
    check("it goes with the service", not os.path.lexists(PROM) and not os.path.exists("/run/ksmu-textfile"))
    run("systemctl", "start", "ksmu-textfile")


def files():
    """KSM's, by ksmu-fs: whoever of it is killed, they are there again."""
    if not os.path.exists("/dev/fuse"):
        global skipped
        skipped += 1
        print("skipped 1: ksmu-fs: there is no /dev/fuse here")
        return
    ksm = "/run/ksmu/sys/kernel/mm/ksm/"

    def read(name):
        try:
            return open(ksm + name).read().strip()
        except OSError as error:
            return error.strerror

    def write(name, text):
        with open(ksm + name, "w") as f:
            f.write(text)
    run("systemctl", "start", "ksmu-fs")
    check("ksmu-fs", state("ksmu-fs") == "active" and read("run") == "1", run("journalctl", "-u", "ksmu-fs", "-o", "cat", "--no-pager"))
    main = show("MainPID", "ksmu-fs")
    answers = open(f"/proc/{main}/task/{main}/children").read().split()
    about = open(f"/proc/{answers[0]}/status").read() if answers else ""
    check("who answers is the broker's user, without a privilege", "CapEff:\t0000000000000000" in about and run("ps", "-o", "user=", "-p", *answers) == "ksmud", about)
    both = members("alice")
    check("what is merged is shown", until(lambda: read("pages_sharing").isdigit() and int(read("pages_sharing")) > 0, 60), read("pages_sharing"))
    check("members", len(os.listdir(ksm + "members")) == 2, os.listdir(ksm + "members"))
    write("sleep_millisecs", "33")
    check("what is written is set", read("sleep_millisecs") == "33" and run("ksmuctl", "get", "sleep_millisecs", "--user", run("id", "-u", "alice")) == "33")
    for signal_, who in (("KILL", "main"), ("KILL", "all"), ("STOP", "all")):
        run("systemctl", "kill", "-s", signal_, "--kill-who", who, "ksmu-fs")
        check(f"after {signal_} of {who} the files are there again", until(lambda: read("run") == "1" and show("MainPID", "ksmu-fs") != main and state("ksmu-fs") == "active", 30),
              read("run") + "\n" + run("journalctl", "-u", "ksmu-fs", "-o", "short-monotonic", "--no-pager", "-n", "20"))
        main = show("MainPID", "ksmu-fs")
    check("merging has gone on", read("pages_sharing").isdigit() and int(read("pages_sharing")) > 0, read("pages_sharing"))
    ends = end(both)
    check("and bytes are right", right(ends), ends)
    # In KSM's place, for one service.
    unit = "/run/systemd/system/ksmu-tool.service"
    with open(unit, "w") as f:
        f.write("[Service]\nType=oneshot\nExecStart=sh -c 'cat /sys/kernel/mm/ksm/sleep_millisecs > /run/seen'\n")
    os.makedirs(unit + ".d", exist_ok=True)
    shutil.copy("/usr/share/doc/ksmu/examples/ksm-tree.conf", unit + ".d/")
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "ksmu-tool")
    if os.path.isdir("/sys/kernel/mm/ksm"):
        check("a tool sees it in KSM's place", os.path.exists("/run/seen") and open("/run/seen").read() == "33\n", run("journalctl", "-u", "ksmu-tool", "-o", "cat", "--no-pager"))
    run("systemctl", "stop", "ksmu-fs")
    check("stopped, nothing is mounted", state("ksmu-fs") == "inactive" and not os.path.ismount("/run/ksmu/sys"), run("mount"))


def exposure():
    text = run("systemd-analyze", "security", "--no-pager", "--json=short", "ksmud.service")
    worst = [line for line in json.loads(text) if line.get("exposure") and float(line["exposure"]) > 0.2] if text.startswith("[") else text
    check("little is exposed", isinstance(worst, list) and not worst, worst)


def removal():
    run("dpkg", "-r", "ksmu")
    paths = (DEFAULT, WEB, METRICS, PROM)
    check("removal ends all of it", not run("pgrep", "-x", "ksmud") and not run("pgrep", "-x", "ksmuctl") and not any(map(os.path.lexists, paths)),
          run("systemctl", "list-units", "--all", "ksmu*"))
    run("dpkg", "-i", *PACKAGES)
    check("installed again it is as before", state("ksmud.socket") == "active" and "--log info" in open("/etc/default/ksmud").read())
    run("systemctl", "start", "ksmud")
    pid = show("MainPID")
    said = run("dpkg", "-i", "--force-confold", *PACKAGES)
    check("an upgrade replaces the broker that runs", state("ksmud.service") == "active" and show("MainPID") != pid and knock(DEFAULT) == 0, said)
    said = run("dpkg", "-P", "ksmu", "libksmu-dev", "libksmu0")
    left = [p for p in (DEFAULT, "/run/ksmu", "/run/ksmud", "/run/ksmu-textfile", "/etc/ksmu", "/etc/default/ksmud", METRICS) if os.path.exists(p)]
    left += glob.glob("/etc/systemd/system/*/ksmu*-*") + glob.glob("/etc/systemd/system/*/ksmud*") + glob.glob("/etc/systemd/system/ksmud*")
    check("nothing is left", not left and "No such" not in said, f"{left}\n{said}")
    check("no account is left but one in use", not run("getent", "passwd", "ksmud") and run("getent", "group", "ksmu").endswith(":alice,bob"),
          run("getent", "group", "ksmu"))


said = run("dpkg", "-i", *PACKAGES)
check("installs without a word of warning", not re.search(r"warning|error|fail", said, re.I), said)
service()
skipped = 0
usable = not run("python3", "-c", "import os; os.open('/dev/userfaultfd', os.O_RDWR)")
accounts()
if usable:
    nodes()
    sharing()
    files()
else:
    skipped = 1
    print("skipped 1: /dev/userfaultfd cannot be opened here")
metrics()
exposure()
removal()
print(f"{len(passed)} passed, {len(failed)} failed, {skipped} skipped")
for name in failed:
    print(f"FAILED {name}")
