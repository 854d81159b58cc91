"""The stack's network: a VPC with two public subnets, a security group, and the server's Elastic IP."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_aws as aws

from settings import ANYWHERE, Settings

NETWORK = "10.20.0.0/16"


@dataclass(frozen=True)
class Network:
    subnet: aws.ec2.Subnet
    """The subnet in the data volume's zone."""
    group: aws.ec2.SecurityGroup
    address: aws.ec2.Eip
    """The server's Elastic IP. A new machine gets the same Elastic IP, because clients and DNS records contain this
    address."""
    ready: list[pulumi.Resource]
    """The resources that must exist before the machine's first call to AWS."""


def build(config: Settings, zones: tuple[str, str], opts: pulumi.ResourceOptions) -> Network:
    """Create the VPC with its gateways, route table, subnets (one per zone) and security group, and the Elastic IP."""
    vpc = aws.ec2.Vpc(
        "network",
        cidr_block=NETWORK,
        enable_dns_support=True,
        enable_dns_hostnames=True,
        tags={"Name": config.title},
        opts=opts,
    )
    gateway = aws.ec2.InternetGateway("network", vpc_id=vpc.id, tags={"Name": config.title}, opts=opts)
    table = aws.ec2.RouteTable("public", vpc_id=vpc.id, tags={"Name": f"{config.title}-public"}, opts=opts)
    route = aws.ec2.Route(
        "internet", route_table_id=table.id, destination_cidr_block=ANYWHERE, gateway_id=gateway.id, opts=opts
    )
    s3 = aws.ec2.VpcEndpoint(
        "s3",
        vpc_id=vpc.id,
        service_name=f"com.amazonaws.{config.region}.s3",
        vpc_endpoint_type="Gateway",
        route_table_ids=[table.id],
        tags={"Name": f"{config.title}-s3"},
        opts=opts,
    )
    subnets, associations = [], []
    for zone in zones:
        subnet = aws.ec2.Subnet(
            f"public-{zone}",
            vpc_id=vpc.id,
            availability_zone=zone,
            cidr_block=_block(zone),
            map_public_ip_on_launch=True,
            tags={"Name": f"{config.title}-{zone}"},
            opts=opts,
        )
        associations.append(
            aws.ec2.RouteTableAssociation(f"public-{zone}", subnet_id=subnet.id, route_table_id=table.id, opts=opts)
        )
        subnets.append(subnet)
    group, rules = _security_group(config, vpc, opts)
    address = aws.ec2.Eip(
        "server",
        domain="vpc",
        tags={"Name": config.title},
        opts=pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(protect=True)),
    )
    return Network(subnets[0], group, address, [route, s3, associations[0], *rules])


def _block(zone: str) -> str:
    """The CIDR of a zone's subnet. The CIDR depends only on the zone's letter, so the subnets stay the same if the
    region's list of zones changes."""
    return f"10.20.{ord(zone[-1]) - ord('a')}.0/24"


def _security_group(
    config: Settings, vpc: aws.ec2.Vpc, opts: pulumi.ResourceOptions
) -> tuple[aws.ec2.SecurityGroup, list[pulumi.Resource]]:
    group = aws.ec2.SecurityGroup(
        "server",
        vpc_id=vpc.id,
        description=f"MLflow server of stack {config.stack}",
        tags={"Name": config.title},
        opts=opts,
    )
    rules: list[pulumi.Resource] = [
        aws.vpc.SecurityGroupIngressRule(
            f"{name}-{port}-{cidr}",
            security_group_id=group.id,
            ip_protocol="tcp",
            from_port=port,
            to_port=port,
            cidr_ipv4=cidr,
            description=f"{name} from {cidr}",
            opts=opts,
        )
        for name, port, cidrs in config.doors
        for cidr in cidrs
    ]
    rules.append(
        aws.vpc.SecurityGroupEgressRule(
            "anywhere", security_group_id=group.id, ip_protocol="-1", cidr_ipv4=ANYWHERE, opts=opts
        )
    )
    return group, rules
