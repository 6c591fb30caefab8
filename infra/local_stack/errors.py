"""What a user of the stack can mend."""


class StackError(Exception):
    """A taken port, a missing program, a folder that is no stack: one line saying what, where and what to do."""
