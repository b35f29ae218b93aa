#!/usr/bin/env python3
"""Other kernels than this machine's, each in a QEMU by software emulation:

  kernels_test.py works BUILD WORK [PROGRAM...]
      on the kernel of Debian 12's backports (6.12), with two NUMA nodes: the programs of BUILD/tests, and cases of
      program.c with the shim and without it. PROGRAM: that alone, all of it (`shim`: program.c's cases)
  kernels_test.py refused BUILD WORK
      on a kernel that is too old (Debian 12's own, 6.1): the library says so, and under the shim programs get what the
      kernel gives them; what they advise it merges

BUILD is a build's directory. WORK keeps the kernels between runs. Short: some of most programs. KSMU_TEST_LONG=1: all.

The guest has an initramfs alone: busybox, the programs and their libraries. What they print comes by its console and is
printed again here, each case with the kernel's version before its name; run_test counts them. What the kernel warns of
while a program runs is a failure of its own.
"""
import glob
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time

import guest
from support import skip

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
LIMIT = 7200 if LONG else 900  # seconds of a program, the guest's; and of silence, ours
SUITE = "bookworm-backports"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# program: (short form, long form). A form is GoogleTest's filter, or arguments (with two dashes); "" is everything,
# None nothing. All is some 20 times slower than on the machine itself: short is what is about the kernel, and of the
# rest what is quick.
PROGRAMS = {
    "kernel_semantics_test": ("-*.MapLimit", ""),
    "kernel_semantics_system_test": ("", ""),
    "kernel_semantics_pins_test": ("", ""),
    "early_start_test": ("", ""),
    "counts_test":
        ("*.ZeroPages/CallExact:*.Unmerge/*Exact:*.ForeignUserfaultfd/*Exact:*.DiscardedPagesReadZero/*Exact", ""),
    "fork_test": ("*.Reads/*:*.RawDiscard/*Exact", ""),
    "stress_test": ("--seconds 6", "--seconds 60"),
    "race_test": ("--filter exact/merge/merge.taken/", "--jobs 2"),
    "numa_test": ("", ""),
    "bad_input_test": ("*Einval*:*Holes*:*Eopnotsupp*", ""),
    "maps_test": ("*.MremapOfWhatWasUnmerged", ""),
    "limits_test": (None, ""),
    "process_test": (None, ""),
    "huge_test": (None, ""),
    "log_test": (None, ""),
    "start_stop_test": (None, ""),
    "fork_overlap_test": (None, ""),
    "fork_wait_test": (None, ""),
    "seccomp_test": (None, ""),
}
# Cases of program.c in the short form; the long one has all of them.
SHORT_CASES = ("write", "discard", "wipe", "collapse", "protect", "move", "unmergeable", "fork", "clone", "userfaultfd",
               "memory_merge")

# Cases that may fail here for a reason that is no fault of the library's: then they are skipped, with the reason.
NOT_HERE = {
    "KernelRemap.EmptyMappingMovedIntoPlaceJoinsWhatLiesBesideIt":
        "before 6.16 a mapping with pages and one without are not joined; once both have some they are, as must be",
    "BadInput.EopnotsuppKinds":
        "takes for granted that reading smaps costs less than 2 ms: where it costs more, not every call looks at it",
}

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib GTEST_COLOR=no KSMU_TEST_KSMUD=/tests/ksmud
shim=LD_PRELOAD=/lib/libksmu_preload.so
cd /tests
dmesg -n 1
dmesg -c > /dev/null

# Where the threads of a program hang that has not ended in time.
threads() {
  for process in /proc/[0-9]*; do
    case "$(readlink $process/exe)" in /tests/*) ;; *) continue ;; esac
    for thread in $process/task/*; do
      echo "thread ${thread##*/} $(cat $thread/comm): $(grep State: $thread/status) syscall=$(cat $thread/syscall)"
      cat $thread/stack
    done
  done
}
end_all() {
  for process in /proc/[0-9]*; do
    case "$(readlink $process/exe)" in /tests/*) kill -KILL ${process##*/} ;; esac
  done
}
# run NAME SECONDS COMMAND...
run() {
  name=$1 left=$(($2 * 2))
  shift 2
  echo "GUEST BEGIN $name"
  rm -f /tmp/status
  ("$@" < /dev/null 2>&1; echo $? > /tmp/status.new; mv /tmp/status.new /tmp/status) &
  while [ ! -e /tmp/status ]; do
    sleep 0.5
    left=$((left - 1))
    [ $left = 0 ] && { echo "GUEST LATE"; threads; end_all; }
  done
  wait
  dmesg -c | grep -E 'BUG:|WARNING:|Oops|general protection' | grep -v 'soft lockup' | sed 's/^/GUEST KERNEL /'
  echo "GUEST END $name $(cat /tmp/status)"
}
# same NAME CASE [VARIABLE=VALUE...]: the same from tests/preload/program.c with the shim as without it.
same() {
  case=$1
  shift
  (./preload_program $case; echo "status $?") > /tmp/plain
  (env "$@" $shim ./preload_program $case; echo "status $?") | grep -v "$left_out" > /tmp/shim
  cmp -s /tmp/plain /tmp/shim || { diff -U 0 /tmp/plain /tmp/shim; return 1; }
}
left_out='^nothing is left out$'
"""

REFUSED = """
# Where the library is, the cases notice that it merges nothing, and say so.
left_out='^MERGED ONLY -1 of\\|^merged only 0$\\|^merged -*[0-9]*, \\(broken\\|tracked\\) \\|^not taken up again: -100$'

