"""The two ways a program ends early on purpose, and their exit codes."""

EXIT_USER_ERROR = 2
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
