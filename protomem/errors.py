"""The one exception that is meant for people: the command line prints its message alone, without a traceback."""

from protomem.redact import hide, printable

_LONGEST = 2000  # characters; a message may quote what a file holds


class UserError(Exception):
    """Something outside protomem is wrong (a config key, a file, a device). The message names it and says what to do.

    It is one line without control characters and without secrets, whatever it quotes.
    code: what the command line exits with (protomem/elastic.py has another one for refused ranks of a job).
    """

    code = 2

    def __init__(self, message: str):
        message = printable(hide(str(message)))
        super().__init__(message if len(message) <= _LONGEST else message[:_LONGEST] + " ...")
