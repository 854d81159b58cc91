"""The rehearsal describes exactly the resource types and look-ups that infra/ uses."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

import pulumi_aws as aws
import pulumi_random as random

from scripts.rehearsal import stack
from scripts.rehearsal.data_sources import LOOKUPS
from scripts.rehearsal.resources import KINDS

PACKAGES = {"aws": aws, "random": random}


def called() -> Iterator[Any]:
    """Yield each class and function of a provider's package that infra/ calls, such as `aws.ec2.get_ami`."""
    for path in sorted(stack.PROGRAM.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                package, *rest = ast.unparse(node.func).split(".")
                if package in PACKAGES and all(name.isidentifier() for name in rest):
                    yield reduce(getattr, rest, PACKAGES[package])


def test_kinds_are_those_that_infra_declares() -> None:
    classes: list[Any] = [each for each in called() if inspect.isclass(each)]
    declared = {str(each.pulumi_type) for each in classes if each is not aws.Provider}
    assert set(KINDS) == declared


def test_look_ups_are_those_of_infra() -> None:
    asked = {re.findall(r"'(aws:[^']*)'", inspect.getsource(each))[0] for each in called() if inspect.isfunction(each)}
    assert set(LOOKUPS) == asked
