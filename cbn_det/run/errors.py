"""Mistakes of the user, told in one line, and exit codes.

0 finished, 1 crashed or failed, 2 refused, 3 diverged; 130 is what shells give to Ctrl-C.
"""

OK, CRASHED, USAGE, NOT_FINITE, STOPPED = 0, 1, 2, 3, 130


class ConfigError(ValueError):
    """The command line or the config cannot be run; the message names the key and the fix."""


def one_line(error: Exception) -> str:
    """An error's message on one line."""
    # str(KeyError) is the repr of its argument, quotes included
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())
