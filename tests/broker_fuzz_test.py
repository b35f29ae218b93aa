#!/usr/bin/env python3
"""The broker's decoder, domain and server on inputs that are made to reach new code: broker_fuzz_test.py [options]

Builds the fuzzers of tests/fuzz with clang++ (libFuzzer, the address and undefined behaviour sanitizers), runs each over its
corpus in tests/fuzz/corpus and then on new inputs. An input that breaks a property is printed as hex, with the command that
runs it again. At last it counts which lines of src/broker/wire.cc the decoder's inputs have reached.

  --seconds N       how long on new inputs, each fuzzer; 5, with KSMU_TEST_LONG=1 10 minutes
  --only NAME       only this fuzzer: wire, domain, server
  --replay NAME HEX runs one input and shows what it does
  --grow            adds to the tree's corpora what reaches something that nothing there reaches, and keeps no more than it takes
  --source TREE     the sources of another tree under the same fuzzers

Exit status 77: there is no clang++ that can do that.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "preload"))
from support import environment, skip  # noqa: E402

LONG = os.environ.get("KSMU_TEST_LONG") == "1"
FUZZ = os.path.join(HERE, "fuzz")
DOMAIN = ["domain", "shared_index", "candidates"]
# What the state machines are built with: sizes that an input of a few hundred bytes can use up, and that cost little to set up.
# The decoder has its own limits, which are what is to be seen.
SMALLER = {
    "broker/wire.h": {"kFramesPerFile": 1024},
    "broker/shared_index.h": {"kLogEntries": 512, "kSmallestTable": 8192},
    "broker/server.h": {"kMaxWanted": 256},
}
# Sources of src/broker and others of src; libraries; options of libFuzzer; how many inputs there are at least in 20 s. The slow
# ones have an allocation of a megabyte or files of the kernel's in each input.
FUZZERS = {
    "wire": (["wire"], [], [], ["-max_len=16401"], 20000),
    "domain": (DOMAIN, [], [], ["-max_len=384", "-len_control=10"], 200),
    "server": (["server", "operators", "tuning", "tuner", "control", "storage", "nodes", "wire", *DOMAIN], ["content/content.cc", "os/text.cc"], ["-lxxhash"], ["-max_len=384", "-len_control=10"], 200),
}
MOST_LINES_MISSED = 10  # percent, of wire.cc
passed, failed, skipped = [], [], []


def run(command, limit, **variables):
    """Status and what it said; what hangs is ended with its children."""
    process = subprocess.Popen(command, env=environment(**variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    try:
        said, _ = process.communicate(timeout=limit)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return f"none in {limit} s", said


def find_compiler(work):
    """A clang++ with libFuzzer; or None and why not."""
    names = ["clang++"] + [f"clang++-{n}" for n in range(30, 10, -1)]
    found = [c for c in map(shutil.which, names) if c]
    probe = os.path.join(work, "probe.cc")
    with open(probe, "w") as f:
        f.write("#include <bit>\n#include <cstdint>\nextern \"C\" int LLVMFuzzerTestOneInput(const std::uint8_t*, std::size_t) { return 0; }\n")
    why = "there is no clang++"
    for compiler in found:
        status, said = run([compiler, "-std=c++20", "-fsanitize=fuzzer,address,undefined", probe, "-o", os.path.join(work, "probe")], 120)
        if status == 0:
            return compiler, None
        why = f"{compiler} has no libFuzzer (libclang-rt-dev), or no sanitizers: {said.strip().splitlines()[-1:]}"
    return None, why


def smaller(name, tree, work):
    """A directory of headers to be found before the tree's."""
    headers = os.path.join(work, "smaller")
    for header, sizes in SMALLER.items() if name != "wire" else ():
        with open(os.path.join(tree, "src", header)) as f:
            text = f.read()
        for constant, size in sizes.items():
            text, found = re.subn(rf"(inline |static )constexpr ([\w:]+) {constant} = [^;]+;", rf"\1constexpr \2 {constant} = {size};", text)
            if found != 1:
                sys.exit(f"{header}: there is no {constant} any more: say in SMALLER ({os.path.relpath(__file__)}) what it is now")
        os.makedirs(os.path.dirname(os.path.join(headers, header)), exist_ok=True)
        with open(os.path.join(headers, header), "w") as f:
            f.write(text)
    return headers


