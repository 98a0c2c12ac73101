"""The two ways a run can fail, and the exit codes that the `hfkd` command gives them."""


class InputError(ValueError):
    """Bad input, found before the first step and with nothing overwritten (exit code 2).

    The message is one line: the value, the cause, and what mends it.
    """


class RunError(RuntimeError):
    """A failure while running (exit code 1). What was saved before it is kept; the message says how to go on."""
