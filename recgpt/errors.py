"""The exceptions that are meant for the user's eyes."""

import re

_LONGEST = 2000  # characters; beyond, the middle of a message is left out
# What stands before the host of a URL: NAME:SECRET@, where a secret may hold slashes, or SECRET@.
_CREDENTIALS = re.compile(r"(?<=://)(?!arn:)([^/@:\s]{0,200}:\S{0,200}|[^/@\s]{0,200})@")


class UserError(Exception):
    """Something the user can put right: what is wrong, where, and what to do, in one line.

    The command line prints the message alone on stderr and exits with status 2. Part of a message often comes
    from data: it is made one printable line of bounded length, without credentials in URLs.
    """

    def __init__(self, message: str):
        super().__init__(presentable(message))


class Stopped(BaseException):
    """Someone asked the job to stop, and it ended in good order; the message says where it goes on from.

    The command line prints the message and exits with status 143, as after SIGTERM. Like KeyboardInterrupt
    it is no ``Exception``, so that nobody who deals with errors holds it up.
    """


def presentable(text: str) -> str:
    """A text as one printable line of bounded length, without credentials in URLs."""
    return _shortened("".join(map(_printable, _shortened(without_credentials(text)))))


def without_credentials(text: str) -> str:
    """The same text, without what stands before the host in URLs."""
    return _CREDENTIALS.sub("", text)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\r\n\t" else ascii(character)[1:-1]
