#!/usr/bin/env python3
"""Unit files, manual pages and completion, as the tools that read them see them; and that they speak of the options that there are.

  texts_test.py BUILD-DIRECTORY KSMUD KSMUCTL [KSMU_FS]
"""
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD, KSMUD, KSMUCTL = sys.argv[1:4]
FS = sys.argv[4] if len(sys.argv) > 4 else ""  # where it is built
SYSTEMD = SOURCE + "/packaging/systemd"
# Of 100: what systemd calls "OK" begins at 50. What the service has is named in ksmud.service, with the reason.
MOST_EXPOSED = 10
PROGRAMS = {"ksmud": KSMUD, "ksmuctl": KSMUCTL}
COMPLETION = "/usr/share/bash-completion/bash_completion"
passed, failed, skipped = [], [], []


def run(*command, **options):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          timeout=60, **options)
    return done.returncode, done.stdout.strip()


def check(name, good, what=""):
    (passed if good else failed).append(name)
    print(f"{'ok' if good else 'FAILED'} {name}{'' if good else ': ' + str(what)}", flush=True)


def skip(what, reason):
    skipped.append(f"{what}: {reason}")


def units():
    if not shutil.which("systemd-analyze"):
        skip("units", "systemd-analyze is not installed")
        return
    with tempfile.TemporaryDirectory() as directory:
        # The program is looked for where it will be installed.
        services = {"ksmud.service": KSMUD, "ksmu-metrics@.service": KSMUCTL, "ksmu-textfile.service": KSMUCTL} | ({"ksmu-fs.service": FS} if FS else {})
        for name, program in services.items():
            with open(f"{BUILD}/packaging/{name}") as f:
                text = re.sub(r"^ExecStart=\S+", "ExecStart=" + program, f.read(), flags=re.M)
            with open(f"{directory}/{name}", "w") as f:
                f.write(text)
        shutil.copy(directory + "/ksmu-metrics@.service", directory + "/ksmu-metrics@1.service")
        shutil.copy(SYSTEMD + "/ksmu-metrics.socket", directory)
        shutil.copy(BUILD + "/packaging/ksmud.socket", directory)
        shutil.copy(SYSTEMD + "/ksmud@.socket", directory + "/ksmud@web.socket")
        names = [f"{directory}/{name}" for name in ("ksmud.service", "ksmu-metrics@1.service", "ksmu-textfile.service", "ksmud.socket", "ksmud@web.socket", "ksmu-metrics.socket")]
        if FS:
            names.append(directory + "/ksmu-fs.service")
        status, said = run("systemd-analyze", "verify", "--man=no", *names)
        # Of units of the machine's own it speaks as well.
        about_ours = [line for line in said.splitlines() if "ksmu" in line]
        check("systemd-analyze verify", status == 0 and not about_ours, said)
        for name in names[:3]:
            status, said = run("systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", name)
            if "unrecognized option" in said:
                skip("systemd-analyze security", "this systemd looks at running services only")
                break
            check("systemd-analyze security " + os.path.basename(name), status == 0, said)


def other_configuration():
    if shutil.which("systemd-sysusers"):
        with tempfile.TemporaryDirectory() as directory:
            os.mkdir(directory + "/etc")
            status, said = run("systemd-sysusers", f"--root={directory}", SYSTEMD + "/sysusers-ksmu.conf")
            users = open(directory + "/etc/passwd").read() if os.path.exists(directory + "/etc/passwd") else ""
            groups = open(directory + "/etc/group").read() if os.path.exists(directory + "/etc/group") else ""
            check("sysusers", status == 0 and "ksmud:" in users and "ksmud:" in groups and "\nksmu:" in "\n" + groups, said + users + groups)
    else:
        skip("sysusers", "systemd-sysusers is not installed")
    if shutil.which("systemd-tmpfiles") and os.geteuid() == 0:
        with tempfile.TemporaryDirectory() as directory:
            status, said = run("systemd-tmpfiles", f"--root={directory}", "--create", SYSTEMD + "/tmpfiles-ksmu.conf")
            made = directory + "/run/ksmu"
            check("tmpfiles", status == 0 and os.path.isdir(made) and os.stat(made).st_mode & 0o7777 == 0o755, said)
    else:
        skip("tmpfiles", "systemd-tmpfiles is not installed, or this is not root")
    if shutil.which("udevadm") and run("udevadm", "verify", "--help")[0] == 0:
        status, said = run("udevadm", "verify", SYSTEMD + "/60-ksmu.rules")
        check("udev", status == 0, said)
    else:
        skip("udev", "there is no udevadm verify (systemd 254)")


