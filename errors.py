"""The one class of errors that are a user's to mend. Standard library only."""


class UserError(ValueError):
    """What a user gave, or has, cannot be used. The message is one line that names it and says what is allowed.

    The command line shows the line alone, exit code 2; every other exception but an OSError is ours and keeps its traceback.
    """
