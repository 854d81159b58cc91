"""Resources that live in the state only: the `random` provider's."""

from __future__ import annotations

import base64
import secrets
import string

from rehearsal.kinds import Aws, Kind
from rehearsal.values import Props, Secret

SPECIAL = "!@#$%&*()-_=+[]{}<>:?"


def _password(logical: str, inputs: Props) -> Secret:
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


def _create_bytes(size: str) -> Kind:
    return Kind(
        create=lambda aws, inputs: secrets.token_hex(int(inputs[size])),
        read=lambda aws, id_, inputs: {
            "hex": id_,
            "base64": base64.b64encode(bytes.fromhex(id_)).decode(),
            "b64Std": base64.b64encode(bytes.fromhex(id_)).decode(),
            "b64Url": base64.urlsafe_b64encode(bytes.fromhex(id_)).decode().rstrip("="),
        },
        delete=_forget,
        secret_outputs=frozenset({"hex", "base64"}) if size == "length" else frozenset(),
    )


def _forget(aws: Aws, id_: str, inputs: Props) -> None:
    """Nothing outside the state to delete."""


PASSWORD = Kind(
    create=lambda aws, inputs: "none",
    read=lambda aws, id_, inputs: {"result": inputs["result"]},
    delete=_forget,
    generate={"result": _password},
    secret_outputs=frozenset({"result"}),
)

KINDS = {
    "random:index/randomPassword:RandomPassword": PASSWORD,
    "random:index/randomId:RandomId": _create_bytes("byteLength"),
}