# Advice as without the shim: the kernel is told, and the log says why.
told() {
  (./preload_program kernel; echo "status $?") > /tmp/plain
  rm -f /tmp/log
  (env $shim KSMU_LOG=/tmp/log "$@" ./preload_program kernel; echo "status $?") > /tmp/shim
  cat /tmp/log
  cmp /tmp/plain /tmp/shim && grep -q "told: 1" /tmp/shim &&
    grep -q "not merging here: .*Linux 6.8.*lacks: UFFDIO_MOVE" /tmp/log
}
# Silent, without a log.
silent() {
  [ "$(env $shim "$@" ./preload_program is_merging 2>&1)" = 0 ]
}
"""


def output(*command, cwd=None):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True).stdout


def apt_options(work):
    """Of an apt whose one source is SUITE, at the mirror that this machine's Debian comes from. The system's stay."""
    if not all(shutil.which(tool) for tool in ("apt-get", "apt-cache", "dpkg")):
        skip("there is no apt to fetch a guest kernel with")
    form = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"
    known = output("apt-get", "indextargets", "--format", form, "Identifier: Packages")
    mirrors = re.findall(r"^Debian\|Debian\|main\|(\S+)$", known, re.M)
    if not mirrors:
        skip(f"apt has no source that is Debian's, or its lists are not there: {SUITE} cannot be found")
    for folder in ("lists/partial", "cache/archives/partial", "parts"):
        os.makedirs(os.path.join(work, folder), exist_ok=True)
    with open(os.path.join(work, "sources"), "w") as f:
        f.write(f"deb {f'[signed-by={KEYRING}] ' if os.path.exists(KEYRING) else ''}{mirrors[0]} {SUITE} main\n")
    settings = {"Dir::State::Lists": "lists", "Dir::Cache": "cache", "Dir::Etc::SourceList": "sources",
                "Dir::Etc::SourceParts": "parts"}
    return [f"-o{name}={os.path.join(work, value)}" for name, value in settings.items()]


def find_backports_kernel(work):
    tree = os.path.join(work, SUITE)
    if not glob.glob(os.path.join(tree, "boot", "vmlinuz-*")):
        with tempfile.TemporaryDirectory() as private:
            os.chmod(private, 0o755)  # apt reads as a user of its own
            options = apt_options(private)
            output("apt-get", "-qq", *options, "update")
            names = output("apt-cache", *options, "depends", "linux-image-cloud-amd64")
            found = re.search(r"Depends: (linux-image-\S+)", names)
            if found:
                output("apt-get", "-qq", *options, "download", found[1], cwd=private)
            packages = glob.glob(os.path.join(private, "linux-image-*.deb"))
            if not packages:
                skip(f"the guest's kernel (linux-image-cloud-amd64 of {SUITE}) cannot be fetched")
            os.makedirs(work, exist_ok=True)
            subprocess.run(["dpkg", "-x", packages[0], tree], check=True)
    return glob.glob(os.path.join(tree, "boot", "vmlinuz-*"))[0]


def release_of(kernel):
    """6.1.0-56-cloud-amd64: a bzImage has the offset of it in its header."""
    image = guest.content(kernel)
    at, = struct.unpack_from("<H", image, 0x20e)
    return image[at + 0x200:].split(b" ", 1)[0].decode()


def programs_and_libraries(build, names, work):
    """For the initramfs: the programs in /tests and what they are linked with in /lib, without what debuggers want."""
    sources = {f"tests/{name}": os.path.join(build, "tests", name) for name in names}
    sources |= {f"tests/{name}": os.path.join(build, "src", name) for name in ("ksmuctl", "ksmud")}
    sources |= {f"lib/{name}": os.path.join(build, "src", name) for name in ("libksmu_preload.so", "libksmu.so.0")}
    for path in list(sources.values()):
        for library in re.findall(r"(/\S+) \(0x", output("ldd", path)):
            place = "lib64/" if "/ld-linux" in library else "lib/"
            sources.setdefault(place + os.path.basename(library), library)
    strip = shutil.which("strip")
    files = [(folder, 0o40755, b"") for folder in ("tests", "lib64", "etc", "var", "var/tmp")]
    for name, path in sources.items():
        slim = os.path.join(work, "slim")
        if strip and subprocess.run([strip, "-g", "-o", slim, path], capture_output=True).returncode == 0:
            path = slim
        files.append((name, 0o100755, guest.content(path)))
    return files


def ours(name, form):
    """A line for the guest: a program in one of its forms."""
    if form is None:
        return ""
    arguments = form if form.startswith("--") else f"'--gtest_filter={form}'" if form else ""
    return f"run {name} {LIMIT} ./{name} {arguments}\n"


BANNERS = {"OK": "[       OK ]", "FAILED": "[  FAILED  ]", "SKIPPED": "[  SKIPPED ]"}


def only_too_few(lines):
    """Whether stress_test found nothing but that it had done less than a machine does in that time."""
    failures = [line for line in lines if line.startswith("FAILED")]
    done = re.search(r"^stress_test: merges (\d+), breaks (\d+),", "\n".join(lines), re.M)
    enough = done and int(done[1]) >= 1000 and int(done[2]) >= 100
    return enough and failures and all("too few" in line for line in failures)


class Results:
    """The console's lines as they come, as those of one GoogleTest program."""

    def __init__(self, release):
        self.release = release
        self.program = self.case = None
        self.cases = self.failed = 0

    def name(self, case):
        return f"{self.release}:{case}"

    def case_begins(self, case):
        self.case = case
        self.cases += 1
        print(f"[ RUN      ] {self.name(case)}", flush=True)

    def case_ends(self, how, took=""):
        case, self.case = self.case, None
        if how == "FAILED" and case in NOT_HERE:
            print(NOT_HERE[case])
            how = "SKIPPED"
            self.excused += 1
        if how == "FAILED":
            self.failed += 1
            self.failed_here += 1
        print(f"{BANNERS[how]} {self.name(case)}{took}", flush=True)

    def whole(self, case, how, *lines):
        self.case_begins(case)
        for line in lines:
            print(line)
        self.case_ends(how)

    def line(self, text):
        said = re.match(r"GUEST (BEGIN|END|KERNEL|NUMA)(?: (.*))?$", text)
        began = re.match(r"\[ RUN +\] (\S+)$", text)
        ended = re.match(r"\[ +(OK|FAILED|SKIPPED) +\] (\S+?)(?:, where .*)?( \(\d+ ms\))?$", text)
        if said and said[1] == "NUMA":
            print("NUMA:", said[2])
        elif said and said[1] == "BEGIN":
            self.program, self.gtest, self.failed_here, self.excused, self.kernel = said[2], False, 0, 0, []
            self.lines = []
        elif said and said[1] == "KERNEL":
            self.kernel.append(said[2])
        elif said and said[1] == "END":
            self.program_ends(*said[2].split())
        elif began:
            self.gtest = True
            self.case_begins(began[1])
        elif ended and ended[2] == self.case:
            self.case_ends(ended[1], ended[3] or "")
        elif self.case:
            print(text)
        elif self.program and not self.gtest:
            self.lines.append(text)

    def program_ends(self, program, status):
        how = {"0": "OK", "77": "SKIPPED"}.get(status, "FAILED")
        if program == "stress_test" and how == "FAILED" and only_too_few(self.lines):
            how = "OK"
        if not self.gtest:  # a program with a main of its own: one case
            self.whole(program, how, *self.lines[:50], *self.lines[50:][-400:], *([f"status {status}"] if how == "FAILED" else []))
        elif self.case:  # it has not ended
            print(f"{program} ended in it with status {status}")
            self.case_ends("FAILED")
        elif how == "FAILED" and not self.failed_here and not self.excused:
            self.whole(program, how, f"ended with status {status}")
        if self.kernel:
            self.whole(program + ",_the_kernel's_log", "FAILED", *self.kernel)
        self.program = None


