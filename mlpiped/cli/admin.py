"""`mlpiped`: the administrator's command. What a verb needs is imported by that verb."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlpiped import __version__
from mlpiped.cli.front import Parser, guarded

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit status, which the contract lists."""
    return guarded(lambda: _run(argv))


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="mlpiped",
        description="The ML-pipeline daemon for a lab's own machines. `mlpipectl` is the command for everyone.",
        epilog="The config is found at --config, $MLPIPED_CONFIG, /etc/mlpiped/mlpiped.toml.",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)

    def add(name: str, call: Verb, text: str, more: str | None = None, *, config: bool = True) -> Parser:
        verb: Parser = verbs.add_parser(name, help=text, description=more)
        if config:
            verb.add_argument("--config", type=Path, metavar="FILE", help="the config file")
        verb.set_defaults(call=call)
        return verb

    add("serve", _serve, "run the daemon in the foreground (what systemd starts)")
    verb = add("check", _check, "check config and plugins: every fault with file:line", CHECK)
    verb.add_argument("--json", action="store_true", help="print one JSON document")
    verb.add_argument("files", nargs="*", type=Path, metavar="FILE", help="plugin files to check in place of all")
    verb = add("trust", _trust, "look at the host key of a box, and trust it", TRUST)
    verb.add_argument("--yes", action="store_true", help="trust it without a question: it was compared already")
    verb.add_argument("name", metavar="NAME", help='a compute with kind = "ssh"')
    verb = add("init", _init, "make a folder with a working config, datastore and example plugin", config=False)
    verb.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")
    verb = add("demo", _demo, "show the main job, end to end, on a temporary state folder", config=False)
    verb.add_argument("--out", metavar="DIR", help="for the picture and the model")
    verb = add("backup", _backup, "copy the ledger, while the daemon runs or while it does not", BACKUP)
    verb.add_argument("file", type=Path, metavar="FILE", help="replaced when the copy is complete")
    verb = add("restore", _restore, "put a backup in the ledger's place", RESTORE)
    verb.add_argument("file", type=Path, metavar="FILE", help="what `mlpiped backup` wrote")
    verb = add("completion", _completion, "print the completion script of a shell", config=False)
    verb.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    return top


CHECK = "Checks the config and every plugin in its folders, or the named ones. Exit status 1 if any fault."
TRUST = """Shows the key with which the box of `[compute.NAME]` names itself, and after a yes keeps it where that
compute looks for it. A box whose key is not trusted, or is another than before, is not used."""
BACKUP = """Writes a consistent, checked copy of the ledger to FILE. A running daemon makes it and sends it; who asks
must be its own user, root or an operator. The bytes of artifacts are not in it."""
RESTORE = """Checks the backup FILE and puts a copy of it in the ledger's place; the present ledger is moved aside.
Refuses while a daemon runs on the state folder."""


def _run(argv: Sequence[str] | None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if args.version:
        print(f"mlpiped {__version__}")
        return 0
    if args.verb is None:
        top.print_help(sys.stderr)
        return 2
    call: Verb = args.call
    return call(args)


def _serve(args: argparse.Namespace) -> int:
    from mlpiped import logs
    from mlpiped.config import settings as config

    settings = config.load(config.find(args.config, os.environ))
    logs.setup(settings.daemon.log)
    from mlpiped.daemon import serve

    return serve(settings)


def _check(args: argparse.Namespace) -> int:
    from mlpiped.cli.check import check

    return check(args.config, args.files, as_json=args.json)


def _trust(args: argparse.Namespace) -> int:
    from mlpiped.config import settings as config

    settings = config.load(config.find(args.config, os.environ))
    from mlpiped.cli.trust import trust  # needs asyncssh, of which `load` has said so if it is missing

    return trust(settings, args.name, yes=args.yes)


def _init(args: argparse.Namespace) -> int:
    from mlpiped.cli.init import init

    return init(args.folder)


def _demo(args: argparse.Namespace) -> int:
    from mlpiped.cli import demo

    return demo.main(["--out", args.out] if args.out else [])


def _backup(args: argparse.Namespace) -> int:
    from mlpiped.cli.backup import backup
    from mlpiped.config import settings as config

    return backup(config.load(config.find(args.config, os.environ)), args.file)


def _restore(args: argparse.Namespace) -> int:
    from mlpiped.cli.backup import restore
    from mlpiped.config import settings as config

    return restore(config.load(config.find(args.config, os.environ)), args.file)


def _completion(args: argparse.Namespace) -> int:
    from mlpiped.cli.completion import script

    print(script(parser(), "mlpiped", args.shell), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
