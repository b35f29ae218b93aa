#!/usr/bin/env python3
"""Installs into an empty prefix, moves it, builds a C and a C++ program against it in every way the README names
(pkg-config and find_package, shared and static), and runs them. Also: libksmu.so exports what ksmu.h declares, no more
and no less, and loads only a few other libraries."""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
# What a preloaded library may cost every program of a system in loading time.
LIBRARIES_ALLOWED = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "liburing.so.2",
                     "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def run(*command, env=None):
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors="replace", env=env, timeout=240)
    if result.returncode != 0:
        print(f"$ {shlex.join(command)}\n{result.stdout}")
        sys.exit(f"consumer_test: failed: {command[0]} exited with status {result.returncode}")
    return result.stdout


def find(prefix, name):
    for directory, _, names in os.walk(prefix):
        if name in names:
            return directory
    sys.exit(f"consumer_test: {name} was not installed")


def needed(path):
    return set(re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", path)))


def check_exports(library, header):
    exported = {line.split()[2].split("@")[0] for line in run("nm", "-D", "--defined-only", library).splitlines()
                if line.split()[1] != "A"}
    with open(header) as f:
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", f.read(), flags=re.S)
    declared = set(re.findall(r"\b(ksmu_\w+)\s*\([^;{}]*\)\s*;", text))
    # The preloaded shim's, under a version of its own.
    private = {name for name in exported if name.startswith("ksmushim_")}
    exported -= private
    if not declared or exported != declared:
        sys.exit(f"consumer_test: declared but not exported: {sorted(declared - exported)}; "
                 f"exported but not declared: {sorted(exported - declared)}")
    versions = run("nm", "-D", "--defined-only", "--with-symbol-versions", library)
    unversioned = [l for l in versions.splitlines() if " T " in l and "KSMU_" not in l]
    if unversioned:
        sys.exit(f"consumer_test: without a symbol version: {unversioned}")
    misplaced = [l for l in versions.splitlines() if " ksmushim_" in l and "KSMU_PRIVATE_" not in l]
    if misplaced:
        sys.exit(f"consumer_test: private, but not by their version: {misplaced}")
    extra = needed(library) - LIBRARIES_ALLOWED
    if extra:
        sys.exit(f"consumer_test: libksmu.so loads {sorted(extra)}")
    print(f"exports: {len(exported)} functions; loads {', '.join(sorted(needed(library)))}")


def main():
    parser = argparse.ArgumentParser()
    for option in ("build", "cmake", "cc", "cxx", "header"):
        parser.add_argument(f"--{option}", required=True)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        run(args.cmake, "--install", args.build, "--prefix", os.path.join(work, "installed"))
        # Nothing in it may name the place it was installed to.
        prefix = os.path.join(work, "moved here")
        shutil.move(os.path.join(work, "installed"), prefix)
        libdir = find(prefix, "libksmu.so")
        check_exports(os.path.join(libdir, "libksmu.so"), args.header)

        env = dict(os.environ, PKG_CONFIG_PATH=find(prefix, "ksmu.pc"))
        version = run("pkg-config", "--modversion", "ksmu", env=env).strip()

        def try_out(title, program, shared):
            libraries = needed(program)
            if ("libksmu.so.0" in libraries) != shared:
                sys.exit(f"consumer_test: {title}: loads {sorted(libraries)}")
            output = run(program, version, env=dict(env, LD_LIBRARY_PATH=libdir) if shared else env)
            print(f"{title}: {output.strip()}")

        for compiler, source in ((args.cc, "consumer.c"), (args.cxx, "consumer.cc")):
            for shared in (True, False):
                flags = ["--cflags", "--libs"] if shared else ["--static", "--cflags", "--libs"]
                flags = shlex.split(run("pkg-config", *flags, "ksmu", env=env))
                program = os.path.join(work, "pkg-" + source + ("-shared" if shared else "-static"))
                standard = ["-std=c++20"] if source == "consumer.cc" else []
                run(compiler, *standard, "-Wall", "-Werror", os.path.join(HERE, source), "-o", program, *flags,
                    *([] if shared else ["-static"]))
                try_out(f"pkg-config, {source}, {'shared' if shared else 'static'}", program, shared)

        # A compiler without C++20 by default is told of it in one sentence.
        old = subprocess.run([args.cxx, "-std=c++17", "-fsyntax-only", "-fmax-errors=1", "-I" + find(prefix, "ksmu.hpp") + "/..",
                              os.path.join(HERE, "consumer.cc")], stderr=subprocess.PIPE, text=True, timeout=240)
        first = next((line for line in old.stderr.splitlines() if "error" in line), "")
        if old.returncode == 0 or "ksmu.hpp needs C++20" not in first:
            sys.exit(f"consumer_test: ksmu.hpp under -std=c++17: {first or 'compiles'}")
        for page in ("limits.md", "stats.md"):
            find(prefix, page)

        for language, source in (("C", "consumer.c"), ("CXX", "consumer.cc")):
            build = os.path.join(work, "cmake-" + language)
            run(args.cmake, "-S", HERE, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCONSUMER_LANGUAGES={language}",
                f"-DCONSUMER_VERSION={version}", f"-DCMAKE_C_COMPILER={args.cc}", f"-DCMAKE_CXX_COMPILER={args.cxx}", env=env)
            run(args.cmake, "--build", build, env=env)
            for kind in ("shared", "static"):
                try_out(f"find_package, {source}, {kind}", os.path.join(build, kind), kind == "shared")


main()
