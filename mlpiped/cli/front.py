"""The edge of both programs: words in, a sentence and an exit status out. Never a traceback unless it is asked for."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from mlpiped.errors import FaultsError, MlpipedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNEXPECTED = 70
"""Exit status for a fault of our own (EX_SOFTWARE): 1 is kept for "what you asked about is not well"."""


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **kwargs})


class Parser(argparse.ArgumentParser):
    """argparse with this project's errors: a sentence, a near name as the hint, exit status 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"`{self.prog} --help` lists what there is")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """An option that this very verb does not know is named here, where the near ones are known too."""
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            unknown = extra[0].partition("=")[0]
            if unknown.startswith("-"):
                raise self._unknown("option", unknown, list(self._option_string_actions))
            self.error(f"unexpected argument: `{unknown}`")
        return found, extra

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            verb = isinstance(action, argparse._SubParsersAction)
            raise self._unknown("verb" if verb else _shown(action), str(value), list(action.choices))

    def _unknown(self, kind: str, name: str, known: Sequence[str]) -> UsageError:
        near = get_close_matches(name, known, n=2, cutoff=0.6)
        if near:
            hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?"
        elif kind not in ("verb", "option"):
            hint = f"one of {', '.join(f'`{n}`' for n in known)}"
        else:
            hint = f"`{self.prog} --help` lists what there is"
        return UsageError(f"no {kind} named `{name}`", hint=hint)


def _shown(action: argparse.Action) -> str:
    if action.option_strings:
        return f"value for {action.option_strings[-1]}"
    return str(action.metavar or action.dest).lower()


def guarded(call: Callable[[], int]) -> int:
    """Runs a program's body and turns whatever it raises into a sentence on stderr and an exit status."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # `>&-`
    try:
        status = call()
        print(end="", flush=True)  # now, while what it raises can still be told; stdout may be closed
        return status
    except BrokenPipeError:  # the reader (`head`, a pager) has had enough
        _let_go_of_stdout()
        return 0
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        first = _first(error)
        if isinstance(first, KeyboardInterrupt):
            return 130
        if os.environ.get("MLPIPED_DEBUG"):
            raise
        if isinstance(first, MlpipedError):
            tell(first)
            return first.exit_code
        if isinstance(first, OSError) and first.errno in _UNWRITABLE and first.filename is None:
            _let_go_of_stdout()
            complain(f"cannot write what was asked for to stdout: {(first.strerror or '').lower()}")
            return 1
        complain(
            f"unexpected fault: {type(first).__name__}: {' '.join(str(first).split())}",
            "run it again with MLPIPED_DEBUG=1 to see where, and report it",
        )
        return UNEXPECTED


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _let_go_of_stdout() -> None:
    """What is left to be written would raise again at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _first(error: BaseException) -> BaseException:
    """What a task group wraps; of several, one that we can say something about."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_first(inner) for inner in error.exceptions]
    return min(leaves, key=lambda leaf: not isinstance(leaf, MlpipedError))


def tell(error: MlpipedError) -> None:
    if isinstance(error, FaultsError):
        for fault in error.faults:
            print(printable(str(fault)), file=sys.stderr)
        complain(f"{type(error).__doc__}: {len(error.faults)}")
    else:
        complain(error.message, error.hint)


def complain(message: str, hint: str | None = None) -> None:
    print(printable(f"error: {message}"), file=sys.stderr)
    if hint:
        print(printable(f"hint: {hint}"), file=sys.stderr)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: a name or a message of somebody's is only shown."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
