#!/usr/bin/env python3
"""Holds the tree to its own rules (src/README.md). layers_test.py TREE

  - An #include points down: a file of a layer includes its own layer and those below it, nothing above.
  - System calls are made in src/os and nowhere else in the library.
  - No source file is longer than 800 lines.
  - The library uses neither stdio streams nor getenv, which are not ours to use at any moment in a preloaded library.

Before it judges the tree, it proves on a small tree of its own, in which every rule is broken once, that it can see it.
"""
import os
import re
import sys
import tempfile

LAYERS = ["base", "os", "content", "frames", "engine", "broker", "api", "preload", "tools"]
LIBRARY = {"base", "content", "frames", "engine", "api"}
MAX_LINES = 800
SOURCE = (".h", ".hpp", ".c", ".cc", ".py", ".sh")
# The C interface sits with the layer that implements it. The engine may see it: it fills the structs declared there.
PUBLIC_HEADER_FROM = LAYERS.index("engine")

# The functions through which a program reaches the kernel; a call is a name that is neither a member (x.open) nor
# in a namespace of ours (os::open).
CALLS = """syscall ioctl mmap mmap64 munmap mremap mprotect pkey_mprotect madvise process_madvise mlock mlock2 munlock msync
mincore memfd_create userfaultfd open open64 openat creat close close_range read write pread pwrite pread64 pwrite64 readv
writev preadv pwritev lseek ftruncate fallocate dup dup2 dup3 fcntl pipe pipe2 poll ppoll select pselect epoll_create1
epoll_ctl epoll_wait eventfd eventfd_write eventfd_read timerfd_create socket bind connect accept accept4 listen sendmsg
recvmsg send recv fork vfork clone clone3 unshare setns prctl ptrace sigaction sigprocmask pthread_sigmask
signal kill tgkill sched_setaffinity sched_getaffinity sched_setscheduler sched_getparam setpriority getrusage getrlimit
setrlimit prlimit clock_gettime clock_nanosleep nanosleep usleep sleep process_vm_readv process_vm_writev stat fstat
opendir readdir readlink io_uring_queue_init io_uring_setup io_uring_enter sysconf getpagesize fopen popen system""".split()
CALL = re.compile(r"(?<![\w.>:])(?:::\s*)?(" + "|".join(CALLS) + r")\s*\(")
FORBIDDEN = re.compile(r"#\s*include\s*<(iostream|fstream|cstdio|stdio\.h)>|(?<![\w.>_])(?:std::)?(getenv)\s*\(")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)

# (file, call): why. Nothing else may join without a reason of the same kind.
ALLOWED = {}


def strip(text):
    """Blanks comments and string literals, so that prose is not taken for code; keeps the lines."""
    def blank(match):
        found = match.group(0)
        return found if found.startswith("#") else re.sub(r"[^\n]", " ", found)
    pattern = r'^[ \t]*#[ \t]*include[^\n]*|//[^\n]*|/\*.*?\*/|R"\((?:.*?)\)"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, blank, text, flags=re.S | re.M)


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def layer_of_include(root, path, name):
    """The layer that an include leads to, None for what is not ours."""
    candidates = [os.path.join(os.path.dirname(path), name), os.path.join(root, "src", name), os.path.join(root, name)]
    source = os.path.join(root, "src") + os.sep
    for candidate in candidates:
        candidate = os.path.normpath(candidate)
        if candidate.startswith(source) and os.path.exists(candidate):
            return candidate[len(source):].split(os.sep)[0]
    first = (name[4:] if name.startswith("src/") else name).split("/")[0]
    return first if first in LAYERS and "/" in name else None


