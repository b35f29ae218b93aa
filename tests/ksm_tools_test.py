#!/usr/bin/env python3
"""Tools that know the kernel's KSM drive ksmu, unmodified, where ksmu-fs's tree is bound over KSM's; and the commands of operators' pages.

  ksm_tools_test.py WHAT KSMUD KSMU_FS KSMUCTL SHIM
    seeds      what operators' pages tell to type, with ksmu's path in the place of KSM's
    ksmtuned   Debian's, by load
    exporter   prometheus-node-exporter's ksmd collector
    virsh      libvirtd and virsh node-memory-tune
    kernel     the kernel's own tests of KSM (linux-source-6.1), under the shim

In a mount namespace of its own: the machine's KSM is neither seen nor changed.
"""
import ctypes
import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "preload"))
from control_support import Broker, Checks, Member, PAGES, usable, wait_for  # noqa: E402
from support import environment, skip, tool  # noqa: E402

KSM = "/sys/kernel/mm/ksm"
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 0x4000, 1 << 18
checks = Checks()
check = checks.check


class Machine:
    """A broker, and its tree in KSM's place."""

    def __init__(self, ksmud, fs, ctl, shim, directory):
        self.directory, self.shim, self.ctl = directory, os.path.abspath(shim), os.path.abspath(ctl)
        self.broker = Broker(ksmud, ctl, directory)
        self.tree = directory + "/sys"
        self.fs = subprocess.Popen([fs, self.tree, "--socket", self.broker.socket], env=environment(), stdin=subprocess.DEVNULL)
        self.members = []
        self.ksm = self.tree + "/kernel/mm/ksm"
        if not wait_for(lambda: os.path.exists(self.ksm + "/run"), 20):
            raise RuntimeError("ksmu-fs does not come up")
        subprocess.run(["mount", "--bind", self.ksm, KSM], check=True)

    def join(self, count=2):
        self.members += [Member(self.shim, self.broker.socket) for _ in range(count)]

    def leave(self):
        for member in self.members:
            member.end()
        self.members = []

    def read(self, name):
        with open(f"{KSM}/{name}") as f:
            return f.read().strip()

    def number(self, name):
        return int(self.read(name))

    def end(self):
        self.leave()
        subprocess.run(["umount", "-l", KSM], check=False)
        self.fs.terminate()
        self.fs.wait(20)
        subprocess.run(["umount", "-l", self.tree], check=False, stderr=subprocess.DEVNULL)
        self.broker.end()


def own_mounts():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        skip("no mount namespace of its own: " + os.strerror(ctypes.get_errno()))


def own_etc(machine):
    """An /etc in which a test may write."""
    etc = machine.directory + "/etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    subprocess.run(["mount", "--bind", etc, "/etc"], check=True)
    return etc


def shell(command, **more):
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, errors="replace", timeout=120, check=False, env=environment(**more))


# --- operators' pages --------------------------------------------------------------------------------------------------


