"""Every error that mlpiped raises on purpose, as one tree.

    MlpipedError                    a sentence for the person at the terminal, and perhaps a hint
    ├── UsageError                  wrong words on a command line or in a request   (exit 2, HTTP 400)
    │   ├── UnknownName             no such pipeline, run, step, …                   (exit 2, HTTP 404)
    │   └── BadParameter            a parameter of the wrong type or name
    ├── Conflict                    the thing is not in a state that allows this     (exit 1, HTTP 409)
    ├── NotPermitted                this peer may not ask for that                   (exit 4, HTTP 403)
    ├── Unreachable                 the daemon does not answer                       (exit 3)
    ├── ConfigError                 faults in the config file                        (exit 1)
    ├── PluginError                 faults in a plugin file                          (exit 1)
    ├── LedgerError                 the ledger cannot be read or written             (exit 75)
    │   ├── LedgerUnreadable        corrupt, or not a ledger: never replaced by an empty one (exit 78)
    │   ├── LedgerTooNew            written by a newer mlpiped                       (exit 78)
    │   ├── LedgerBusy              another daemon owns this state folder            (exit 75)
    │   ├── LedgerFull              the disk is full: nothing is dispatched until it is not (exit 74)
    │   ├── LedgerUnwritable        its disk takes no writes: the daemon waits some minutes, and ends (exit 75)
    │   └── IllegalMove             a move that the table in `model` does not allow, or a stale one
    │       └── StaleReuse          what was to be reused is gone or was made anew: plan again
    ├── InvalidJob                  a backend refuses this job for good: never retried
    ├── BackendUnavailable          a backend cannot be asked now: hold and retry
    └── StorageAway                 a datastore, or a disk, cannot be used now: hold and retry

A message is lower case, without a full stop, names in backticks, the value after a colon; the next action
is `hint`. The class docstring is the message when none is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class MlpipedError(Exception):
    """something went wrong"""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.hint = hint
        super().__init__(self.message)

    @property
    def advice(self) -> str:
        """The message and what to do about it, where there is one line for both."""
        return self.message if self.hint is None else f"{self.message}; {self.hint}"


class UsageError(MlpipedError):
    """wrong usage"""

    exit_code = 2
    http_status = 400


class UnknownName(UsageError):
    """no such name"""

    http_status = 404

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> UnknownName:
        """The error for `name`, with the nearest of `known` as its hint."""
        from difflib import get_close_matches  # some milliseconds, and rarely needed: commands start without it

        near = get_close_matches(name, list(known), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else None
        return cls(f"no {kind} named `{name}`", hint=hint)


class BadParameter(UsageError):
    """a parameter has the wrong type or name"""


class Conflict(MlpipedError):
    """not possible in the present state"""

    http_status = 409


class NotPermitted(MlpipedError):
    """not permitted"""

    exit_code = 4
    http_status = 403


class Unreachable(MlpipedError):
    """the daemon does not answer"""

    exit_code = 3


class Fault(NamedTuple):
    """One thing that is wrong in a file that a person wrote.

    `line` counts from 1; 0 when no line can be named.
    """

    file: str
    line: int
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")


class FaultsError(MlpipedError):
    """a file has faults"""

    http_status = 422

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class ConfigError(FaultsError):
    """the config file has faults"""


class PluginError(FaultsError):
    """a plugin file has faults"""


class LedgerError(MlpipedError):
    """the ledger cannot be used"""

    exit_code = 75


class LedgerUnreadable(LedgerError):
    """the ledger cannot be read"""

    exit_code = 78


class LedgerTooNew(LedgerError):
    """the ledger was written by a newer mlpiped"""

    exit_code = 78


class LedgerBusy(LedgerError):
    """another daemon owns this state folder"""


class LedgerFull(LedgerError):
    """the disk that holds the ledger is full"""

    exit_code = 74  # not one of those after which the service stays down: there may be space in a moment


class LedgerUnwritable(LedgerError):
    """the disk that holds the ledger takes no writes"""


class IllegalMove(LedgerError):
    """a move that the table of legal moves does not allow"""

    exit_code = 70


class StaleReuse(IllegalMove):
    """what was to be reused is gone or was made anew"""


class InvalidJob(MlpipedError):
    """the backend refuses this job"""


class BackendUnavailable(MlpipedError):
    """the backend cannot be asked now"""


class StorageAway(MlpipedError):
    """a datastore cannot be used now"""
