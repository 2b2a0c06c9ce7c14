#!/usr/bin/python3
"""NOT Apptainer: a stand-in for machines where it cannot be had.

It takes the options of `apptainer exec` that mlpiped uses, refuses all others, and runs the command as the manual says
that Apptainer does with `--containall`: in namespaces of its own for mounts, processes and IPC; in a root folder of
which nothing can be written; with the binds, an empty home, and of the environment only what APPTAINERENV_ names. An
"image" is a file of which the second line names an unpacked folder; of what that lacks, the machine gives /usr.
Whether the real one does the same, it cannot say.
"""

import ctypes
import os
import signal
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWIPC, NEWPID = 0x20000, 0x8000000, 0x20000000
RDONLY, NOSUID, REMOUNT, BIND, REC, PRIVATE = 1, 2, 32, 4096, 16384, 1 << 18
MAGIC = "not a real SIF"
FIRST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def fatal(words):
    print(f"\x1b[31mFATAL:  \x1b[0m {words}", file=sys.stderr)
    sys.exit(255)


def mount(source, target, kind=None, flags=0, data=None):
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    if LIBC.mount(*words, ctypes.c_ulong(flags), None if data is None else data.encode()) != 0:
        fatal(f"while mounting {source} on {target}: {os.strerror(ctypes.get_errno())}")


def bind(source, target, writable):
    if not os.path.exists(source):
        fatal(f"mount source {source} doesn't exist")
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    mount(source, target, flags=BIND | REC)
    if not writable:
        mount(None, target, flags=REMOUNT | BIND | RDONLY)


def parse(words):
    """(binds, working folder, whether --nv, image, command)"""
    if not words or words.pop(0) != "exec":
        fatal("unknown command")
    binds, pwd, contained, nv = [], None, False, False
    while words and words[0].startswith("-"):
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--bind" and equals:
            for spec in value.split(","):
                parts = spec.split(":")
                if len(parts) > 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
                    fatal(f"while parsing bind path: {spec}")
                binds.append((parts[0], parts[1] if len(parts) > 1 else parts[0], parts[2:] != ["ro"]))
        elif name == "--pwd" and equals:
            pwd = value
        elif word == "--containall":
            contained = True
        elif word == "--nv":
            nv = True
        else:
            fatal(f"unknown flag: {word}")
    if not contained or len(words) < 2:
        fatal("the stand-in knows `exec --containall … IMAGE COMMAND` alone")
    return binds, pwd, nv, words[0], words[1:]


def surroundings(nv):
    found = {"PATH": FIRST_PATH, "HOME": "/root", "APPTAINER_CONTAINER": "yes"}
    for name, value in os.environ.items():
        if name.startswith("APPTAINERENV_"):
            found[name.removeprefix("APPTAINERENV_")] = value
    if (before := found.pop("PREPEND_PATH", None)) is not None:
        found["PATH"] = f"{before}:{found['PATH']}"
    if os.environ.get("APPTAINER_NO_EVAL") != "1":
        fatal("the real one would let a shell look at the values")
    return {**found, "STANDIN_NV": str(int(nv))}


def build(image, binds):
    with open(image) as file:
        if file.readline().strip() != MAGIC:
            fatal(f"could not open image {image}: image format not recognized")
        source = file.readline().strip()
    root = "/run/lock"  # anywhere: it is ours alone
    mount("none", "/", flags=REC | PRIVATE)
    mount("root", root, "tmpfs", data="mode=755")
    for name in ("proc", "dev", "tmp", "root", "etc"):
        os.mkdir(f"{root}/{name}")
    for name in ("bin", "lib", "lib64", "sbin"):
        os.symlink(f"usr/{name}", f"{root}/{name}")
    bind("/usr", f"{root}/usr", False)
    for name in os.listdir(source):
        bind(f"{source}/{name}", f"{root}/{name}", False)
    bind("/dev", f"{root}/dev", True)
    for path, target, writable in binds:
        bind(path, root + target, writable)
    for name in ("tmp", "root"):
        mount("empty", f"{root}/{name}", "tmpfs", data="size=64m") if not any(
            target.startswith(f"/{name}/") for _, target, _ in binds
        ) else None
    return root


def main():
    binds, pwd, nv, image, command = parse(sys.argv[1:])
    env = surroundings(nv)
    if LIBC.unshare(NEWNS | NEWIPC | NEWPID) != 0:
        fatal("cannot unshare")
    root = build(image, binds)
    child = os.fork()
    if child == 0:
        mount("proc", f"{root}/proc", "proc")
        mount(None, root, flags=REMOUNT | RDONLY)
        os.chroot(root)
        os.chdir(pwd or "/")
        os.environ.clear()
        os.environ.update(env)
        try:
            os.execvpe(command[0], command, env)
        except OSError as error:
            fatal(f'stat "{command[0]}": {error.strerror}')
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, frame: os.kill(child, got))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


main()