def seeds(machine):
    machine.join()
    sys_ = machine.ksm
    check("merged", wait_for(lambda: machine.number("pages_sharing") >= PAGES // 2))
    # "Verifying Kernel KSM Support": not needed, and doctor says so of this kernel.
    config = f"/boot/config-{os.uname().release}"
    if os.path.exists(config):
        check("grep KSM in the boot config", shell(f"grep KSM {config}").returncode == 0)
    else:
        checks.skip("grep KSM in the boot config", f"there is no {config}")
    # "To verify, type": by default half of the memory.
    half = os.sysconf("SC_PHYS_PAGES") // 2
    check("cat max_kernel_pages", shell(f"cat {sys_}/max_kernel_pages").stdout == f"{half}\n")
    check("cat pages_sharing", int(shell(f"cat {sys_}/pages_sharing").stdout) > 0)
    lines = shell(f"grep -H '' {sys_}/pages_*").stdout.splitlines()
    check("grep -H '' pages_*", [line.split(":")[0].rsplit("/", 1)[1] for line in lines] ==
          ["pages_scanned", "pages_shared", "pages_sharing", "pages_skipped", "pages_to_scan", "pages_unshared", "pages_volatile"] and all(re.fullmatch(r".*:\d+", line) for line in lines), lines)
    check("echo 0 > run", shell(f"echo 0 > {sys_}/run").returncode == 0 and machine.read("run") == "0")
    check("what is merged stays", machine.number("pages_sharing") > 0)
    check("echo 2 > run", shell(f"echo 2 > {sys_}/run").returncode == 0 and wait_for(lambda: machine.number("pages_sharing") == 0, 20))
    check("write merge_across_nodes", shell(f"echo 0 > {sys_}/merge_across_nodes").returncode == 0 and machine.read("merge_across_nodes") == "0")
    check("and back", shell(f"echo 1 > {sys_}/merge_across_nodes").returncode == 0)
    check("echo 1 > run", shell(f"echo 1 > {sys_}/run").returncode == 0 and wait_for(lambda: machine.number("pages_sharing") >= PAGES // 2, 60), machine.broker.ctl("status"))
    # "madvise(new_block->host, size, MADV_MERGEABLE);"
    machine.leave()
    check("all have left", wait_for(lambda: machine.number("pages_shared") == 0, 20))
    source = machine.directory + "/advises.c"
    with open(source, "w") as f:
        f.write("""#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
int main(void) {
  char *at = mmap(0, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(at, 7, 4 << 20);
  if (madvise(at, 4 << 20, MADV_MERGEABLE)) return 1;
  return getchar() == 'q' ? 0 : 2;
}
""")
    program = machine.directory + "/advises"
    if not shutil.which("cc"):
        checks.skip("the program that advises", "there is no C compiler")
        return
    subprocess.run(["cc", "-o", program, source], check=True)
    one = subprocess.Popen([machine.ctl, "exec", "--", program], stdin=subprocess.PIPE, text=True, env=environment(KSMU_BROKER=machine.broker.socket))
    check("the program that advises", wait_for(lambda: machine.number("pages_sharing") >= 1000), machine.broker.ctl("status"))
    one.communicate("q", timeout=20)
    check("and ends", one.returncode == 0, one.returncode)


# --- ksmtuned ----------------------------------------------------------------------------------------------------------


def ksmtuned(machine):
    program, qemu = tool("ksmtuned"), tool("qemu-system-x86_64")
    if not program:
        skip("ksmtuned is not there")
    if not qemu:
        skip("qemu-system-x86_64 is not installed: ksmtuned looks at its processes")
    memory = {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/meminfo")}
    free = memory["MemFree"] + memory["Buffers"] + memory["Cached"]
    if free < 1500 * 1024:
        skip("less than 1.5 GiB are free")
    config = machine.directory + "/ksmtuned.conf"
    with open(config, "w") as f:
        # An hour: what it does, it does when it is told that guests have changed. Enough memory now; not with another 700 MiB taken.
        f.write(f"KSM_MONITOR_INTERVAL=3600\nKSM_NPAGES_BOOST=300\nKSM_NPAGES_DECAY=-50\nKSM_NPAGES_MIN=64\nKSM_NPAGES_MAX=1250\nKSM_THRES_COEF=0\nKSM_THRES_CONST={free - 300 * 1024}\nPIDFILE={machine.directory}/ksmtuned.pid\n")
    shutil.copy(config, own_etc(machine) + "/ksmtuned.conf")  # it looks for that in /etc alone
    machine.join()
    # What goes on is a child of what is started, under a number that it writes down.
    subprocess.run(["bash", program], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=30, check=True)
    with open(machine.directory + "/ksmtuned.pid") as f:
        daemon = int(f.read())
    guest = None

    def retune():
        os.kill(daemon, signal.SIGUSR1)
    try:
        time.sleep(1)  # it sets its trap
        retune()
        check("enough memory: it stops merging", wait_for(lambda: machine.read("run") == "0", 30), machine.read("run"))
        guest = subprocess.Popen([qemu, "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-machine", "memory-backend=ram", "-m", "700",
                                  "-object", "memory-backend-ram,id=ram,size=700M,prealloc=on"], env=environment(), stdin=subprocess.DEVNULL)

        def grown():
            with open(f"/proc/{guest.pid}/statm") as f:
                return int(f.read().split()[1]) * 4096 > 700 << 20
        check("the guest has its memory", wait_for(grown, 30))
        retune()
        check("little memory: it merges", wait_for(lambda: machine.read("run") == "1", 30), machine.read("run"))
        check("and faster", wait_for(lambda: machine.number("pages_to_scan") >= 64, 10) and machine.number("sleep_millisecs") >= 10, (machine.read("pages_to_scan"), machine.read("sleep_millisecs")))
        check("members do so", wait_for(lambda: all(m["tunables"]["run"] == 1 and m["tunables"]["pages_to_scan"] >= 64 for m in machine.broker.json("members")), 20), machine.broker.json("members"))
        check("and merge", wait_for(lambda: machine.number("pages_sharing") >= PAGES // 2, 60), machine.broker.ctl("status"))
        before = machine.number("pages_to_scan")
        retune()
        check("faster still", wait_for(lambda: machine.number("pages_to_scan") > before, 20), machine.read("pages_to_scan"))
        guest.kill()
        guest.wait()
        time.sleep(1)
        retune()
        check("the guest has gone: it stops", wait_for(lambda: machine.read("run") == "0", 30), machine.read("run"))
        check("bytes", all(m.is_right() for m in machine.members))
    finally:
        if guest and guest.poll() is None:
            guest.kill()
            guest.wait()
        # Its sleep is a child of its own, which would outlive it.
        with open(f"/proc/{daemon}/task/{daemon}/children") as f:
            children = f.read().split()
        for one in [daemon, *map(int, children)]:
            os.kill(one, signal.SIGKILL)


# --- node_exporter -----------------------------------------------------------------------------------------------------


def exporter(machine):
    program = tool("prometheus-node-exporter")
    if not program:
        skip("prometheus-node-exporter is not there")
    machine.join()
    check("merged", wait_for(lambda: machine.number("pages_sharing") >= 2 * PAGES * 7 // 8 - PAGES))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    one = subprocess.Popen([program, "--collector.disable-defaults", "--collector.ksmd", f"--path.sysfs={machine.tree}", f"--web.listen-address=127.0.0.1:{port}",
                            "--log.level=error"], env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def metrics():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                return {m[1]: float(m[2]) for m in re.finditer(r"^(node_ksmd_\w+|node_scrape_collector_success)\S* (\S+)$", answer.read().decode(), re.M)}
        except OSError:
            return {}
    try:
        check("it answers", wait_for(metrics, 20))
        seen = metrics()
        status = machine.broker.json("status")[0]
        check("its collector works", seen.get("node_scrape_collector_success") == 1, seen)
        check("shared", seen.get("node_ksmd_pages_shared") == status["frames"], (seen, status["frames"]))
        check("sharing", seen.get("node_ksmd_pages_sharing") == status["counters"]["pages_merged"] - status["frames"], seen)
        for name in ("full_scans_total", "merge_across_nodes", "pages_to_scan", "pages_unshared", "pages_volatile", "run", "sleep_seconds"):
            check(f"node_ksmd_{name}", f"node_ksmd_{name}" in seen, seen)
        check("run", seen.get("node_ksmd_run") == 1 and seen.get("node_ksmd_merge_across_nodes") == 1)
    finally:
        one.kill()
        one.wait()


# --- libvirt -----------------------------------------------------------------------------------------------------------


def virsh(machine):
    daemon, client = tool("libvirtd"), tool("virsh")
    if not client or not daemon:
        skip("libvirtd or virsh is not installed")
    run = machine.directory + "/run"
    os.makedirs(run)
    config = machine.directory + "/libvirtd.conf"
    with open(config, "w") as f:
        f.write(f'listen_tls = 0\nlisten_tcp = 0\nunix_sock_dir = "{run}"\nauth_unix_ro = "none"\nauth_unix_rw = "none"\nlog_outputs = "3:stderr"\n')
    # Users that the package libvirt-daemon-system makes, which starts services; it looks for them whoever its guests are to be.
    etc = own_etc(machine)
    os.makedirs(etc + "/libvirt", exist_ok=True)
    for name, line in (("passwd", "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n"), ("group", "libvirt-qemu:x:64055:\n"),
                       ("libvirt/qemu.conf", 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\n')):
        with open(f"{etc}/{name}", "a") as f:
            f.write(line)
    # What it would leave on the machine.
    for place in ("/run", "/var/lib", "/var/cache", "/var/log"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    one = subprocess.Popen([daemon, "--config", config, "--pid-file", run + "/pid"], env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def tune(*arguments):
        done = subprocess.run([client, "-c", f"qemu+unix:///system?socket={run}/libvirt-sock", "node-memory-tune", *arguments], capture_output=True, text=True, timeout=60,
                              env=environment(), check=False)
        return done.returncode, done.stdout + done.stderr
    try:
        if not wait_for(lambda: tune()[0] == 0, 30):
            skip(f"libvirtd with the QEMU driver does not come up here: {tune()[1].strip()}")
        shown = tune()
        check("what it shows", re.search(r"shm_sleep_millisecs\s+20", shown[1]) and re.search(r"shm_merge_across_nodes\s+1", shown[1]), shown)
        check("--shm-merge-across-nodes 0", tune("--shm-merge-across-nodes", "0")[0] == 0 and machine.read("merge_across_nodes") == "0", tune())
        check("the broker has it", machine.broker.value("merge_across_nodes") == "0")
        check("--shm-pages-to-scan", tune("--shm-pages-to-scan", "200")[0] == 0 and machine.broker.value("pages_to_scan") == "200")
        machine.join()
        check("merged within nodes", wait_for(lambda: machine.number("pages_sharing") >= PAGES // 2, 60), machine.broker.ctl("status"))
        refused = tune("--shm-merge-across-nodes", "1")
        check("not while pages are shared", refused[0] != 0 and machine.read("merge_across_nodes") == "0", refused)
    finally:
        one.terminate()
        one.wait(30)


# --- the kernel's own tests --------------------------------------------------------------------------------------------


def kernel(machine):
    unpacked = os.path.dirname(HERE) + "/build/unpacked/usr/src/linux-source-6.*.tar.xz"
    archive = next(iter(glob.glob("/usr/src/linux-source-6.*.tar.xz") + glob.glob(unpacked)), None)
    if not archive:
        skip("linux-source-6.1 is not there")
    if not shutil.which("cc"):
        skip("there is no C compiler")
    name = os.path.basename(archive)[:-len(".tar.xz")]
    inside = f"{name}/tools/testing/selftests"
    subprocess.run(["tar", "xf", archive, "-C", machine.directory, f"{inside}/vm", f"{inside}/kselftest.h", f"{name}/include/vdso"], check=True)
    where = f"{machine.directory}/{inside}/vm"
    made = subprocess.run(["cc", "-O1", "-w", "-I..", "-I../../../..", "-o", "ksm_tests", "ksm_tests.c", *(["vm_util.c"] if os.path.exists(where + "/vm_util.c") else []), "-lnuma"], cwd=where,
                          capture_output=True, text=True, check=False)
    if made.returncode:
        skip("the kernel's ksm_tests cannot be built here: " + made.stderr.strip().splitlines()[-1])

    def run(*arguments):
        done = subprocess.run([machine.ctl, "exec", "--", "./ksm_tests", *arguments], cwd=where, capture_output=True, text=True, timeout=200, check=False,
                              env=environment(KSMU_BROKER=machine.broker.socket))
        return done.returncode, (done.stdout + done.stderr).strip()
    for case in (["-M"], ["-M", "-p", "10"], ["-M", "-p", "300"], ["-U"], ["-Z", "-z", "1"], ["-Z", "-p", "10", "-z", "0"], ["-N", "-m", "1"], ["-P", "-s", "40"], ["-H", "-s", "40"], ["-C", "-p", "100"]):
        code, said = run(*case)
        text = "ksm_tests " + " ".join(case)
        if code == 4:  # KSFT_SKIP
            checks.skip(text, said.splitlines()[-1] if said else "it says nothing")
        else:
            check(text, code == 0, (code, said))


def main():
    what, ksmud, fs, ctl, shim = sys.argv[1:]
    if os.geteuid() != 0:
        skip("needs root, for a mount namespace")
    if not os.path.exists("/dev/fuse") or not os.path.isdir(KSM):
        skip("there is no /dev/fuse, or no " + KSM)
    good, why = usable(shim)
    if not good:
        skip(f"the library cannot start here: {why}")
    own_mounts()
    with tempfile.TemporaryDirectory(prefix="ksmu-tools-") as directory:
        machine = Machine(ksmud, fs, ctl, shim, directory)
        try:
            {"seeds": seeds, "ksmtuned": ksmtuned, "exporter": exporter, "virsh": virsh, "kernel": kernel}[what](machine)
        finally:
            machine.end()
    checks.finish()


main()
