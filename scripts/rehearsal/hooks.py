"""Call a program's resource hooks over gRPC, as Pulumi's engine does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from pulumi.runtime.proto import callback_pb2, callback_pb2_grpc, resource_pb2

from scripts.rehearsal.wire import to_wire


class HookFailed(Exception):
    """A resource hook refused the operation. The error's message is the reason that the hook returned."""


@dataclass
class Hooks:
    registered: dict[str, Any] = field(default_factory=dict)
    """Hook's name → resource_pb2.RegisterResourceHookRequest."""

    def register(self, request: Any) -> None:
        self.registered[request.name] = request

    def call(self, names: Iterable[str], *, dry_run: bool, **about: Any) -> None:
        """Call the named hooks. With `dry_run`, call only hooks with `on_dry_run`. Raises HookFailed.

        `about` contains the other fields of a ResourceHookRequest. Inputs and outputs are dictionaries.
        """
        for hook in [self.registered[name] for name in names]:
            if dry_run and not hook.on_dry_run:
                continue
            fields = {name: to_wire(value) if isinstance(value, dict) else value for name, value in about.items()}
            body = resource_pb2.ResourceHookRequest(**fields).SerializeToString()
            request = callback_pb2.CallbackInvokeRequest(token=hook.callback.token, request=body)
            with grpc.insecure_channel(hook.callback.target) as channel:
                answer = callback_pb2_grpc.CallbacksStub(channel).Invoke(request)
            refusal = resource_pb2.ResourceHookResponse.FromString(answer.response).error
            if refusal and not hook.ignore_errors:
                raise HookFailed(refusal)
