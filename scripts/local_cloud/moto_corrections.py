"""Corrections of moto's differences from AWS. Each item names an API call and states the behaviour of AWS. The source
of each item is the page of the API call in the service's API Reference.

The corrections of EC2 are methods of CorrectedEC2, the parent of EmbodiedEC2 (ec2.py). The function `install` replaces
functions of moto's other services. The corrections of S3 are in s3_bucket_settings.py.

DeleteSubnet returns DependencyViolation if an interface is in the subnet. DeleteSubnet also deletes the subnet's route
  table associations.
DescribeVpcEndpoints returns InvalidVpcEndpointId.NotFound for a deleted endpoint (moto keeps deleted endpoints).
  DeleteVpcEndpoints reports missing endpoints in `unsuccessful`, and (unlike in moto) accepts deleted route tables.
RevokeSecurityGroupEgress and RevokeSecurityGroupIngress return InvalidPermission.NotFound for a missing rule, also for
  IPv6. If the request names a missing rule by its ID, the error is InvalidSecurityGroupRuleId.NotFound.
DeleteSecurityGroup returns DependencyViolation if an interface uses the group.
ModifyInstanceAttribute (type, user-data) returns IncorrectInstanceState if the instance is not stopped.
DescribeInstanceCreditSpecifications returns the credit option from the launch request. The default credit option is
  `standard` for T2 instances and `unlimited` for all other types.
ReleaseAddress returns InvalidIPAddress.InUse if the address is associated.
DetachInternetGateway returns DependencyViolation if an instance in the VPC has a public address.
CreateVolume, DescribeVolumes: the default throughput of a gp3 volume is 125 MiB/s.
DescribeAddresses returns the pool and the border group of each address, and no instance or interface for an address
  that is not associated.
DescribePrefixLists returns the CIDR blocks of each prefix list.
DescribeVpcs: the ID of a DHCP options set begins with dopt-.
RemoveRoleFromInstanceProfile returns NoSuchEntity if the instance profile does not contain the role. In
  moto, RemoveRoleFromInstanceProfile then returns the HTTP status 500.
CreateInstanceProfile returns an ID that begins with AIPA (IAM User Guide, "IAM identifiers").
EnableImageDeprecation and DisableImageDeprecation do not exist in moto.
DescribeImages returns disabled images only with IncludeDisabled. DisableImage removes the launch permissions.
CopyImage sets the requested tags, KMS key and encryption on the copy.
PutMetricAlarm: a new alarm has the state INSUFFICIENT_DATA. An updated alarm keeps its state.
ListTagsForResource and TagResource of CloudWatch return ResourceNotFoundException for a deleted alarm.
DeleteLogGroup deletes tags. For a deleted log group, ListTagsForResource returns ResourceNotFoundException.
GetParameter without decryption returns the ciphertext. moto's GetParameter returns a prefix and the clear text.
PutParameter, "Managing parameter tiers" (Systems Manager User Guide): Intelligent-Tiering creates a standard parameter.
  A parameter with more than 4 KiB or with policies becomes an advanced parameter.
GetCallerIdentity returns the root user for the account's own access key.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import string
from collections.abc import Mapping
from typing import Any

from moto.cloudwatch.exceptions import ResourceNotFoundException
from moto.cloudwatch.models import Alarm, CloudWatchBackend
from moto.core.responses import ActionResult
from moto.ec2.exceptions import (
    EC2ClientError,
    InvalidPermissionNotFoundError,
    InvalidSecurityGroupRuleIdNotFoundError,
)
from moto.ec2.models import EC2Backend
from moto.ec2.models.elastic_ip_addresses import ElasticAddress
from moto.ec2.models.managed_prefixes import ManagedPrefixList
from moto.ec2.models.vpcs import VPC
from moto.ec2.responses.amis import AmisResponse
from moto.ec2.responses.instances import InstanceResponse
from moto.ec2.responses.vpcs import VPCs
from moto.iam.exceptions import NotFoundException
from moto.iam.models import IAMBackend
from moto.logs.exceptions import ResourceNotFoundException as LogsNotFound
from moto.logs.models import LogsBackend
from moto.ssm.models import Parameter
from moto.sts.models import STSBackend

STANDARD_BYTES = 4096
GP3_THROUGHPUT = 125
WHILE_STOPPED = ("instance_type", "user_data")


class CorrectedEC2(EC2Backend):
    """moto's EC2 backend of one region, with corrections that make it behave like AWS."""

    def delete_subnet(self, subnet_id: str) -> Any:
        if any(interface.subnet.id == subnet_id for interface in self.enis.values()):
            raise _in_use("subnet", subnet_id)
        subnet = super().delete_subnet(subnet_id)
        for table in self.route_tables.values():
            for association in [key for key, value in table._associations.items() if value == subnet_id]:
                del table._associations[association]
        return subnet

    def delete_security_group(self, name: str | None = None, group_id: str | None = None) -> None:
        if any(group_id == group.id for interface in self.enis.values() for group in interface.group_set):
            raise EC2ClientError("DependencyViolation", f"resource {group_id} has a dependent object")
        super().delete_security_group(name, group_id)

    def delete_vpc_endpoints(self, vpce_ids: list[str] | None = None) -> None:
        known = [each for each in vpce_ids or [] if each in self.vpc_end_points]
        for endpoint in (self.vpc_end_points[each] for each in known):
            endpoint.route_table_ids = [each for each in endpoint.route_table_ids or [] if each in self.route_tables]
        super().delete_vpc_endpoints(known)
        for each in known:
            del self.vpc_end_points[each]

    def revoke_security_group_egress(self, group_name_or_id: str, **rule: Any) -> None:  # type: ignore[override]
        self._require_rules(group_name_or_id, "egress_rules", rule)
        super().revoke_security_group_egress(group_name_or_id, **rule)

    def revoke_security_group_ingress(self, group_name_or_id: str, **rule: Any) -> None:  # type: ignore[override]
        self._require_rules(group_name_or_id, "ingress_rules", rule)
        super().revoke_security_group_ingress(group_name_or_id, **rule)

    def _require_rules(self, group_id: str, direction: str, rule: Mapping[str, Any]) -> None:
        there = getattr(self.get_security_group_from_id(group_id), direction, [])
        for wanted in rule.get("security_rule_ids") or []:
            if wanted not in {each.id for each in there}:
                raise InvalidSecurityGroupRuleIdNotFoundError(wanted)
        for wanted in rule.get("ip_ranges") or []:
            if "CidrIpv6" in wanted and wanted["CidrIpv6"] not in {each.cidr_ipv6 for each in there}:
                raise InvalidPermissionNotFoundError()

    def release_address(self, address: str | None = None, allocation_id: str | None = None) -> None:
        for each in self.addresses:
            if each.association_id and (each.allocation_id == allocation_id or each.public_ip == address):
                raise EC2ClientError("InvalidIPAddress.InUse", f"Address {each.public_ip} is in use.")
        super().release_address(address, allocation_id)

    def detach_internet_gateway(self, internet_gateway_id: str, vpc_id: str) -> None:
        if any(interface.public_ip and interface.vpc_id == vpc_id for interface in self.enis.values()):
            raise EC2ClientError(
                "DependencyViolation",
                f"Network {vpc_id} has some mapped public address(es). Please unmap those public address(es) before "
                "detaching the gateway.",
            )
        super().detach_internet_gateway(internet_gateway_id, vpc_id)

    def modify_instance_attribute(self, instance_id: str, key: str, value: Any) -> Any:
        state = self.get_instance(instance_id).state
        if key in WHILE_STOPPED and state != "stopped":
            raise EC2ClientError(
                "IncorrectInstanceState", f"The instance '{instance_id}' is not in the 'stopped' state but {state}."
            )
        return super().modify_instance_attribute(instance_id, key, value)

    def create_volume(self, size: int, *args: Any, **kwargs: Any) -> Any:
        volume = super().create_volume(size, *args, **kwargs)
        if volume.volume_type == "gp3":
            volume.throughput = kwargs.get("throughput") or GP3_THROUGHPUT
        return volume


