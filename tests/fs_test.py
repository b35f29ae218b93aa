#!/usr/bin/env python3
"""ksmu-fs: KSM's files, their formats, permissions and rules, and what outlives whom.

  fs_test.py alone KSMUD KSMU_FS KSMUCTL            a broker without members
  fs_test.py members KSMUD KSMU_FS KSMUCTL SHIM     two members, under the shim
"""
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "preload"))
from control_support import Broker, Checks, Member, PAGES, usable, wait_for  # noqa: E402
from support import environment, skip  # noqa: E402

# ksm-reference: every file of 6.18's /sys/kernel/mm/ksm, and what older kernels had.
WRITABLE = {"run": "1", "pages_to_scan": "0", "sleep_millisecs": "20", "merge_across_nodes": "1", "use_zero_pages": "1", "max_page_sharing": "256",
            "max_kernel_pages": None, "stable_node_chains_prune_millisecs": "2000", "smart_scan": "1", "advisor_mode": "[none] scan-time",
            "advisor_max_cpu": "70", "advisor_min_pages_to_scan": "500", "advisor_max_pages_to_scan": "30000", "advisor_target_scan_time": "200"}
READABLE = ["pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "pages_scanned", "pages_skipped", "full_scans", "stable_node_chains",
            "stable_node_dups", "ksm_zero_pages", "general_profit"]
OTHER_USER = 12345
checks = Checks()
check = checks.check