def build(compiler, name, tree, out, how):
    broker, others, libraries, _, _ = FUZZERS[name]
    sources = [os.path.join(FUZZ, f"{name}_fuzz.cc")]
    sources += [os.path.join(tree, "src", "broker", f"{s}.cc") for s in broker] + [os.path.join(tree, "src", s) for s in others]
    command = [compiler, "-std=c++20", "-g", "-O1", "-Wall", "-Wextra", *how, "-I", smaller(name, tree, os.path.dirname(out)),
               "-I", os.path.join(tree, "src"), "-I", os.path.join(tree, "include"), *sources, *libraries, "-o", out]
    return run(command, 600)


def sanitized(name):
    how = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
           f"-fsanitize-coverage-ignorelist={FUZZ}/not_instrumented.txt"]
    # The model's comparisons say nothing to whoever looks for inputs; the decoder's say which numbers matter.
    return how if name == "wire" else how + ["-fno-sanitize-coverage=trace-cmp"]


# libFuzzer's own limits, so that an input which takes too long or too much is one that is printed.
LIMITS = ["-timeout=60", "-rss_limit_mb=2560", "-print_final_stats=1"]


def show_crashes(name, where, tree):
    for file in sorted(os.listdir(where)):
        if file.split("-")[0] not in ("crash", "timeout", "oom", "leak", "slow"):
            continue
        with open(os.path.join(where, file), "rb") as f:
            hex_of = f.read().hex()
        other = "" if tree == os.path.dirname(HERE) else f" --source {tree}"
        print(f"  the input ({file}): {hex_of}")
        print(f"  again: {os.path.relpath(__file__)}{other} --replay {name} {hex_of or chr(39) * 2}")


def fuzz(name, binary, work, tree, seconds):
    """True: nothing was found. What the run has kept is in work/found."""
    corpus, found, crashes = os.path.join(FUZZ, "corpus", name), os.path.join(work, "found"), os.path.join(work, "crashes")
    os.makedirs(found)
    os.makedirs(crashes)
    options = [*FUZZERS[name][3], *LIMITS, f"-artifact_prefix={crashes}/"]
    files = len(os.listdir(corpus)) if os.path.isdir(corpus) else 0
    if files == 0:
        failed.append(f"{name}: corpus")
        print(f"{name}: there is no corpus in {corpus}")
        return False
    for what, command, limit in (("its corpus", [binary, *options, "-runs=0", corpus], 600),
                                 ("new inputs", [binary, *options, f"-max_total_time={seconds}", found, corpus], seconds + 600)):
        status, said = run(command, limit, ASAN_OPTIONS="detect_stack_use_after_return=1", UBSAN_OPTIONS="print_stacktrace=1")
        executed = re.search(r"stat::number_of_executed_units: (\d+)", said)
        if status != 0 or not executed:
            print(f"{name}: on {what}: status {status}")
            print("\n".join("  " + l for l in said.splitlines() if not re.match(r"#\d+\s+(NEW|REDUCE|pulse|RELOAD)|\s*NEW_FUNC|\"", l))[-6000:])
            show_crashes(name, crashes, tree)
            failed.append(f"{name}: {what}")
            return False
    executed = int(executed[1])
    counts = re.findall(r"cov: (\d+) ft: (\d+)", said)[-1:] or [("?", "?")]
    print(f"{name}: {files} inputs of the corpus; in {seconds} s {executed} others, {len(os.listdir(found))} of them kept; "
          f"{counts[0][0]} edges, {counts[0][1]} features")
    least = FUZZERS[name][4] * min(seconds, 20) / 20
    if executed < least:
        # Whatever it is that takes so long, hardly anything is tried then.
        failed.append(f"{name}: speed")
        print(f"{name}: {executed} inputs only, and not {least:.0f}")
        return False
    return True


