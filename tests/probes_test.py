#!/usr/bin/env python3
"""The USDT probes of src/engine/probes.h are in the library that is shipped, and they fire.

  probes_test.py notes LIBRARY HEADER   every probe that the header names is in the library, with so many arguments
  probes_test.py fire LIBRARY           merge, gate_open, skip and discard are counted by the kernel while pages are merged
  probes_test.py none                   there are none to look for

The second needs the right to trace (perf_event_open with the uprobe PMU; no tracefs, no tool) and to use userfaultfd.
Where something is missing it says what, and exits with 77.
"""
import ctypes
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import time


def skip(why):
    print("skipped:", why)
    sys.exit(77)


def fail(why):
    print("FAILED:", why)
    sys.exit(1)


def readelf(*arguments):
    return subprocess.run(["readelf", *arguments], check=True, capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C"}).stdout


def probes_of(library):
    """name -> [(file offset, number of arguments)] for the provider ksmu."""
    segments = [tuple(int(x, 16) for x in found) for found in
                re.findall(r"LOAD\s+(0x\w+)\s+(0x\w+)\s+0x\w+\s+(0x\w+)", readelf("-lW", library))]
    base = re.search(r"\.stapsdt\.base\s+PROGBITS\s+(\w+)", readelf("-SW", library))
    probes = {}
    for provider, name, location, linked, arguments in re.findall(
            r"Provider: (\S+)\s+Name: (\S+)\s+Location: (0x\w+), Base: (0x\w+), Semaphore: 0x\w+\s+Arguments: ?([^\n]*)",
            readelf("-nW", library)):
        if provider != "ksmu":
            continue
        at = int(location, 16) + int(base.group(1), 16) - int(linked, 16)
        inside = [at - address + offset for offset, address, size in segments if address <= at < address + size]
        if not inside:
            fail(f"{name}: its address {at:#x} is in no segment")
        probes.setdefault(name, []).append((inside[0], len(arguments.split())))
    return probes


def check_notes(library, header):
    with open(header, encoding="utf-8") as f:
        comment = re.match(r"(?://[^\n]*\n)+", f.read()).group(0)
    named = {name: len(arguments.split(","))
             for name, arguments in re.findall(r"\b([a-z_]+)\(([a-z, ]+)\)", comment) if name != "hist"}
    for needed in ("merge", "zero", "cow_break", "gate_open", "skip", "discard", "remerge"):
        if needed not in named:
            fail(f"{header} does not document {needed}")
    found = probes_of(library)
    for name, count in named.items():
        if name not in found:
            fail(f"{name} is not in {library}, which has {sorted(found)}")
        for _, arguments in found[name]:
            if arguments != count:
                fail(f"{name} has {arguments} arguments, {count} are documented")
    if set(found) - set(named):
        fail(f"not documented: {sorted(set(found) - set(named))}")
    print(f"{len(found)} probes: {' '.join(sorted(found))}")


PATHS = []


def open_counter(library, offset):
    """A counter of hits by this process and the threads that it starts from now on."""
    with open("/sys/bus/event_source/devices/uprobe/type", encoding="ascii") as f:
        kind = int(f.read())
    path = ctypes.create_string_buffer(os.path.realpath(library).encode())
    PATHS.append(path)  # the kernel reads it again whenever a thread inherits the counter
    # struct perf_event_attr up to config2; flags: inherit.
    attributes = struct.pack("<IIQQQQQIIQQ", kind, 128, 0, 0, 0, 0, 1 << 1, 0, 0, ctypes.addressof(path), offset)
    attributes = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    call = {"x86_64": 298, "aarch64": 241}[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(call), attributes, 0, -1, -1, 0)
    if fd < 0:
        skip(f"perf_event_open refuses a uprobe: {os.strerror(ctypes.get_errno())}")
    return fd


def check_fire(library):
    if platform.machine() not in ("x86_64", "aarch64"):
        skip(f"the number of perf_event_open is not known here for {platform.machine()}")
    if not os.path.exists("/sys/bus/event_source/devices/uprobe/type"):
        skip("this kernel has no uprobe PMU")
    probes = probes_of(library)
    wanted = ("merge", "gate_open", "skip", "discard")
    counters = {name: [open_counter(library, offset) for offset, _ in probes[name]] for name in wanted}

    def hits(name):
        return sum(struct.unpack("<Q", os.read(fd, 8))[0] for fd in counters[name])

    ksmu = ctypes.CDLL(library, use_errno=True)
    ksmu.ksmu_merge.restype = ctypes.c_ssize_t
    ksmu.ksmu_last_error.restype = ctypes.c_char_p
    page, pages = mmap.PAGESIZE, 64
    memory = mmap.mmap(-1, pages * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write((b"ksmu" * (page // 4)) * pages)
    start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    length = ctypes.c_size_t(pages * page)
    set_tunable = lambda name, value: ksmu.ksmu_set(name, ctypes.c_int64(value))
    before = {name: hits(name) for name in wanted}
    if any(before.values()):
        fail(f"counted before anything happened: {before}")
    set_tunable(b"run", 0)
    set_tunable(b"max_maps", 1)
    if ksmu.ksmu_advise(start, length, 12) != 0:
        why = ksmu.ksmu_last_error().decode()
        if ctypes.get_errno() in (1, 38):
            skip("the library cannot be started: " + why)
        fail(why)
    if ksmu.ksmu_merge(start, length) != 0:
        fail("merged without a mapping to spare")
    if hits("skip") < pages or hits("merge"):
        fail(f"{hits('skip')} skips and {hits('merge')} merges of {pages} pages without mappings")
    set_tunable(b"max_maps", 0)
    if ksmu.ksmu_merge(start, length) != pages:
        fail("not all pages were merged")
    if not hits("merge") or not hits("gate_open"):
        fail(f"{hits('merge')} merges, {hits('gate_open')} gates")
    if ksmu.ksmu_advise(start, length, 4) != 0:
        fail(ksmu.ksmu_last_error().decode())
    for _ in range(200):
        if hits("discard"):
            break
        time.sleep(0.05)
    else:
        fail("no discard")
    print({name: hits(name) for name in wanted})


def main():
    if sys.argv[1] == "none":
        skip("the library was built without sys/sdt.h (systemtap-sdt-dev)")
    if not shutil.which("readelf"):
        skip("there is no readelf (binutils)")
    if sys.argv[1] == "notes":
        check_notes(sys.argv[2], sys.argv[3])
    else:
        check_fire(sys.argv[2])


main()
