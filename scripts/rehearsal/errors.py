"""Errors of a rehearsal. Each message is a sentence for the user."""


class RehearsalError(Exception):
    """Base class of errors that the user can correct or wait for. Bugs raise other exceptions."""


class Refused(RehearsalError):
    """The command cannot be executed, or the program rejects the stack's settings."""


class StateError(RehearsalError):
    """The state file cannot be used."""


class ApplyError(RehearsalError):
    """A resource could not be created, changed or deleted."""


class BootFailed(RehearsalError):
    """The launched machine does not begin to serve MLflow."""


class Interrupted(Exception):
    """The run was cancelled. The state contains the result of the last operation."""