def grow(name, binary, work):
    """The corpus, and what was found, without what adds nothing."""
    corpus, merged = os.path.join(FUZZ, "corpus", name), os.path.join(work, "merged")
    os.makedirs(merged)
    os.makedirs(corpus, exist_ok=True)
    status, said = run([binary, *FUZZERS[name][3], "-set_cover_merge=1", "-use_counters=0", merged, corpus, os.path.join(work, "found")], 1800)
    if status != 0:
        failed.append(f"{name}: merging")
        print(said[-2000:])
        return
    before = len(os.listdir(corpus))
    for file in os.listdir(corpus):
        os.unlink(os.path.join(corpus, file))
    for file in os.listdir(merged):
        shutil.copyfile(os.path.join(merged, file), os.path.join(corpus, file))
    print(f"{name}: {before} inputs before, now {len(os.listdir(merged))}")


def tools_of(compiler):
    """llvm-profdata and llvm-cov of the compiler's version: they read no other's files."""
    _, said = run([compiler, "-dumpversion"], 60)
    version = said.strip().split(".")[0]
    tools = []
    for tool in ("llvm-profdata", "llvm-cov"):
        exact, plain = shutil.which(f"{tool}-{version}"), shutil.which(tool)
        if not exact and plain and re.search(rf"version {version}\.", run([plain, "--version"], 60)[1]):
            exact = plain
        if not exact:
            return None, f"there is no {tool} of version {version} (package llvm-{version})"
        tools.append(exact)
    return tools, None


def coverage(compiler, work, tree):
    name = "wire.cc: lines reached"
    tools, why = tools_of(compiler)
    if not tools:
        skipped.append((name, why))
        return
    binary, raw, data = (os.path.join(work, f) for f in ("covered", "raw", "data"))
    source = os.path.join(tree, "src", "broker", "wire.cc")
    inputs = [os.path.join(FUZZ, "corpus", "wire"), os.path.join(work, "found")]
    commands = [lambda: build(compiler, "wire", tree, binary, ["-fsanitize=fuzzer", "-fprofile-instr-generate", "-fcoverage-mapping"]),
                lambda: run([binary, "-runs=0", *inputs], 600, LLVM_PROFILE_FILE=raw),
                lambda: run([tools[0], "merge", "-sparse", raw, "-o", data], 120),
                lambda: run([tools[1], "report", binary, f"-instr-profile={data}", source], 120),
                lambda: run([tools[1], "export", "-summary-only", binary, f"-instr-profile={data}", source], 120)]
    for command in commands:
        status, said = command()
        if status != 0:
            failed.append(name)
            print(f"{name}: status {status}\n{said[-3000:]}")
            return
        if command is commands[3]:
            print("\n".join(re.sub(r"  +", "  ", l) for l in said.splitlines() if not set(l) <= {"-"}))
    lines = json.loads(said)["data"][0]["totals"]["lines"]
    percent = 100 * lines["covered"] / lines["count"]
    print(f"wire.cc: {lines['covered']} of {lines['count']} lines reached, {percent:.1f} %")
    (passed if percent >= 100 - MOST_LINES_MISSED else failed).append(name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=600 if LONG else 5)
    parser.add_argument("--only", choices=FUZZERS)
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "HEX"))
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--source", default=os.path.dirname(HERE))
    options = parser.parse_args()
    tree = os.path.abspath(options.source)
    with tempfile.TemporaryDirectory() as top:
        compiler, why = find_compiler(top)
        if not compiler:
            skip(why)
        if options.replay:
            name, binary, file = options.replay[0], os.path.join(top, "fuzz"), os.path.join(top, "input")
            status, said = build(compiler, name, tree, binary, sanitized(name))
            with open(file, "wb") as f:
                f.write(bytes.fromhex(options.replay[1]))
            print(said, end="", flush=True)
            sys.exit(status or subprocess.run([binary, *LIMITS[:2], file]).returncode)
        for name in [options.only] if options.only else FUZZERS:
            work = os.path.join(top, name)
            os.makedirs(work)
            binary = os.path.join(work, "fuzz")
            status, said = build(compiler, name, tree, binary, sanitized(name))
            if status != 0:
                failed.append(f"{name}: build")
                print(f"{name}: does not build: status {status}\n{said[-4000:]}")
                continue
            if fuzz(name, binary, work, tree, options.seconds):
                passed.append(name)
                if name == "wire":
                    coverage(compiler, work, tree)
            if options.grow:
                grow(name, binary, work)
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    for name, why in skipped:
        print(f"skipped 1: {name}: {why}")
    for name in failed:
        print("FAILED", re.sub(r"\W+", "_", name))
    sys.exit(1 if failed else 0)


main()
