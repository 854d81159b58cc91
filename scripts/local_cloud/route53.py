"""Correction of moto: the ID of a hosted zone begins with Z, as in Route 53. In moto, the ID of a hosted zone begins
with any letter."""

from __future__ import annotations

from typing import Any

from moto.route53 import models


def install() -> None:
    """Install the correction. Call this function once, before any hosted zone is created."""
    original = models.create_route53_zone_id

    def identify(*arguments: Any, **options: Any) -> str:
        return f"Z{original(*arguments, **options)[1:]}"

    models.create_route53_zone_id = identify
