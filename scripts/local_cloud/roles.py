"""What instance roles are given to sign with: keys that both moto and the object store know.

One key a role, made when a machine first asks, kept in the state folder.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

from local_cloud import object_store
from local_cloud.state import Allotment, Places, write_json

VALID = timedelta(hours=6)


class RoleKeys:
    """The keys handed out so far. Owns their file."""

    def __init__(self, places: Places, allotment: Allotment) -> None:
        self.places = places
        self.allotment = allotment
        self.path = places.root / "role-keys.json"
        self.keys: dict[str, dict[str, str]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def credentials(self, role: str) -> dict[str, Any]:
        """The document at iam/security-credentials/<role>."""
        if role not in self.keys:
            self.keys[role] = {
                "access_key": "ASIA" + "".join(secrets.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") for _ in range(16)),
                "secret_key": secrets.token_urlsafe(30),
            }
            write_json(self.path, self.keys)
            self.path.chmod(0o600)
            object_store.write_identities(self.places, self.allotment, self.keys)
            object_store.reload(self.places)
        now = datetime.now(UTC)
        return {
            "Code": "Success",
            "LastUpdated": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "Type": "AWS-HMAC",
            "AccessKeyId": self.keys[role]["access_key"],
            "SecretAccessKey": self.keys[role]["secret_key"],
            "Token": "",
            "Expiration": (now + VALID).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