def install() -> None:
    """Install all corrections. Call this function once, before any backend is created."""
    install_images()
    replaced: dict[tuple[Any, str], Any] = {
        (ElasticAddress, "instance_id"): property(lambda self: self.instance.id if self.instance else None),
        (ElasticAddress, "network_interface_id"): property(lambda self: self.eni.id if self.eni else None),
        (ElasticAddress, "public_ipv4_pool"): "amazon",
        (ElasticAddress, "network_border_group"): property(lambda self: self.ec2_backend.region_name),
        (ManagedPrefixList, "cidrs"): property(_cidrs),
        (VPC, "dhcp_options_id"): property(_dhcp_options_id),
        (VPCs, "delete_vpc_endpoints"): _delete_vpc_endpoints,
        (InstanceResponse, "describe_instance_credit_specifications"): _describe_credits,
        (IAMBackend, "create_instance_profile"): _create_instance_profile(IAMBackend.create_instance_profile),
        (IAMBackend, "remove_role_from_instance_profile"): _remove_role(IAMBackend.remove_role_from_instance_profile),
        (CloudWatchBackend, "put_metric_alarm"): _put_metric_alarm(CloudWatchBackend.put_metric_alarm),
        (CloudWatchBackend, "delete_alarms"): _delete_alarms(CloudWatchBackend.delete_alarms),
        (CloudWatchBackend, "list_tags_for_resource"): _of_an_alarm(CloudWatchBackend.list_tags_for_resource),
        (CloudWatchBackend, "tag_resource"): _of_an_alarm(CloudWatchBackend.tag_resource),
        (LogsBackend, "delete_log_group"): _delete_log_group(LogsBackend.delete_log_group),
        (LogsBackend, "list_tags_for_resource"): _of_a_log_group(LogsBackend.list_tags_for_resource),
        (Parameter, "__init__"): _make_parameter(Parameter.__init__),
        (Parameter, "response_object"): _describe_parameter(Parameter.response_object),
        (STSBackend, "get_caller_identity"): _get_caller_identity(STSBackend.get_caller_identity),
    }
    for (owner, name), value in replaced.items():
        setattr(owner, name, value)