def options(*command):
    """What its help names at the beginning of a line."""
    return re.findall(r"^  (--[a-z-]+)", run(*command, "--help")[1], re.M)


def manuals():
    pages = sorted(glob.glob(SOURCE + "/docs/man/*.[0-9]"))
    check("there are manual pages", len(pages) >= 4, pages)
    lint = shutil.which("mandoc")
    for page in pages:
        name = os.path.basename(page)
        if lint:
            status, said = run("mandoc", "-T", "lint", "-W", "warning", page)
            check("mandoc " + name, status == 0, said)
        elif shutil.which("groff"):
            status, said = run("groff", "-mandoc", "-Tutf8", "-ww", "-z", page)
            check("groff " + name, status == 0 and not said, said)
        else:
            skip("manual " + name, "neither mandoc nor groff is installed")
    for page, named in (("ksmud.8", options(KSMUD)), ("ksmuctl.1", options(KSMUCTL, "exec")), *([("ksmu-fs.8", options(FS))] if FS else [])):
        with open(f"{SOURCE}/docs/man/{page}") as f:
            text = f.read()
        missing = [o for o in named if not re.search(rf"^\.(It|Op|Nm|Fl).*Fl Fl {o[2:]}\b|^\.Fl Fl {o[2:]}\b|, {o[2:]}\b", text, re.M)]
        check(f"{page} knows all options", named and not missing, missing or "no option found in the help")


def completed(program, *words):
    script = f"""source {COMPLETION}; source {SOURCE}/packaging/completion/{program}
COMP_WORDS=({' '.join(repr(w) for w in (program, *words))}); COMP_CWORD={len(words)}
COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}; compopt() {{ :; }}
_{program} {PROGRAMS[program]} "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"; printf '%s\\n' "${{COMPREPLY[@]}}" """
    return set(run("bash", "--norc", "-c", script)[1].split())


def completion():
    if not shutil.which("bash") or not os.path.exists(COMPLETION):
        skip("completion", "bash-completion is not installed")
        return
    check("ksmud's options are completed", set(options(KSMUD)) <= completed("ksmud", "--"), completed("ksmud", "--"))
    check("and their values", completed("ksmud", "--log", "w") == {"warning"} and completed("ksmud", "--merge-across-nodes", "") == {"0", "1"})
    there = set(re.findall(r"^  ([a-z][a-z-]*)  ", run(KSMUCTL, "--help")[1], re.M)) | {"exec"}
    check("ksmuctl's commands are completed", there <= completed("ksmuctl", ""), there - completed("ksmuctl", ""))
    check("by their beginning", completed("ksmuctl", "ex") == {"exec", "explain"}, completed("ksmuctl", "ex"))
    check("exec's options are completed", set(options(KSMUCTL, "exec")) <= completed("ksmuctl", "exec", "--"), completed("ksmuctl", "exec", "--"))
    check("a tunable's name", completed("ksmuctl", "exec", "--set", "remerge_q") == {"remerge_quick_seconds="})
    check("the program's arguments are the program's", "--stats" not in completed("ksmuctl", "exec", "--", "ls", "--"))
    check("processes", str(os.getpid()) in completed("ksmuctl", "explain", str(os.getpid())))
    check("names of tunables", "pages_to_scan" in completed("ksmuctl", "set", "pages"), completed("ksmuctl", "set", "pages"))
    for command in sorted(there - {"exec"}):
        offered = completed("ksmuctl", command, "--")
        check(f"options of {command}", offered and offered <= set(options(KSMUCTL, command)), offered)
    check("options of what does not say any", completed("ksmuctl", "nonsense", "--") == {"--json", "--socket", "--domain", "--help"})


units()
other_configuration()
manuals()
completion()
print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
for reason in skipped:
    print(f"skipped 1: {reason}")
for name in failed:
    print(f"FAILED {name}")
sys.exit(1 if failed else 0)
