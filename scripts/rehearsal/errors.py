"""What can go wrong in a rehearsal. Each message is a sentence for the person at the keyboard."""


class RehearsalError(Exception):
    """Base of what a person can put right or wait for; never a bug."""


class Refused(RehearsalError):
    """What was asked for cannot be had, or the program does not take its settings."""


class StateError(RehearsalError):
    """The state file cannot be used."""


class ApplyError(RehearsalError):
    """A resource could not be brought to what the program asks for."""


class BootFailed(RehearsalError):
    """The machine will not become a server."""


class Interrupted(Exception):
    """The run was asked to stop; what was under way has been finished and recorded."""