def _in_use(kind: str, identifier: str) -> EC2ClientError:
    return EC2ClientError("DependencyViolation", f"The {kind} '{identifier}' has dependencies and cannot be deleted.")


def _cidrs(self: ManagedPrefixList) -> list[str]:
    newest: Any = list(self.entries.values())[-1:]
    return [entry["Cidr"] for entries in newest for entry in entries]


def _dhcp_options_id(self: VPC) -> str:
    if self.dhcp_options:
        return str(self.dhcp_options.id)
    return "dopt-" + hashlib.sha256(self.ec2_backend.region_name.encode()).hexdigest()[:17]


def _delete_vpc_endpoints(self: VPCs) -> ActionResult:
    asked = self._get_param("VpcEndpointIds", [])
    absent = [each for each in asked if each not in self.ec2_backend.vpc_end_points]
    self.ec2_backend.delete_vpc_endpoints(vpce_ids=asked)
    reasons = [
        {"ResourceId": each, "Error": {"Code": "InvalidVpcEndpoint.NotFound", "Message": f"'{each}' does not exist"}}
        for each in absent
    ]
    return ActionResult({"Unsuccessful": reasons})


def _describe_credits(self: InstanceResponse) -> ActionResult:
    found = []
    for instance in self.ec2_backend.describe_instance_credit_specifications(self._get_param("InstanceIds", [])):
        usual = "standard" if instance.instance_type.startswith("t2.") else "unlimited"
        credits_ = getattr(instance, "cpu_credits", "") or usual
        found.append({"InstanceId": instance.id, "CpuCredits": credits_})
    return ActionResult({"InstanceCreditSpecifications": found})


def _create_instance_profile(original: Any) -> Any:
    def create(self: IAMBackend, *args: Any, **kwargs: Any) -> Any:
        profile = original(self, *args, **kwargs)
        letters = string.ascii_uppercase + string.digits
        profile.id = "AIPA" + "".join(secrets.choice(letters) for _ in range(17))
        return profile

    return create


def _remove_role(original: Any) -> Any:
    def remove(self: IAMBackend, profile_name: str, role_name: str) -> None:
        if self.get_role(role_name) not in self.get_instance_profile(profile_name).roles:
            raise NotFoundException(f"Role {role_name} cannot be found in instance profile {profile_name}.")
        original(self, profile_name, role_name)

    return remove


def _put_metric_alarm(original: Any) -> Any:
    def put(self: CloudWatchBackend, name: str, *args: Any, **kwargs: Any) -> Alarm:
        before = self.alarms.get(name)
        alarm: Alarm = original(self, name, *args, **kwargs)
        if before is None:
            alarm.state_value = "INSUFFICIENT_DATA"
        else:
            for kept in ("state_value", "state_reason", "state_reason_data", "state_updated_timestamp", "history"):
                setattr(alarm, kept, getattr(before, kept))
        return alarm

    return put