def run(work, kernel, files, script, memory, more):
    """Boots it, and follows its console to its end. True: something failed."""
    initrd, results, at, told = os.path.join(work, "initrd"), Results(release_of(kernel)), 0, time.time()
    init = INIT + script + "\necho 'GUEST OVER'\nreboot -f\n"
    guest.initramfs(initrd, init=init, more=files)
    machine = guest.Guest(work, "guest", kernel, initrd, memory, more=more)
    try:
        while True:
            ended = machine.process.poll() is not None
            said = machine.said()
            *lines, _unfinished = said[at:].split("\n")
            for line in lines:
                at += len(line) + 1
                results.line(line.rstrip("\r"))
                told = time.time()
            over = "GUEST OVER\n" in said
            if over or ended or time.time() - told > LIMIT:
                break
            time.sleep(0.2)
        if not over:
            if not results.case:
                results.case_begins(results.program or "boot")
            print(said[-3000:], machine.complaints(), sep="\n")
            results.case_ends("FAILED")
    finally:
        machine.end()
    return results


# Without cmpxchg16b: QEMU 7.2 leaves wrong flags behind, and Linux 6.12 dies of it in its allocator.
CPU = ("-cpu", "max,-cx16")
# Two CPUs that take turns, and whose time is what they have done: 1 ns for an instruction. So the limits of time in the
# tests mean what they do on a machine, however slow the emulation is and whatever else goes on here. (On a thread each
# they would wait for one another at each change of a mapping, for longer than they gain.)
CPUS = ("-smp", "2", "-icount", "shift=0", *CPU)


