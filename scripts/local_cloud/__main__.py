"""Command line of the local cloud: `python -m scripts.local_cloud`."""

from __future__ import annotations

import argparse
import json
import sys

from scripts.local_cloud.base_images import BASES
from scripts.local_cloud.cloud import LocalCloud
from scripts.local_cloud.layout import LocalCloudError

DESCRIPTION = """\
An AWS of your own on this machine: EC2 with real machines, S3 with a real object store, and the other services a stack
needs, all on loopback addresses. Other programs use it by setting the variables that `env` prints."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="local_cloud", description=DESCRIPTION)
    parser.add_argument("--state-dir", help="state folder (default: $MLFLOW_AMI_LOCAL_CLOUD)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start it, with the machines that were running before `down`")
    up.add_argument("--base", choices=sorted(BASES), help="also make this source image and print its AMI ID")
    verbs.add_parser("down", help="stop it; images, volumes, buckets, parameters and addresses stay")
    verbs.add_parser("status", help="print the state as JSON")
    verbs.add_parser("env", help="print the export lines for AWS clients")
    verbs.add_parser("purge", help="stop it and delete its state folder")
    arguments = parser.parse_args()
    cloud = LocalCloud(arguments.state_dir)
    try:
        match arguments.verb:
            case "up":
                cloud.up()
                if arguments.base:
                    print(cloud.source_ami(arguments.base))
            case "down":
                cloud.down()
            case "status":
                print(json.dumps(cloud.status(), indent=2))
            case "env":
                print("\n".join(f"export {name}={value}" for name, value in cloud.environment().items()))
            case "purge":
                cloud.purge()
    except LocalCloudError as error:
        print(f"local_cloud: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("local_cloud: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
