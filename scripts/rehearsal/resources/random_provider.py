"""The resources of the provider `random`, which exist only in the state."""

from __future__ import annotations

import secrets
import string

from scripts.rehearsal.resource_types import Aws, Kind
from scripts.rehearsal.wire import Props, Secret

SPECIAL = "!@#$%&*()-_=+[]{}<>:?"


def _password(inputs: Props) -> Secret:
    classes = {
        "upper": string.ascii_uppercase,
        "lower": string.ascii_lowercase,
        "numeric": string.digits,
        "special": inputs.get("overrideSpecial", SPECIAL),
    }
    chosen = {name: letters for name, letters in classes.items() if inputs.get(name, True)}
    letters = [
        secrets.choice(chosen[name]) for name in chosen for _ in range(int(inputs.get("min" + name.capitalize(), 0)))
    ]
    alphabet = "".join(chosen.values())
    letters += [secrets.choice(alphabet) for _ in range(int(inputs["length"]) - len(letters))]
    secrets.SystemRandom().shuffle(letters)
    return Secret("".join(letters))


def _forget(aws: Aws, id_: str, inputs: Props) -> None:
    """Do nothing, because the resource exists only in the state."""


PASSWORD = Kind(
    create=lambda aws, inputs: "none",
    read=lambda aws, id_, inputs: {"result": inputs["result"]},
    delete=_forget,
    tokens={"result": _password},
    secret_outputs=frozenset({"result"}),
)

KINDS = {
    "random:index/randomPassword:RandomPassword": PASSWORD,
}