def cases_of_program(build):
    return output(os.path.join(build, "tests", "preload_program")).split()


def works(build, cache, wanted):
    kernel = find_backports_kernel(cache)
    everything = LONG or bool(wanted)
    present = [name for name in PROGRAMS if os.path.exists(os.path.join(build, "tests", name))]
    present = [name for name in present if name in wanted or not wanted]
    script = "run two_nodes 60 grep -x 0-1 /sys/devices/system/node/online\n"
    script += "".join(ours(name, PROGRAMS[name][everything]) for name in present)
    for case in () if wanted and "shim" not in wanted else cases_of_program(build) if everything else SHORT_CASES:
        for suffix, variables in (("", ""), ("_promised", "KSMU_NO_RAW_DISCARDS=1"),
                                  ("_flat_out", "KSMU_SLEEP_MILLISECS=0 KSMU_CPU_LIMIT_PERCENT=100")):
            if case == "automatic":
                variables = "KSMU_AUTO=1"
            if not suffix or everything and case != "automatic":
                script += f"run shim/{case}{suffix} 900 same {case} {variables}\n"
    script += "echo GUEST NUMA $(grep -E '^numa_(hint_faults|pages_migrated) ' /proc/vmstat)\n"
    memory = 2048
    nodes = []
    for node in (0, 1):
        nodes += ["-object", f"memory-backend-ram,id=node{node},size={memory // 2}M",
                  "-numa", f"node,nodeid={node},memdev=node{node},cpus={node}"]
    with tempfile.TemporaryDirectory() as work:
        files = programs_and_libraries(build, present + ["preload_program"], work)
        return run(work, kernel, files, script, memory, [*CPUS, *nodes])


def refused(build, cache, _wanted):
    kernel, _modules = guest.find_kernel(cache)
    release = release_of(kernel)
    if tuple(int(n) for n in release.split(".")[:2]) >= (6, 8):
        skip(f"the guest's kernel, Linux {release}, is not too old")
    # The kernel's own merging is to be seen within seconds.
    ksm = "/sys/kernel/mm/ksm"
    script = REFUSED + f"echo 0 > {ksm}/sleep_millisecs; echo 5000 > {ksm}/pages_to_scan; echo 1 > {ksm}/run\n"
    shim, merge = "LD_PRELOAD=/lib/libksmu_preload.so", "./preload_old_kernel merge"
    script += "run library 300 env LD_PRELOAD=/lib/libksmu.so.0 ./preload_old_kernel library\n"
    for name, command in (("told", "told"), ("told,_automatically", "told KSMU_AUTO=1"),
                          ("silent", "silent"), ("silent,_automatically", "silent KSMU_AUTO=1"),
                          ("the_kernel_merges", merge), ("the_kernel_merges_under_the_shim", f"env {shim} {merge}"),
                          ("the_kernel_merges_under_the_shim,_automatically", f"env {shim} KSMU_AUTO=1 {merge}"),
                          ("the_kernel_merges_under_ksmuctl", f"./ksmuctl exec --set cpu_limit_percent=20 -- {merge}")):
        script += f"run {name} 300 {command}\n"
    script += f"echo 2 > {ksm}/run\n"  # what smaps says of memory depends on it
    for case in cases_of_program(build) if LONG else SHORT_CASES:
        script += f"run shim/{case} 300 same {case} {'KSMU_AUTO=1' if case == 'automatic' else ''}\n"
    with tempfile.TemporaryDirectory() as work:
        files = programs_and_libraries(build, ["preload_program", "preload_old_kernel"], work)
        return run(work, kernel, files, script, 512, CPU)


def main():
    what, build, cache = sys.argv[1], os.path.abspath(sys.argv[2]), os.path.abspath(sys.argv[3])
    guest.find_qemu()
    results = {"works": works, "refused": refused}[what](build, cache, sys.argv[4:])
    print(f"Linux {results.release}: {results.cases} cases, {results.failed} failed")
    sys.exit(1 if results.failed or not results.cases else 0)


main()
