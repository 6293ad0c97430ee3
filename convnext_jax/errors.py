"""The one error that is the user's to mend: a name, a path, a shape, a value."""


class UserError(ValueError):
    """Says in one line what is wrong and what to do; the commands print it and exit with status 2."""
