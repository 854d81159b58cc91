"""The AWS provider of the stack."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import pulumi
import pulumi_aws as aws

import preflight
from settings import Settings


def provider(config: Settings) -> aws.Provider:
    """The AWS provider with the stack's default tags and with all settings in the namespace `aws:`."""
    given: dict[str, Any] = {}
    for name in inspect.signature(aws.ProviderArgs).parameters:
        key = re.sub(r"_([a-z0-9])", lambda match: match[1].upper(), name)
        text = pulumi.Config("aws").get(key)
        if text is not None:
            given[name] = _parsed(text)
    tags = {**given.get("default_tags", {}).get("tags", {}), **preflight.identity(config)}
    return aws.Provider("aws", **{**given, "region": config.region, "default_tags": {"tags": tags}})


def _parsed(text: str) -> Any:
    """The value of a setting. Pulumi returns lists, objects, numbers and booleans as JSON, and text unchanged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
