#!/usr/bin/env python3
"""List, compare, promote, deprecate, retire, sweep, copy and share machine images.

An IMAGE is an ID, a name, an image version such as 20261129T123147Z, or a channel. If IMAGE is a channel, the command
uses the image that the channel names. A channel is the SSM parameter /mlflow-ami/images/<channel>. If a stack has the
setting `channel`, each `pulumi up` launches the image that the channel names. A promotion alone does not change a
running stack.

Examples:
  images.py list                                     the images, where they run, what they cost
  images.py diff production ami-0123456789abcdef0    changes of the data, the packages and the settings
  images.py promote ami-… staging --drill drill.json set a channel to an image that passed a drill
  images.py retire ami-…                             disable the image; --undo enables it, --delete deletes it
  images.py sweep --keep 5 --older-than 90           delete old images that are not in use
  images.py copy ami-… --to us-east-1 eu-west-1      copy the image to other regions.

Every command is idempotent. --dry-run changes nothing, and prints the planned changes. --json prints a JSON document.
If --region is given several times, the command runs in each region. With several regions, name the image by its
version, because an image has a different ID in each region. Exit status 2 means that the command was refused; one
sentence on stderr contains the reason and the remedy.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import functools
import json
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from scripts import audit, aws_session
from scripts.imaging import channels, comparing, copying, list_and_show, promoting, record, retiring, sharing
from scripts.imaging.ec2_images import Image, ImageRefused, Place, find, named


class CloudDown(Exception):
    """The local cloud does not start. The exception's text is the reason."""


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        places = open_places(arguments)
        done = [arguments.run(arguments, place) for place in places]
    except (CloudDown, ImageRefused) as error:
        return refuse(str(error))
    except aws_session.ERRORS as error:
        return refuse(aws_session.explain(error, (arguments.region or [None])[-1]))
    except KeyboardInterrupt:
        return 130
    documents, texts = [document for document, _ in done], [text for _, text in done]
    if arguments.json:
        print(json.dumps(documents if len(places) > 1 else documents[0], indent=1))
    else:
        print("\n".join(texts))
    return 0


def refuse(reason: str) -> int:
    print(f"images: {reason}", file=sys.stderr)
    return 2


# The commands. Each function returns the JSON document that --json prints, and the text output.


