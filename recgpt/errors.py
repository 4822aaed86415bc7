"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """Something the user can put right: what is wrong, where, and what to do, in one line.

    The command line prints the message alone on stderr and exits with status 2.
    """
