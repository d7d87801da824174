"""The base of every failure that the person at the keyboard can mend."""


class UserError(Exception):
    """Bad input, a missing file, an impossible request: one clear message, no traceback.

    The message names the file, line, key or item at fault, says what was expected, and how to mend
    it. The command line prints it alone and exits with status 2; anything else that escapes is a
    bug of ours and keeps its traceback.
    """