class Tree:
    """One ksmu-fs, and the files that it shows."""

    def __init__(self, program, directory, *options, before=None, **variables):
        self.at = os.path.join(directory, "sys")
        self.ksm = self.at + "/kernel/mm/ksm/"
        self.command, self.before, self.variables = [program, self.at, *options], before, variables
        self.log = open(os.path.join(directory, "ksmu-fs.log"), "a+")
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stderr=self.log, env=environment(**self.variables), preexec_fn=self.before)
        return wait_for(lambda: os.path.exists(self.ksm + "run"), 20)

    def read(self, name):
        with open(self.ksm + name) as f:
            return f.read()

    def number(self, name):
        return int(self.read(name))

    def write(self, name, text):
        """0 or an errno."""
        try:
            fd = os.open(self.ksm + name, os.O_WRONLY | os.O_TRUNC)
        except OSError as error:
            return error.errno
        try:
            os.write(fd, text if isinstance(text, bytes) else text.encode())
        except OSError as error:
            return error.errno
        finally:
            os.close(fd)
        return 0

    def answers(self):
        """Who answers: the child of the one that was started; 0: there is none now."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as f:
            return int((f.read().split() or ["0"])[0])

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            if os.path.ismount(self.at):
                subprocess.run(["umount", "-l", self.at], check=False)
            self.log.close()


def why_not():
    if os.geteuid() != 0:
        return "needs root, to mount for others"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    return ""


def is_errno(tree, name, text, number):
    got = tree.write(name, text)
    check(f"{name} <- {text!r}", got == number, f"{errno.errorcode.get(got, got)}, not {errno.errorcode.get(number, number)}")


def alone(ksmud, fs, ctl):
    with tempfile.TemporaryDirectory(prefix="ksmu-fs-") as directory:
        broker = Broker(ksmud, ctl, directory)
        tree = Tree(fs, directory, "--socket", broker.socket)
        try:
            check("the tree", os.listdir(tree.at) == ["kernel"] and os.listdir(tree.at + "/kernel") == ["mm"] and os.listdir(tree.at + "/kernel/mm") == ["ksm"])
            check("every file of KSM's", sorted(os.listdir(tree.ksm)) == sorted([*WRITABLE, *READABLE, "members"]), os.listdir(tree.ksm))
            formats(tree)
            rules(tree, broker)
            permissions(tree)
            bad_input(tree, fs, directory)
            without_broker(tree, broker)
        finally:
            tree.end()
            broker.end()
        check("unmounted", not os.path.ismount(tree.at))
        one_domain(ksmud, fs, ctl, directory)
        inherited(ksmud, fs, ctl, directory)


def formats(tree):
    for name, preset in WRITABLE.items():
        text, about = tree.read(name), os.stat(tree.ksm + name)
        check(f"{name}: its preset", text == f"{preset}\n" if preset else re.fullmatch(r"[1-9]\d*\n", text), repr(text))
        check(f"{name}: its mode", (about.st_mode & 0o7777, about.st_uid, about.st_size) == (0o644, 0, 4096), about)
    for name in READABLE:
        text, about = tree.read(name), os.stat(tree.ksm + name)
        check(f"{name}: a number", re.fullmatch(r"-?\d+\n", text), repr(text))
        check(f"{name}: its mode", (about.st_mode & 0o7777, about.st_uid, about.st_size) == (0o444, 0, 4096), about)
    half = os.sysconf("SC_PHYS_PAGES") // 2
    check("half of the memory", tree.number("max_kernel_pages") == half, (tree.number("max_kernel_pages"), half))
    # As sysfs: what is read from the beginning is of now; in parts, of one moment.
    with open(tree.ksm + "sleep_millisecs", "rb", buffering=0) as f:
        check("in parts", f.read(1) + f.read(1) + f.read(10) + f.read(10) == b"20\n")
        tree.write("sleep_millisecs", "21")
        f.seek(0)
        check("read anew", f.read(10) == b"21\n")
    tree.write("sleep_millisecs", "20")
    check("members: none", os.listdir(tree.ksm + "members") == [])
    with open(tree.ksm + "sleep_millisecs", "rb", buffering=0) as f, tempfile.TemporaryFile() as to:
        sent = os.sendfile(to.fileno(), f.fileno(), 0, 4096)
        check("by sendfile", (sent, os.pread(to.fileno(), 100, 0)) == (3, b"20\n"), (sent, os.pread(to.fileno(), 100, 0)))
    found = subprocess.run(["find", tree.at, "-name", "run"], capture_output=True, text=True, check=False).stdout
    check("by find", found == tree.ksm + "run\n", found)
    grep = subprocess.run(["sh", "-c", f"grep -H '' {tree.ksm}pages_*"], capture_output=True, text=True, check=False)
    check("grep -H '' pages_*", grep.returncode == 0 and len(grep.stdout.split("\n")) == 8, grep)


def rules(tree, broker):
    for name in WRITABLE:
        if name != "advisor_mode":
            for text in ("", ):
                check(f"{name} <- nothing", tree.write(name, text) == 0)  # write(2) of no bytes does not arrive
            for text in ("x", "1x", " 1", "-1", "99999999999999999999", "1.0", "0x10", "+", "\n", "1\n\n", b"\xff", "1" * 5000):
                # kstrtobool looks at the first byte or two.
                if name in ("use_zero_pages", "smart_scan") and text[:1] in ("1", "0"):
                    continue
                is_errno(tree, name, text, errno.EINVAL)
    for name, text, number in (("run", "3", errno.EINVAL), ("run", "4294967297", errno.EINVAL), ("sleep_millisecs", "4294967296", errno.EINVAL),
                               ("pages_to_scan", "4294967296", errno.EINVAL), ("max_page_sharing", "1", errno.EINVAL), ("max_page_sharing", "0", errno.EINVAL),
                               ("merge_across_nodes", "2", errno.EINVAL), ("advisor_mode", "x", errno.EINVAL), ("advisor_mode", "1", errno.EINVAL),
                               ("pages_shared", "1", errno.EACCES), ("general_profit", "0", errno.EACCES)):
        is_errno(tree, name, text, number)
    for name, text, shown in (("run", "0", "0"), ("run", "1\n", "1"), ("run", "+0", "0"), ("run", b"1\0", "1"), ("sleep_millisecs", "0010", "10"), ("pages_to_scan", "100\n", "100"),
                              ("use_zero_pages", "n", "0"), ("use_zero_pages", "Y\n", "1"), ("use_zero_pages", "off", "0"), ("use_zero_pages", "on", "1"),
                              ("smart_scan", "0", "0"), ("smart_scan", "1", "1"), ("max_page_sharing", "300", "300"), ("max_kernel_pages", "5000", "5000"),
                              ("stable_node_chains_prune_millisecs", "1", "1"), ("merge_across_nodes", "1", "1"), ("advisor_max_cpu", "50", "50")):
        is_errno(tree, name, text, 0)
        check(f"{name} after {text!r}", tree.read(name) == shown + "\n", tree.read(name))
    # The advisor has pages_to_scan while it is on.
    is_errno(tree, "advisor_mode", "scan-time\n", 0)
    check("the advisor", tree.read("advisor_mode") == "none [scan-time]\n")
    is_errno(tree, "pages_to_scan", "100", errno.EINVAL)
    is_errno(tree, "advisor_mode", "none", 0)
    is_errno(tree, "pages_to_scan", "0", 0)
    # Of all domains: those that there are, and those to come.
    check("as ksmuctl sees it", broker.value("max_page_sharing") == "300" and broker.value("sleep_millisecs") == "10", broker.ctl("get"))
    check("a domain to come", broker.ctl("get", "max_page_sharing", "--domain", "shared")[1] == "300\n", broker.ctl("get", "max_page_sharing", "--domain", "shared"))
    # Where they differ, what those to come begin with is shown.
    broker.ctl("set", "sleep_millisecs", "33", "--domain", "shared")
    check("they differ", tree.read("sleep_millisecs") == "10\n", tree.read("sleep_millisecs"))
    is_errno(tree, "sleep_millisecs", "20", 0)
    check("no more", broker.value("sleep_millisecs") == "20" and tree.read("sleep_millisecs") == "20\n")
    # Nodes: while nothing is shared.
    is_errno(tree, "merge_across_nodes", "0", 0)
    check("nodes are kept apart", tree.read("merge_across_nodes") == "0\n" and broker.value("merge_across_nodes") == "0", broker.value("merge_across_nodes"))
    is_errno(tree, "merge_across_nodes", "1", 0)
    is_errno(tree, "max_kernel_pages", "0", 0)
    check("no limit", tree.number("max_kernel_pages") > os.sysconf("SC_PHYS_PAGES"))


def permissions(tree):
    def somebody():
        os.setgroups([])
        os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
        os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)

    os.chmod(os.path.dirname(tree.at), 0o755)
    script = f"cat {tree.ksm}run && ! echo 0 2>/dev/null > {tree.ksm}run && ! rm -f {tree.ksm}run 2>/dev/null && ! touch {tree.ksm}new 2>/dev/null"
    done = subprocess.run(["sh", "-c", script], preexec_fn=somebody, capture_output=True, text=True, check=False)
    check("another user reads, and does nothing else", done.returncode == 0 and done.stdout == "1\n", done)
    for what, call in (("create", lambda: os.mkdir(tree.ksm + "new")), ("remove", lambda: os.unlink(tree.ksm + "run")), ("chmod", lambda: os.chmod(tree.ksm + "run", 0o666)),
                       ("rename", lambda: os.rename(tree.ksm + "run", tree.ksm + "walk")), ("chown", lambda: os.chown(tree.ksm + "run", 1, 1))):
        try:
            call()
            check(f"{what}: refused", False)
        except OSError:
            check(f"{what}: refused", True)


def bad_input(tree, fs, directory):
    def run(*arguments):
        done = subprocess.run([fs, *arguments], capture_output=True, text=True, env=environment(), timeout=30, check=False)
        return done.returncode, done.stderr

    for arguments, code, said in ((["--nonsense"], 2, "unknown option"), (["a", "b"], 2, "one directory"), (["--socket"], 2, "wants a value"), (["--user", "x"], 2, "number"),
                                  (["--user", "1", "--domain", "x"], 2, "one domain"), ([tree.at], 3, "mounted there already"), (["/etc/passwd"], 1, "no directory"),
                                  (["/proc/nonexistent/x"], 1, "/proc/nonexistent"), ([directory + "/other", "--run-as", "nobody-of-this-name"], 1, "there is no user")):
        got = run(*arguments)
        check(f"ksmu-fs {arguments}", got[0] == code and said in got[1], got)
    check("it goes on", tree.read("run") == "1\n")


def without_broker(tree, broker):
    """Errors where there is nobody to ask; and everything again when there is."""
    broker.end()
    try:
        tree.read("pages_shared")
        check("no broker", False, "it was read all the same")
    except OSError as error:
        check("no broker", error.errno == errno.ENODEV, error)
    is_errno(tree, "run", "1", errno.ENODEV)
    check("names are there all the same", "run" in os.listdir(tree.ksm))
    broker.start()
    check("the next broker", tree.read("run") == "1\n" and tree.write("run", "0") == 0 and broker.value("run") == "0", tree.said())
    # One that does not answer: an error in some seconds, not a hang.
    broker.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    try:
        tree.read("run")
        check("a stopped broker", False, "it was read all the same")
    except OSError as error:
        check("a stopped broker", error.errno == errno.ETIMEDOUT and time.monotonic() - begun < 15, (error, time.monotonic() - begun))
    broker.process.send_signal(signal.SIGCONT)
    check("it goes on after that", wait_for(lambda: tree.read("run") == "0\n", 10))


def one_domain(ksmud, fs, ctl, directory):
    broker = Broker(ksmud, ctl, directory)
    tree = Tree(fs, directory, "--socket", broker.socket, "--domain", "shared")
    try:
        is_errno(tree, "sleep_millisecs", "77", 0)
        check("of one domain alone", broker.ctl("get", "sleep_millisecs", "--domain", "shared")[1] == "77\n" and broker.value("sleep_millisecs") == "20")
    finally:
        tree.end()
        broker.end()


def inherited(ksmud, fs, ctl, directory):
    """What comes from whoever starts it: a domain by the environment; ends of children that are not told, which it wants to be told of."""
    broker = Broker(ksmud, ctl, directory)
    tree = Tree(fs, directory, "--socket", broker.socket, before=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN), KSMU_DOMAIN="shared")
    try:
        is_errno(tree, "sleep_millisecs", "78", 0)
        check("the environment's domain alone", broker.ctl("get", "sleep_millisecs", "--domain", "shared")[1] == "78\n" and broker.value("sleep_millisecs") == "20")
        who = tree.answers()
        os.kill(who, signal.SIGKILL)
        check("another takes its place", wait_for(lambda: tree.answers() not in (who, 0), 5) and tree.read("sleep_millisecs") == "78\n", tree.said())
    finally:
        tree.end()
        broker.end()


# --- members -----------------------------------------------------------------------------------------------------------


def members(ksmud, fs, ctl, shim):
    good, why = usable(shim)
    if not good:
        skip(f"the library cannot start here: {why}")
    with tempfile.TemporaryDirectory(prefix="ksmu-fs-") as directory:
        broker = Broker(ksmud, ctl, directory)
        tree = Tree(fs, directory, "--socket", broker.socket)
        both = []
        try:
            both = [Member(shim, broker.socket) for _ in range(2)]
            with_members(tree, broker, both, shim)
        finally:
            for member in both:
                member.end()
            tree.end()
            broker.end()


def with_members(tree, broker, both, shim):
    a, b = both
    check("merged", wait_for(lambda: tree.number("pages_sharing") >= 2 * PAGES * 7 // 8 - PAGES), broker.ctl("status"))
    check("zero", wait_for(lambda: tree.number("ksm_zero_pages") >= 2 * PAGES // 8), tree.read("ksm_zero_pages"))

    def agrees():
        status = broker.json("status")[0]
        return (tree.number("pages_shared"), tree.number("pages_sharing")) == (status["frames"], status["counters"]["pages_merged"] - status["frames"])
    check("as ksmuctl says", wait_for(agrees, 20), broker.ctl("status"))
    check("profit", tree.number("general_profit") > 0, tree.read("general_profit"))
    check("by process", sorted(os.listdir(tree.ksm + "members")) == sorted([str(a.pid), str(b.pid)]), os.listdir(tree.ksm + "members"))
    one = f"members/{a.pid}/"
    check("files of a member", sorted(os.listdir(tree.ksm + one)) == ["ksm_stat", "regions", "unmerged"], os.listdir(tree.ksm + one))
    with open("/proc/self/ksm_stat") if os.path.exists("/proc/self/ksm_stat") else open(os.devnull) as f:
        kernel = re.sub(r"-?\d+|yes|no", "_", f.read())
    check("as the kernel's ksm_stat", not kernel or re.sub(r"-?\d+|yes|no", "_", tree.read(one + "ksm_stat")) == kernel, (tree.read(one + "ksm_stat"), kernel))
    check("merging pages", re.search(r"^ksm_merging_pages (\d+)$", tree.read(one + "ksm_stat"), re.M)[1] == str(PAGES * 7 // 8), tree.read(one + "ksm_stat"))
    profit = re.search(r"^ksm_process_profit (-?\d+)$", tree.read(one + "ksm_stat"), re.M)
    check("profit of a member", profit and int(profit[1]) > 0, tree.read(one + "ksm_stat"))
    check("regions", re.search(rf"^{a.start[2:]}-[0-9a-f]+ merged {PAGES * 7 // 8} zero {PAGES // 8} ", tree.read(one + "regions"), re.M), tree.read(one + "regions"))
    modes = [os.stat(tree.ksm + one + name).st_mode & 0o777 for name in ("ksm_stat", "regions", "unmerged")]
    check("a member's files are for its user", modes == [0o400] * 3, modes)
    for name in ("ksm_stat", "regions", "unmerged"):
        check(f"{name}: opened for somebody else", read_as_other(tree.ksm + one + name) == errno.EACCES)
    check("unmerged", re.fullmatch(r"(\w+ \d+\n)+", tree.read(one + "unmerged")), tree.read(one + "unmerged"))
    check("no such member", not os.path.exists(tree.ksm + "members/1") and not os.path.exists(tree.ksm + "members/0") and not os.path.exists(tree.ksm + f"members/0{a.pid}"))
    for name in ("max_page_sharing", "merge_across_nodes"):
        is_errno(tree, name, "8" if name == "max_page_sharing" else "0", errno.EBUSY)
    counted(tree, broker, a, b, shim)
    dying(tree, broker, both)
    unmerging(tree, broker, both)


def read_as_other(path):
    """By a user who was given it open, or for whom it was another process's when he opened it. 0 or an errno."""
    fd = os.open(path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
            os.read(fd, 10)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(tree, broker, a, b, shim):
    """What KSM only counts up, whoever leaves."""
    before = tree.number("full_scans"), tree.number("pages_scanned")
    c = Member(shim, broker.socket)
    check("a third", wait_for(lambda: os.path.exists(tree.ksm + f"members/{c.pid}")))
    third = tree.number("full_scans"), tree.number("pages_scanned")
    c.end()
    check("gone", wait_for(lambda: not os.path.exists(tree.ksm + f"members/{c.pid}"), 20), os.listdir(tree.ksm + "members"))
    after = tree.number("full_scans"), tree.number("pages_scanned")
    check("nothing is counted back", before[0] <= third[0] <= after[0] and before[1] <= third[1] <= after[1], (before, third, after))
    check("scans go on", wait_for(lambda: tree.number("full_scans") > after[0], 60), tree.read("full_scans"))


def dying(tree, broker, both):
    """ksmu-fs killed and stopped: members and merging go on, and so does whoever has the tree open, or bound elsewhere."""
    elsewhere = os.path.dirname(tree.at) + "/elsewhere"
    os.mkdir(elsewhere)
    subprocess.run(["mount", "--bind", tree.ksm, elsewhere], check=True)
    tree.write("stable_node_chains_prune_millisecs", "5")
    try:
        with open(tree.ksm + "run", "rb", buffering=0) as f:
            for number, limit in ((signal.SIGKILL, 5), (signal.SIGSEGV, 5), (signal.SIGSTOP, 30)):
                who = tree.answers()
                counted_up = [tree.number(name) for name in ("full_scans", "pages_scanned", "pages_skipped")]
                os.kill(who, number)
                begun = time.monotonic()
                f.seek(0)
                try:
                    f.read(10)
                except OSError as error:
                    check("what was asked is answered", error.errno == errno.EIO, error)
                check(f"it answers again after signal {number.value}", wait_for(lambda: f.seek(0) == 0 and f.read(10) == b"1\n", limit), tree.said())
                check("in time", time.monotonic() - begun < 30, time.monotonic() - begun)
                check("by another one", tree.answers() != who)
                now = [tree.number(name) for name in ("full_scans", "pages_scanned", "pages_skipped")]
                check("nothing is counted back by that", all(n >= b for n, b in zip(now, counted_up)), (counted_up, now))
                check("what was written is kept", tree.read("stable_node_chains_prune_millisecs") == "5\n")
                with open(elsewhere + "/pages_sharing") as g:
                    check("where it is bound", int(g.read()) > 0)
                listing = os.listdir(elsewhere + "/members")
                check("its members", sorted(listing) == sorted(str(m.pid) for m in both), listing)
        check("merging has gone on", tree.number("pages_sharing") >= PAGES // 2 and all(m.is_right() for m in both))
    finally:
        subprocess.run(["umount", "-l", elsewhere], check=False)
    # Both of it: the mount is dead, and the next one puts it in order.
    tree.process.kill()
    tree.process.wait()
    check("all of it killed", wait_for(lambda: not os.path.exists(tree.ksm + "run"), 10))
    check("started anew", tree.start() and tree.number("pages_sharing") > 0, tree.said())


def unmerging(tree, broker, both):
    # It is waited for, as KSM's is: nothing is merged when it returns. And it can be killed meanwhile.
    writer = subprocess.Popen(["sh", "-c", f"echo 2 > {tree.ksm}run"], env=environment())
    check("run 2", writer.wait(60) == 0, tree.said())
    check("nothing is merged", wait_for(lambda: tree.number("pages_sharing") == 0 and tree.number("pages_shared") == 0, 20), broker.ctl("status"))
    check("run is 2", tree.read("run") == "2\n")
    check("regions stay", "regions" in os.listdir(tree.ksm + f"members/{both[0].pid}"))
    check("bytes", all(m.is_right() for m in both))
    is_errno(tree, "max_page_sharing", "8", 0)
    # Members join anew by themselves, whose domain is another one.
    is_errno(tree, "merge_across_nodes", "0", 0)
    check("they join anew", wait_for(lambda: len(broker.json("members")) == 2, 30), broker.ctl("status"))
    is_errno(tree, "run", "1", 0)
    check("merged again, within nodes", wait_for(lambda: tree.number("pages_sharing") > 0 and tree.read("merge_across_nodes") == "0\n", 60), broker.ctl("status"))
    both[0].process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    check("with a stopped member", tree.write("run", "0") == 0 and time.monotonic() - begun < 8, time.monotonic() - begun)
    both[0].process.send_signal(signal.SIGCONT)
    check("it hears of it later", wait_for(lambda: broker.value("run", "--pid", str(both[0].pid)) == "0"), broker.json("members"))
    check("bytes at the end", all(m.is_right() for m in both))


def main():
    why = why_not()
    if why:
        skip(why)
    what, *rest = sys.argv[1:]
    {"alone": alone, "members": members}[what](*rest)
    checks.finish()


main()