def list_(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    found = list_and_show.overview(place)
    text = "\n".join(map(list_and_show.line, found)) or f"no image in {place.region} yet: scripts/bake.py makes one"
    return found, text


def show(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    found = list_and_show.details(place, resolve(place, arguments.image))
    return found, list_and_show.describe(found)


def diff(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    a, b = resolve(place, arguments.image), resolve(place, arguments.other)
    old, new = record.read(place.ssm, a.version), record.read(place.ssm, b.version)
    database = None if arguments.no_vulnerabilities else arguments.database.rstrip("/")
    found = comparing.diff(a, b, old, new, database)
    return found, comparing.describe(found)


def promote(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    done = promoting.promote(
        place,
        resolve(place, arguments.image),
        arguments.channel,
        without_drill=arguments.without_drill,
        drill=promoting.read_drill(arguments.drill) if arguments.drill else None,
        dry_run=arguments.dry_run,
    )
    was = f" instead of {done['before']}" if done["before"] else ""
    verb = "would name" if arguments.dry_run else "names"
    changed = f"the channel {done['channel']} of {place.region} {verb} {done['image']}{was}"
    note = f"; {done['note']}" if done["note"] else ""
    return done, changed + note if done["changed"] else f"{changed.partition(' instead')[0]}, as before"


def deprecate(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    image = resolve(place, arguments.image)
    return told(arguments, image, retiring.deprecate(place, image, undo=arguments.undo, dry_run=arguments.dry_run))


def retire(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    image = named(find(place.ec2), arguments.image) if arguments.delete else resolve(place, arguments.image)
    if image is None:
        return {"image": arguments.image, "done": []}, f"{arguments.image} is deleted already, or never existed"
    done = retiring.retire(place, image, undo=arguments.undo, for_good=arguments.delete, dry_run=arguments.dry_run)
    return told(arguments, image, done)


def told(arguments: argparse.Namespace, image: Image, done: list[str]) -> tuple[Any, str]:
    head = "would be done: " if arguments.dry_run else ""
    return {"image": image.id, "done": done}, "\n".join(head + each for each in done) or "nothing to do"


def sweep(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    swept = retiring.sweep(place, arguments.keep, timedelta(days=arguments.older_than), arguments.dry_run)
    verb = "would delete" if arguments.dry_run else "deleted"
    text = "\n".join(f"{verb} {each}" for each in swept) or "nothing to delete"
    return {"deleted": [] if arguments.dry_run else swept, "planned": swept}, text


def copy(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    image = resolve(place, arguments.image)
    done = [
        copying.copy(
            place, image, open_place(arguments, to), kms_key=arguments.kms_key, dry_run=arguments.dry_run, say=say
        )
        for to in arguments.to
    ]
    lines = []
    for each in done:
        state = ("would be copied" if arguments.dry_run else "copied") if each["changed"] else "there already"
        lines.append(f"{each['region']}: {each['image'] or image.name} {state}")
    return done, "\n".join(lines)


def share(arguments: argparse.Namespace, place: Place) -> tuple[Any, str]:
    undo = arguments.verb == "unshare"
    image = resolve(place, arguments.image)
    done = sharing.share(place, image, arguments.accounts, undo=undo, dry_run=arguments.dry_run)
    return done, sharing.describe(done, undo)


def resolve(place: Place, wanted: str) -> Image:
    """The image that the user has named by ID, name, image version or channel. Raises ImageRefused."""
    known = channels.read(place.ssm) if re.fullmatch(channels.NAME, wanted) else {}
    found = named(find(place.ec2), known.get(wanted, wanted))
    if found:
        return found
    if wanted in known:
        raise ImageRefused(
            f"the channel {wanted} of {place.region} names {known[wanted]}, which is deleted: promote another image"
        )
    kind = "no image and no channel" if re.fullmatch(channels.NAME, wanted) else "no image"
    raise ImageRefused(
        f"{wanted!r} is {kind} of this project in {place.region}: scripts/images.py list prints all; an ID is valid in "
        f"one region only, a name or version in all regions"
    )


def say(text: str) -> None:
    print(f"images: {text}", file=sys.stderr, flush=True)


# Regions and the command line


def open_places(arguments: argparse.Namespace) -> list[Place]:
    """The regions in which the command runs. Raises CloudDown, or an exception of the types in aws_session.ERRORS."""
    if arguments.local:
        from scripts.local_cloud import LocalCloud, LocalCloudError

        try:
            cloud = LocalCloud()
            cloud.up()
        except LocalCloudError as error:
            raise CloudDown(str(error)) from None
        return [Place(cloud.region, functools.cache(cloud.client))]
    places = [open_place(arguments, region) for region in arguments.region or [None]]
    if arguments.region is None:
        say(f"in region {places[0].region}")
        arguments.region = [places[0].region]  # error messages name this region
    return places


def open_place(arguments: argparse.Namespace, region: str | None) -> Place:
    """An AWS region as a Place. If `region` is None, the region comes from the environment or the profile."""
    if arguments.local:
        raise ImageRefused("the local cloud has one region only: copy works on AWS")
    session: Any = aws_session.choose(region)
    return Place(session.region_name, functools.cache(lambda service: session.client(service)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--region", action="append", help=f"AWS region, repeatable (default: {aws_session.WHERE})")
    where.add_argument("--local", action="store_true", help="the local cloud's images")
    where.add_argument("--json", action="store_true", help="JSON on stdout; with several regions, a list")
    where.add_argument("--dry-run", action="store_true", help="change nothing, only print what would be done")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, run: Any, help: str, more: str = "", image: bool = True) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, parents=[where], help=help, description=f"{help[0].upper()}{help[1:]}. {more}")
        made.set_defaults(run=run)
        if image:
            made.add_argument("image", metavar="IMAGE", help="ID, name, image version or channel")
        return made

    verb("list", list_, "the project's images, newest first, and why each one stays", image=False)
    verb("show", show, "facts, packages, bake log, drills and channels of one image")
    comparing_ = verb(
        "diff",
        diff,
        "the changes from one image to another",
        "Migrations, tables and columns; packages; known vulnerabilities, by OSV; launch keys and settings; size.",
    )
    comparing_.add_argument("other", metavar="OTHER", help="the image to change to")
    comparing_.add_argument("--no-vulnerabilities", action="store_true", help="query no vulnerability database")
    comparing_.add_argument("--database", default=audit.DATABASE, metavar="URL", help="OSV's API or a mirror")
    promoting_ = verb(
        "promote",
        promote,
        "let a channel name an image",
        "Refused without a passed drill between the image and the one that the channel names.",
    )
    promoting_.add_argument("channel", metavar="CHANNEL", help="such as staging or production")
    promoting_.add_argument("--drill", type=Path, metavar="FILE", help="what scripts/drill.py --json printed")
    promoting_.add_argument("--without-drill", action="store_true", help="promote an image that was not drilled")
    protected = "Refused for an image that runs, that a channel names, that is the last one a stack can roll back to, "
    protected += "or the only one of its PostgreSQL major."
    deprecating = verb("deprecate", deprecate, "mark an image as deprecated", protected)
    deprecating.add_argument("--undo", action="store_true", help="take it back")
    retiring_ = verb("retire", retire, "deprecate and disable an image, so that no stack can launch it", protected)
    end = retiring_.add_mutually_exclusive_group()
    end.add_argument("--undo", action="store_true", help="take it back")
    end.add_argument("--delete", action="store_true", help="delete a disabled image with its snapshots: not reversible")
    sweeping = verb(
        "sweep",
        sweep,
        "delete old images and their snapshots",
        f"Also deletes unfinished images, snapshots of deleted images, and builders of ended bakes. {protected}",
        image=False,
    )
    sweeping.add_argument(
        "--keep", type=int, default=5, metavar="N", help="finished images to keep of each architecture (default 5)"
    )
    sweeping.add_argument(
        "--older-than", type=int, default=0, metavar="DAYS", help="delete older ones only (default 0)"
    )
    copying_ = verb("copy", copy, "copy the image to other regions, with tags, record and encryption, and wait for it")
    copying_.add_argument("--to", nargs="+", required=True, metavar="REGION")
    copying_.add_argument("--kms-key", metavar="ARN", help="encrypt the copy with this key of the other region")
    for name, help in (("share", "let other accounts launch an image"), ("unshare", "end that")):
        sharing_ = verb(name, share, help, "The key of an encrypted image must be a customer's, and be shared too.")
        sharing_.add_argument("--with", dest="accounts", nargs="+", required=True, metavar="ACCOUNT")
    arguments = parser.parse_args(argv)
    if arguments.verb == "sweep" and arguments.keep < 1:
        parser.error(f"--keep {arguments.keep}: at least one image must stay, or a stack has none to launch")
    if arguments.verb == "sweep" and arguments.older_than < 0:
        parser.error(f"--older-than {arguments.older_than}: give a number of days")
    if arguments.local and arguments.region:
        parser.error("--region is for AWS: the local cloud has one region of its own")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
