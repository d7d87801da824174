"""The root of all failures that a user can cause and mend."""


class UserError(Exception):
    """A problem with input, configuration or environment.

    The message says what was wrong, where, what was expected and what to do; the command line
    prints it alone, without a traceback.
    """
