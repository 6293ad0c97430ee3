"""The one error that is the user's to mend: a name, a path, a shape, a value."""


class UserError(ValueError):
    """Says in one line what is wrong and what to do; the commands print it and exit with status 2."""


def first_line(error: Exception) -> str:
    """What an error of a library says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
