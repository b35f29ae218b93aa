"""What the tests of the shim on real programs share."""
import os
import re
import shutil
import sys


def environment(**variables):
    """This process's, without what it may say to the library itself."""
    return {k: v for k, v in os.environ.items() if not k.startswith("KSMU_")} | variables


def tool(name):
    """A program that is installed, or that scripts/setup has unpacked; else nothing."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + "/build/unpacked"
    return shutil.which(name, path=os.environ.get("PATH", "") + f":/usr/sbin:/sbin:{root}/usr/bin:{root}/usr/sbin")


def counter(stats, name):
    """From a file of KSMU_STATS; 0 as long as there is none."""
    if not os.path.exists(stats):
        return 0
    with open(stats) as f:
        found = re.search(rf"^{name} (-?\d+)$", f.read(), re.M)
    return int(found[1]) if found else 0


def skip(why):
    print(f"skipped: {why}")
    sys.exit(77)


def finish(name, errors):
    """One case: what went wrong in it, and its end as run_test reads it."""
    for error in errors:
        print(f"{name}: {error}")
    print(f"{0 if errors else 1} passed, {1 if errors else 0} failed, 0 skipped")
    if errors:
        print("FAILED", name)
    sys.exit(1 if errors else 0)
