"""Hosted zones: make their IDs begin with Z, as in Route 53. moto's begin with any letter."""

from __future__ import annotations

from typing import Any

from moto.route53 import models


def install() -> None:
    """Call once, before any zone is made."""
    original = models.create_route53_zone_id

    def identify(*arguments: Any, **options: Any) -> str:
        return f"Z{original(*arguments, **options)[1:]}"

    models.create_route53_zone_id = identify
