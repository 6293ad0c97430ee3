"""UserError, the error for problems that the user can fix, such as a wrong name, path, shape or value."""


class UserError(ValueError):
    """A problem that the user can fix; the message says in one line what is wrong and what to do.

    The commands print the message and exit with status 2.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
