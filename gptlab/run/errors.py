"""The two ways a program ends early on purpose, their exit codes, and where a defect is."""

from __future__ import annotations

import traceback

EXIT_USER_ERROR = 2
_CALLS, _CAUSES = 8, 4  # how many of each are told
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: a scheduler should start the same command again


class UserError(Exception):
    """A mistake that the person who started the program can fix.

    The message is one line: what is wrong, where (file and line, config key, step) and what to do.
    `program.main` prints that line without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class Interrupted(Exception):
    """A stop was requested by SIGTERM or SIGINT, and the state that resuming needs is saved.

    `program.main` turns it into exit code 75, so that no scheduler takes the run for done.
    """


def place(error: BaseException) -> str:
    """Type and place of an error and of what it came from, for a log, without their messages.

    Those may hold what somebody wrote, which is nobody else's business, and has to be deletable.
    """
    told: list[str] = []
    at: BaseException | None = error
    while at is not None and len(told) < _CAUSES:
        calls = list(traceback.walk_tb(at.__traceback__))[-_CALLS:]
        lines = (f"{frame.f_globals.get('__name__')}:{line}" for frame, line in calls)
        told.append(f"{type(at).__name__} at {' > '.join(lines) or 'no place'}")
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return ", from ".join(told)
