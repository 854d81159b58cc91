"""The records of the AWS APIs, kept across restarts: moto's backends in one pickle.

All services go into one pickle, because their objects refer to each other, with cloudpickle, because some contain
lambdas. The pickle is written after every request that may have changed something and before its response is sent, so a
client only gets responses that are on disk.
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
    """moto's KMS gives every key a pair, also the default one that encrypts volumes and parameters."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _private_key, (pem,)


for _example in (rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256R1())):
    copyreg.pickle(type(_example), _reduce_private_key)


def _reduce_parameters(parameters: ParameterDict) -> tuple[Any, ...]:
    """A defaultdict is restored by calling its class with the default; this subclass has other arguments."""
    made_from = (parameters.account_id, parameters.region_name)
    return ParameterDict, made_from, vars(parameters), None, iter(parameters.items())


copyreg.pickle(ParameterDict, _reduce_parameters)


_excluded: set[str] = set()


def save(places: Places) -> None:
    """Write the records of every service that can be pickled; call with the API lock held."""
    try:
        content = _dump(_services())
    except Exception:
        _leave_out(service for service, accounts in _services().items() if not _survives(service, accounts))
        content = _dump(_services())
    write_atomically(places.records, content)


FORMER_MODULES = {"local_cloud.records": __name__, "local_cloud.ec2": "scripts.local_cloud.ec2"}


def check(places: Places) -> bool:
    """Whether the records on disk can be read; if not, the next `save` leaves out the service that causes it.

    A newly used service may store an object that can be pickled, but not unpickled. Without this check all services
    would lose their records. Needs no lock as long as it returns True.
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
    """Restore the backends; False without records. Raises LocalCloudError."""
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
            "that wrote them, or start over with `purge`"
        ) from error
    return True


class _Unpickler(pickle.Unpickler):
    """Also reads records from before this module was renamed, because a demo may run across a `git pull`."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(FORMER_MODULES.get(module, module), name)


Services = dict[str, dict[str, dict[str, Any]]]
"""service → account → region → moto's backend."""


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
