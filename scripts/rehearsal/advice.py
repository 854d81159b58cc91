"""Replace Pulumi commands in the messages of the Pulumi program with commands of rehearse.py."""

from __future__ import annotations

import re

COMMANDS = (
    (r"pulumi config rm channel && pulumi config set amiId (\S+)", r"--ami \1"),
    (r"pulumi config set amiId", "--ami"),
    (r"pulumi config set amiId (\S+)", r"--ami \1"),
    (r"pulumi config set --secret (\w+)", r"--secret \1"),
    (r"pulumi config set --path '(\w+)\[\d+\]' (\S+)", r"--set \1=\2"),
    (r"pulumi config set (\w+) (\S+)", r"--set \1=\2"),
    (r"pulumi config set (\w+)", r"--set \1=…"),
    (r"pulumi config rm (\S+)", r"--set \1="),
    (r"pulumi preview", "rehearse.py preview"),
    (r"pulumi (?:up|refresh)", "rehearse.py up"),
    (r"pulumi stack output shell", "rehearse.py ssh"),
)
"""Regular expression for a Pulumi command → equivalent option or command of rehearse.py."""


def for_rehearsal(text: str) -> str:
    """Return `text` with Pulumi's commands replaced by the equivalents in rehearse.py."""
    for pattern, ours in COMMANDS:
        text = re.sub(f"`{pattern}`", f"`{ours}`", text)
    return text
