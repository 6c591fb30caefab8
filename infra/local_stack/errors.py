"""Errors that a user of the stack can fix."""


class StackError(Exception):
    """A taken port, a missing program or a folder that is no stack; one line says what, where and what to do."""
