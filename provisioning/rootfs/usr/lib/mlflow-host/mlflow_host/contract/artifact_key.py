"""Decide whether an artifact is stored in the bucket for artifacts or in the bucket for models."""

from __future__ import annotations

import re


def is_of_model(key: str) -> bool:
    """Whether an object key belongs to a logged model: <experiment>/models/m-<32 hexadecimal digits>/…"""
    return re.search(r"(^|/)models/m-[0-9a-f]{32}(/|$)", key) is not None
