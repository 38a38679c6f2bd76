"""The root of errors that the command line shows as one line, without a traceback, before it exits with 1."""

from __future__ import annotations


class Refused(Exception):
    """Greenroom can't do what it was asked for; the message is one line that says what, which, and what to do."""
