"""
The exceptions that gpuscope defines, as one family.

A built-in type in brackets is a base as well, so whoever catches that catches ours. Misuse is not a member of the
family: it raises plain `TypeError`, `ValueError` or `RuntimeError`. This module imports nothing of ours, and
`import gpuscope` does not import it.

    GpuscopeError
    ├── PoolExhaustedError (RuntimeError)  every buffer of a pool is in use; public, in `gpuscope` and `gpuscope.pinned`
    ├── DriverError (RuntimeError)         a call of the CUDA driver failed
    ├── MissingError                       a function that should become a stage does not exist
    ├── UnsuitableError                    it exists, but cannot be a stage
    ├── CannotProfileError                 a deep look is not possible
    └── CommandError                       a command of the command line cannot do what was asked of it
"""

from __future__ import annotations


class GpuscopeError(Exception):
    """The base of all exceptions of gpuscope."""


class PoolExhaustedError(GpuscopeError, RuntimeError):
    """Every buffer of a pool is in use or still being copied, and the pool may not grow."""


class DriverError(GpuscopeError, RuntimeError):
    """A call of the CUDA driver did not answer success; `code` is the driver's error code."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"`{call}` answered {code}.")
        self.code = code


class MissingError(GpuscopeError):
    """There is no such name; the message gives the closest one."""


class UnsuitableError(GpuscopeError):
    """What is there cannot be a stage; the message says why, and what can."""


class CannotProfileError(GpuscopeError):
    """Profiling is not possible; the message is shown to the user, and the program continues."""


class CommandError(GpuscopeError):
    """
    A command cannot do what was asked of it; the message says what to do.

    Its exit code is that of a usage error, so that 1 keeps one meaning: it ran, and something is wrong.
    """

    exit_code = 2
