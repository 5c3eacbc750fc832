"""Training runs that show what gradient clipping does: `python -m benchmarks --help`."""


class UserError(Exception):
    """Something the user gave cannot be used; the message is the one line that says what and why."""
