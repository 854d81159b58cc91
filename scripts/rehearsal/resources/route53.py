"""Route 53: records."""

from __future__ import annotations

from typing import Any

from scripts.rehearsal.resource_types import Aws, Kind
from scripts.rehearsal.wire import Props


def _create(aws: Aws, inputs: Props) -> str:
    _change(aws, "UPSERT", inputs)
    return f"{inputs['zoneId']}_{inputs['name']}_{inputs['type']}"


def _read(aws: Aws, id_: str, inputs: Props) -> Props | None:
    name, kind = f"{inputs['name'].rstrip('.')}.", inputs["type"]
    found = aws.client("route53").list_resource_record_sets(
        HostedZoneId=inputs["zoneId"], StartRecordName=name, StartRecordType=kind
    )["ResourceRecordSets"]
    there = [each for each in found if (each["Name"], each["Type"]) == (name, kind)]
    return {"fqdn": name.rstrip(".")} if there else None


def _update(aws: Aws, id_: str, old: Props, new: Props) -> None:
    _change(aws, "UPSERT", new)


def _delete(aws: Aws, id_: str, inputs: Props) -> None:
    _change(aws, "DELETE", inputs)


def _recover(aws: Aws, inputs: Props) -> str | None:
    return _create(aws, inputs) if _read(aws, "", inputs) else None


def _change(aws: Aws, action: str, inputs: Props) -> None:
    record: dict[str, Any] = {
        "Name": inputs["name"],
        "Type": inputs["type"],
        "TTL": int(inputs["ttl"]),
        "ResourceRecords": [{"Value": each} for each in inputs["records"]],
    }
    aws.client("route53").change_resource_record_sets(
        HostedZoneId=inputs["zoneId"], ChangeBatch={"Changes": [{"Action": action, "ResourceRecordSet": record}]}
    )


KINDS = {
    "aws:route53/record:Record": Kind(
        create=_create,
        read=_read,
        update=_update,
        delete=_delete,
        recover=_recover,
        replace_on=frozenset({"zoneId", "name", "type"}),
    )
}