def check(root):
    problems = []
    files = []
    for top in ("src", "include", "tests", "examples", "bench", "scripts"):
        for directory, _, names in os.walk(os.path.join(root, top)):
            files += [os.path.join(directory, n) for n in names
                      if n.endswith(SOURCE) or (top == "scripts") or n == "run_test"]
    for path in sorted(files):
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
        where = os.path.relpath(path, root)
        lines = text.count("\n")
        if lines > MAX_LINES:
            problems.append(f"{where}: {lines} lines; split it ({MAX_LINES} at most)")
        parts = where.split(os.sep)
        if parts[0] != "src" or not path.endswith((".h", ".cc", ".c", ".hpp")):
            continue
        layer = parts[1]
        if layer not in LAYERS:
            problems.append(f"{where}: '{layer}' is no layer ({' < '.join(LAYERS)})")
            continue
        rank = LAYERS.index(layer)
        code = strip(text)
        for include in INCLUDE.finditer(code):
            name = include.group(2)
            at = f"{where}:{line_of(code, include.start())}"
            if name.startswith(("ksmu/", "include/ksmu/")):
                if rank < PUBLIC_HEADER_FROM:
                    problems.append(f"{at}: {layer} includes {name}, the C interface above it")
                continue
            target = layer_of_include(root, path, name)
            if target is None:
                if include.group(1) == '"':
                    problems.append(f"{at}: \"{name}\" is in no layer")
            elif target not in LAYERS or LAYERS.index(target) > rank:
                problems.append(f"{at}: {layer} includes {name}, which is above it")
        if layer in LIBRARY:
            for call in CALL.finditer(code):
                # a declaration (type name(…)) of a function of ours is not a call
                before = code[:call.start()].rstrip()
                word = re.search(r"([A-Za-z_]\w*)[&*\s]*$", code[max(0, call.start() - 80):call.start()])
                if word and word.group(1) not in ("return", "else", "do", "co_return", "and", "or", "not") \
                        and not before.endswith(("(", ",", "=", ";", "{", "}", ")", "!", "&&", "||", ":", "?")):
                    continue
                if (where, call.group(1)) not in ALLOWED:
                    problems.append(f"{where}:{line_of(code, call.start())}: {call.group(1)}() outside src/os")
            for bad in FORBIDDEN.finditer(code):
                what = bad.group(1) or bad.group(2)
                if (where, what) not in ALLOWED:
                    problems.append(f"{where}:{line_of(code, bad.start())}: {what} in the library")
    return problems


def self_test():
    tree = {
        "src/base/a.h": "#pragma once\n",
        "src/base/up.cc": '#include "os/os.h"\n',
        "src/os/os.h": "int f(int a) { return ioctl(a, 1) + syscall(2); }\n",
        "src/os/up.h": '#include "../engine/e.h"\n',
        "src/engine/e.h": '#include "base/a.h"\n#include <ksmu/ksmu.h>\n// mmap(1)\nconst char* s = "close(2)";\nint g() { return os.close(3); }\n',
        "src/engine/call.cc": "void f() {\n  if (x) ::munmap(0, 1);\n  return ioctl(1);\n}\nint close(int);\n",
        "src/frames/public.cc": '#include "ksmu/ksmu.h"\n#include <cstdio>\n',
        "src/api/fine.cc": '#include "engine/e.h"\n#include <vector>\n',
        "src/api/env.cc": 'char* e() { return std::getenv("X") ? secure_getenv("X") : 0; }\n',
        "src/content/lost.cc": '#include "nowhere.h"\n',
        "src/stray/x.cc": "\n",
        "tests/long.cc": "\n" * (MAX_LINES + 1),
        "tests/fine.cc": '#include "../src/engine/e.h"\nint x = open("");\n' + "\n" * (MAX_LINES - 2),
    }
    expected = {
        "src/base/up.cc:1: base includes os/os.h, which is above it",
        "src/os/up.h:1: os includes ../engine/e.h, which is above it",
        "src/engine/call.cc:2: munmap() outside src/os",
        "src/engine/call.cc:3: ioctl() outside src/os",
        "src/frames/public.cc:1: frames includes ksmu/ksmu.h, the C interface above it",
        "src/frames/public.cc:2: cstdio in the library",
        "src/api/env.cc:1: getenv in the library",
        'src/content/lost.cc:1: "nowhere.h" is in no layer',
        f"src/stray/x.cc: 'stray' is no layer ({' < '.join(LAYERS)})",
        f"tests/long.cc: {MAX_LINES + 1} lines; split it ({MAX_LINES} at most)",
    }
    with tempfile.TemporaryDirectory() as root:
        for name, text in tree.items():
            os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
            with open(os.path.join(root, name), "w") as f:
                f.write(text)
        found = set(check(root))
    for problem in sorted(expected - found):
        print(f"not seen: {problem}")
    for problem in sorted(found - expected):
        print(f"seen without cause: {problem}")
    return found == expected


def main():
    if not self_test():
        print("layers_test does not see what it should")
        return 1
    problems = check(sys.argv[1])
    for problem in problems:
        print(problem)
    print(f"layers: {len(problems)} problems")
    return 1 if problems else 0


sys.exit(main())
