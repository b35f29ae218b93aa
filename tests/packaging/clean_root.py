"""A root file system that can be changed and thrown away: the host's own, under an overlay in memory, without the source tree and
the home directories. Seen by the calling process and its children only (a mount namespace of its own); gone with them."""
import ctypes
import filecmp
import os
import shutil
import stat
import subprocess
import sys
import tempfile

CLONE_NEWNS = 0x20000
SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PACKAGES = ("libksmu0", "libksmu-dev", "ksmu")
# What dpkg, ldconfig and the like write for any package, and keep. Whatever begins so.
KEPT = ("var/lib/dpkg/", "var/log/", "var/cache/ldconfig/", "var/cache/man/", "var/cache/debconf/", "etc/ld.so.cache", "etc/passwd-",
        "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/.pwd.lock", "etc/subuid-", "etc/subgid-", "root/", "tmp/", "run/", "dev/",
        "var/lib/systemd/deb-systemd-helper-masked", "var/lib/systemd/deb-systemd-helper-enabled/sockets.target.wants",
        "var/tmp/")


def skip(reason):
    print(f"skipped 1: {reason}\n0 passed, 0 failed, 1 skipped")
    sys.exit(77)


def need(*programs):
    for program in programs:
        if not shutil.which(program) and not os.path.exists(program):
            skip(f"{program} is not installed")


def mount(*arguments):
    return subprocess.run(["mount", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)


class CleanRoot:
    def __init__(self):
        if os.geteuid() != 0:
            skip("a root file system of its own is for root")
        need("mount", "chroot", "dpkg", "dpkg-deb")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS) != 0 or mount("--make-rprivate", "/").returncode != 0:
            skip(f"no mount namespace to be had: {os.strerror(ctypes.get_errno())}")
        # In memory, and in a directory that nobody else has: the name is all that is seen of it outside.
        self.base = tempfile.mkdtemp(prefix="ksmu-root-")
        if mount("-t", "tmpfs", "-o", "size=2G,mode=700", "ksmu-root", self.base).returncode != 0:
            self.close()
            skip("no tmpfs can be mounted here")
        self.upper, self.root = self.base + "/upper", self.base + "/root"
        for name in ("upper", "work", "root"):
            os.mkdir(f"{self.base}/{name}", 0o755)
        made = mount("-t", "overlay", "-o", f"lowerdir=/,upperdir={self.upper},workdir={self.base}/work", "ksmu-root", self.root)
        if made.returncode != 0:
            self.close()
            skip(f"no overlay over / can be mounted here: {made.stderr.strip()}")
        for directory in {SOURCE, "/tmp", "/run", "/home"}:
            if os.path.isdir(self.root + directory):
                self.must("-t", "tmpfs", "-o", "mode=1777" if directory == "/tmp" else "mode=755", "ksmu-root", self.root + directory)
        self.make_devices()

    def must(self, *arguments):
        made = mount(*arguments)
        if made.returncode != 0:
            sys.exit(f"mount {' '.join(arguments)}: {made.stderr.strip()}")

    def make_devices(self):
        dev = self.root + "/dev"
        self.must("-t", "tmpfs", "-o", "mode=755", "ksmu-root", dev)
        for name in ("null", "zero", "full", "random", "urandom", "tty", "userfaultfd", "fuse"):
            if os.path.exists("/dev/" + name):
                about = os.stat("/dev/" + name)
                os.mknod(f"{dev}/{name}", about.st_mode, about.st_rdev)
                os.chmod(f"{dev}/{name}", stat.S_IMODE(about.st_mode))
        for name in ("shm", "pts"):
            os.mkdir(f"{dev}/{name}", 0o755)
        self.must("-t", "tmpfs", "-o", "mode=1777", "ksmu-root", dev + "/shm")
        self.must("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620", "ksmu-root", dev + "/pts")
        os.symlink("pts/ptmx", dev + "/ptmx")
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.symlink(f"/proc/self/fd/{number}", f"{dev}/{name}")
        os.symlink("/proc/self/fd", dev + "/fd")

    def mount_proc(self):
        """Of this process's own process namespace; a container's may be mounted by nobody, but looked at."""
        if mount("-t", "proc", "proc", self.root + "/proc").returncode != 0:
            self.must("--rbind", "/proc", self.root + "/proc")

    def environment(self, **more):
        keep = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root",
                "DEBIAN_FRONTEND": "noninteractive"}
        return dict(keep, **more)

    def start(self, *command, user=None, **options):
        chroot = ["chroot", *([f"--userspec={user}"] if user else []), self.root]
        environment = self.environment(**options.pop("environment", {}))
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen([*chroot, *command], env=environment, cwd="/", text=True, errors="replace", **options)

    def run(self, *command, may_fail=False, **options):
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        output, _ = process.communicate(timeout=600)
        if process.returncode != 0 and not may_fail:
            sys.exit(f"$ {' '.join(command)}\n{output}exited with status {process.returncode}")
        return output

    def copy(self, source, target):
        shutil.copy(source, self.root + target)

    def left(self, settled):
        """What differs from the host's root, apart from what was so before (`settled`) and what dpkg keeps."""
        found = []
        for directory, directories, files in os.walk(self.upper):
            for name in [*directories, *files]:
                path = os.path.relpath(os.path.join(directory, name), self.upper)
                if path in settled or (path + "/").startswith(KEPT) or path.startswith(KEPT) or not self.differs(path):
                    continue
                found.append(path)
        return sorted(found)

    def differs(self, path):
        here, there = f"{self.upper}/{path}", "/" + path
        if not os.path.lexists(there):
            return not stat.S_ISCHR(os.lstat(here).st_mode)  # a whiteout of nothing
        mine, theirs = os.lstat(here), os.lstat(there)
        if stat.S_IFMT(mine.st_mode) != stat.S_IFMT(theirs.st_mode):
            return True
        if stat.S_ISLNK(mine.st_mode):
            return os.readlink(here) != os.readlink(there)
        if stat.S_ISREG(mine.st_mode):
            return not filecmp.cmp(here, there, shallow=False)
        return False

    def close(self):
        subprocess.run(["umount", "--recursive", "--lazy", self.base], capture_output=True)
        os.rmdir(self.base)


def find_packages(directory):
    """The three, in the order in which they can be installed."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = [os.path.join(directory, n) for p in PACKAGES for n in names if n.startswith(p + "_") and n.endswith(".deb")]
    if len(found) != len(PACKAGES):
        skip(f"no packages in {directory}: scripts/package has made none")
    for package in PACKAGES:
        status = subprocess.run(["dpkg-query", "-W", "-f=${db:Status-Status}", package], capture_output=True, text=True).stdout
        if status not in ("", "not-installed"):
            skip(f"{package} is installed on this machine")
    return found
