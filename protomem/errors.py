"""The one exception that is meant for people: the command line prints its message alone, without a traceback."""


class UserError(Exception):
    """Something outside protomem is wrong (a config key, a file, a device). The message names it and says what to do."""