def _delete_alarms(original: Any) -> Any:
    def delete(self: CloudWatchBackend, alarm_names: list[str]) -> None:
        for alarm in [self.alarms[name] for name in alarm_names if name in self.alarms]:
            self.tagger.delete_all_tags_for_resource(alarm.alarm_arn)
        original(self, alarm_names)

    return delete


def _of_an_alarm(original: Any) -> Any:
    def answer(self: CloudWatchBackend, arn: str, *args: Any) -> Any:
        if ":alarm:" in arn and arn.rpartition(":alarm:")[2] not in self.alarms:
            raise ResourceNotFoundException(f"The alarm {arn} does not exist")
        return original(self, arn, *args)

    return answer


def _delete_log_group(original: Any) -> Any:
    def delete(self: LogsBackend, log_group_name: str) -> None:
        if group := self.groups.get(log_group_name):
            self.tagger.delete_all_tags_for_resource(group.arn)
        original(self, log_group_name)

    return delete


def _of_a_log_group(original: Any) -> Any:
    def answer(self: LogsBackend, resource_arn: str) -> Any:
        if ":log-group:" in resource_arn and resource_arn.rpartition(":log-group:")[2] not in self.groups:
            raise LogsNotFound()
        return original(self, resource_arn)

    return answer


def _make_parameter(original: Any) -> Any:
    def make(self: Parameter, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.tier == "Intelligent-Tiering":
            clear = str(self.decrypt(self.value))
            advanced = len(clear.encode()) > STANDARD_BYTES or bool(self.policies)
            self.tier = "Advanced" if advanced else "Standard"

    return make


def _describe_parameter(original: Any) -> Any:
    def describe(self: Parameter, decrypt: bool = False, region: str | None = None) -> dict[str, Any]:
        document: dict[str, Any] = original(self, decrypt, region)
        if self.parameter_type == "SecureString" and not decrypt:
            sealed = hashlib.sha512(f"{self.version}:{self.value}".encode()).digest()
            document["Value"] = "AQICAH" + base64.b64encode(sealed).decode()
        return document

    return describe


def _get_caller_identity(original: Any) -> Any:
    def identify(self: STSBackend, access_key_id: str, region: str) -> tuple[str, str, str]:
        user, arn, account = original(self, access_key_id, region)
        if arn.endswith(":user/moto"):
            return account, f"arn:aws:iam::{account}:root", account
        return user, arn, account

    return identify


def install_images() -> None:
    """Install the corrections of EC2's API calls for images. A second call does nothing."""
    if hasattr(AmisResponse, "enable_image_deprecation"):
        return
    deprecation: Any = AmisResponse
    deprecation.enable_image_deprecation = lambda self: _deprecate(self, self._get_param("DeprecateAt"))
    deprecation.disable_image_deprecation = lambda self: _deprecate(self, None)
    described, disabled, copied = AmisResponse.describe_images, AmisResponse.disable_image, AmisResponse.copy_image

    def describe_images(self: AmisResponse) -> ActionResult:
        found: Any = described(self)
        if not self._get_param("IncludeDisabled") and not self._get_param("ImageIds"):
            found.result["Images"] = [each for each in found.result["Images"] if each.state != "disabled"]
        return found  # type: ignore[no-any-return]

    def disable_image(self: AmisResponse) -> ActionResult:
        done = disabled(self)
        self.ec2_backend.amis[self._get_param("ImageId")].launch_permissions.clear()
        return done

    def copy_image(self: AmisResponse) -> ActionResult:
        done: Any = copied(self)
        image = self.ec2_backend.amis[done.result["ImageId"]]
        for each in self._get_param("TagSpecifications", []):
            for tag in each.get("Tags", []) if each["ResourceType"] == "image" else []:
                image.add_tag(tag["Key"], tag["Value"])
        image.ebs_snapshot.encrypted = bool(self._get_param("Encrypted"))
        image.ebs_snapshot.kms_key_id = self._get_param("KmsKeyId")
        return done  # type: ignore[no-any-return]

    for changed in (describe_images, disable_image, copy_image):
        setattr(AmisResponse, changed.__name__, changed)


def _deprecate(self: AmisResponse, at: Any) -> ActionResult:
    image: Any = self.ec2_backend.describe_images(ami_ids=[self._get_param("ImageId")])[0]
    # AWS: "If you specify a value for seconds, Amazon EC2 rounds the seconds to the nearest minute." This code rounds
    # down, which is exact enough for a local cloud.
    image.deprecation_time = at and f"{at:%Y-%m-%dT%H:%M}:00.000Z"
    return ActionResult({"Return": True})
