"""The records of the AWS APIs. moto's backends are saved in one pickle, so that the records survive restarts.

All services are in one pickle, because their objects refer to each other. cloudpickle writes the pickle, because some
objects contain lambdas. After every request that may have changed a record, the daemon first writes the pickle and then
sends the response. A response thus never reports a change that could be lost.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import cloudpickle
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from moto.backends import get_backend
from moto.core.base_backend import BackendDict
from moto.ssm.models import ParameterDict

from scripts.local_cloud.layout import LocalCloudError, Places, write_atomically

FORMAT = 1


def _private_key(pem: bytes) -> Any:
    return serialization.load_pem_private_key(pem, None, unsafe_skip_rsa_key_validation=True)


def _reduce_private_key(key: Any) -> tuple[Any, ...]:
    """Pickle a private key as PEM. moto creates a key pair for every KMS key, also for the default KMS key."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _private_key, (pem,)


for _example in (rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256R1())):
    copyreg.pickle(type(_example), _reduce_private_key)


def _reduce_parameters(parameters: ParameterDict) -> tuple[Any, ...]:
    """Pickle a ParameterDict with the arguments of its constructor. By default, pickle uses defaultdict's arguments."""
    made_from = (parameters.account_id, parameters.region_name)
    return ParameterDict, made_from, vars(parameters), None, iter(parameters.items())


copyreg.pickle(ParameterDict, _reduce_parameters)


_excluded: set[str] = set()


def save(places: Places) -> None:
    """Write the records of every service that can be pickled. The caller must hold the API lock."""
    try:
        content = _dump(_services())
    except Exception:
        _leave_out(service for service, accounts in _services().items() if not _survives(service, accounts))
        content = _dump(_services())
    write_atomically(places.records, content)


FORMER_MODULES = {"local_cloud.records": __name__, "local_cloud.ec2": "scripts.local_cloud.ec2"}


def check(places: Places) -> bool:
    """Return whether the records on disk can be read. The next `save` omits each service with unreadable records.

    A newly used service may store an object that can be pickled, but not unpickled. Without this check, such an object
    would make the records of all services unreadable. This function reads the records without the API lock.
    """
    try:
        pickle.loads(places.records.read_bytes())
    except Exception:
        _leave_out(service for service, accounts in _services().items() if not _survives(service, accounts))
        return False
    return True


def _survives(service: str, accounts: dict[str, dict[str, Any]]) -> bool:
    try:
        pickle.loads(_dump({service: accounts}))
    except Exception:
        return False
    return True


def _leave_out(services: Iterable[str]) -> None:
    for service in list(services):
        print(
            f"the records of {service} cannot be saved: they are lost when the cloud stops", file=sys.stderr, flush=True
        )
        _excluded.add(service)


def load(places: Places) -> bool:
    """Restore the backends. Returns False if there are no saved records. Raises LocalCloudError."""
    if not places.records.exists():
        return False
    try:
        content = _Unpickler(io.BytesIO(places.records.read_bytes())).load()
        for service, accounts in content["services"].items():
            backends: Any = get_backend(service)
            for account, regions in accounts.items():
                for region, backend in regions.items():
                    dict.__setitem__(backends[account], region, backend)
    except Exception as error:
        raise LocalCloudError(
            f"the records in {places.records} cannot be read by moto {version('moto')} ({error!r}): install the moto "
            "version that wrote the records, or delete this local cloud with `purge`"
        ) from error
    return True


class _Unpickler(pickle.Unpickler):
    """Unpickler that also reads records with former module names. A `git pull` during a demo may rename modules."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(FORMER_MODULES.get(module, module), name)


Services = dict[str, dict[str, dict[str, Any]]]
"""Nested mapping: service → account → region → moto's backend."""


def _services() -> Services:
    in_use: list[Any] = BackendDict._instances  # type: ignore[misc]
    return {
        backends.service_name: {account: dict(regions.items()) for account, regions in backends.items()}
        for backends in in_use
        if backends.service_name not in _excluded
    }


def _dump(services: Services) -> bytes:
    dumped: bytes = cloudpickle.dumps({"format": FORMAT, "moto": version("moto"), "services": services})
    return dumped
