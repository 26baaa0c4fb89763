"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names the file and the mend.

    The command line prints the message without a traceback and ends with exit code 2.
    """
