"""Errors of a rehearsal. Each message is a sentence for the user."""


class RehearsalError(Exception):
    """Base of errors that the user can correct or wait for; never a bug."""


class Refused(RehearsalError):
    """The command cannot be executed, or the program rejects its settings."""


class StateError(RehearsalError):
    """The state file cannot be used."""


class ApplyError(RehearsalError):
    """A resource could not be created, changed or deleted."""


class BootFailed(RehearsalError):
    """The machine does not become a server."""


class Interrupted(Exception):
    """The run was cancelled; the current operation was finished and recorded."""
