"""If the state lacks existing AWS resources of the stack, preview fails and prints commands that import them."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.stack.program import VOLUME, Account, Volume, data_volume, replace, report, run

PROVIDER = "urn:pulumi:dev::mlflow-ami::pulumi:providers:aws::aws"
BUCKETS = {f"mlflow-ami:bucket-{name}": f"mlflow-{name}-1a2b3c4" for name in ("artifacts", "models", "backups")}
LAUNCHED = Account(
    volumes={VOLUME: Volume({**data_volume()[VOLUME].tags, **BUCKETS})},
    parameters={"credentials": "AQICAHh…", "certificate-authority": "PEM", **report()},
    addresses=("eipalloc-0123456789abcdef0",),
    instances=("i-0123456789abcdef0",),
)


def commands(refusal: str) -> list[list[str]]:
    return [shlex.split(line) for line in refusal.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("preview", [True, False])
def test_a_second_data_volume_is_refused(preview: bool) -> None:
    refused = run(LAUNCHED, state="empty", preview=preview)
    assert refused.refusal.startswith(
        f"The data volume {VOLUME} belongs to the stack dev of mlflow-ami, but the selected state does not have it; "
        "nothing was changed."
    )
    assert refused.of_type("ec2.Instance") == [] and refused.of_type("ssm.Parameter") == []


def test_printed_commands_import_the_existing_resources() -> None:
    """Each import command contains a resource of the program and the ID of the existing AWS resource. `up` creates all
    resources that are not imported."""
    stated = commands(run(LAUNCHED, state="empty").refusal)
    assert stated[0] == ["pulumi", "up", "--target", PROVIDER]
    assert [each[2] for each in stated if each[0] == "aws"] == ["stop-instances", "wait", "terminate-instances"]
    assert all(each[-1] == "i-0123456789abcdef0" for each in stated if each[0] == "aws")
    imported = [each[-3:] for each in stated if each[:2] == ["pulumi", "import"]]
    complete = run(LAUNCHED)
    known = {(each.type, each.name) for each in complete.registered}
    assert {(kind, name) for kind, name, _ in imported} <= known
    assert {id_ for _, _, id_ in imported} == {
        VOLUME,
        *BUCKETS.values(),
        "eipalloc-0123456789abcdef0",
        *(f"/mlflow-ami/dev/{name}" for name in LAUNCHED.parameters),
    }
    # The commands import all protected resources, because these resources hold the stack's data and identity. The
    # passphrase needs no import, because the credentials parameter contains the passphrase and is written only once.
    protected = {(each.type, each.name) for each in complete.registered if each.request.protect}
    passphrase = ("random:index/randomPassword:RandomPassword", "kek-passphrase")
    assert {(kind, name) for kind, name, _ in imported} >= protected - {passphrase}
    for each in stated:
        if each[:2] == ["pulumi", "import"]:
            assert each[each.index("--provider") + 1] == f"aws={PROVIDER}"


def test_a_bucket_that_was_imported_keeps_its_name() -> None:
    """Pulumi generated the bucket's name. Without `ignoreChanges`, Pulumi would replace an imported bucket by a bucket
    with another name."""
    ignored = {each.name: set(each.request.ignoreChanges) for each in run().of_type("s3.Bucket")}
    assert len(ignored) == 3 and all("bucket" in names for names in ignored.values())


def test_the_volume_records_the_buckets_that_belong_to_it() -> None:
    tags = run().one("ebs.Volume").inputs["tags"]
    assert {name: value for name, value in tags.items() if "bucket" in name} == BUCKETS


def test_a_parameter_of_that_name_is_refused_where_there_is_no_volume() -> None:
    refused = run(replace(LAUNCHED, volumes={}), state="empty", preview=True).refusal
    assert refused.startswith("The parameter /mlflow-ami/dev/credentials belongs to the stack dev of mlflow-ami")
    assert "Import the three buckets in the same way" in refused
    assert ["aws:ssm/parameter:Parameter", "credentials", "/mlflow-ami/dev/credentials"] in [
        each[-3:] for each in commands(refused)
    ]


def test_another_parameter_that_is_left_over_is_refused_with_its_own_command() -> None:
    there = Account(parameters={"certificate-authority": "PEM"})
    refused = run(there, preview=True).refusal
    assert refused.startswith("The parameter /mlflow-ami/dev/certificate-authority exists, but the selected state")
    assert refused.endswith(
        " aws:ssm/parameter:Parameter certificate-authority /mlflow-ami/dev/certificate-authority`."
    )


def test_failed_look_up_does_not_hide_the_refusal() -> None:
    there = replace(LAUNCHED, broken={"getEips": "AccessDenied", "getInstances": "AccessDenied"})
    assert f"The data volume {VOLUME} belongs to" in run(there, state="empty").refusal


def test_a_renamed_stack_is_refused_with_its_former_name() -> None:
    """Tags and parameters contain the stack's name, so a look-up with a new name after `pulumi stack rename` fails."""
    refused = run(Account(), state="complete prod", preview=True).refusal
    assert refused == (
        f"This stack was renamed: {VOLUME} and the parameters belong to the stack prod, and they cannot be renamed. "
        "Rename the stack back with `pulumi stack rename prod`; nothing was changed."
    )


def test_a_complete_state_is_not_refused() -> None:
    for there in (LAUNCHED, replace(LAUNCHED, volumes=data_volume())):
        assert run(there).refusal == run(there, preview=True).refusal == ""


def test_no_secret_is_looked_up() -> None:
    refused = run(LAUNCHED, state="empty")
    asked = [arguments for function, arguments in refused.lookups if function == "getParametersByPath"]
    assert [each["withDecryption"] for each in asked] == [False]
    assert "AQICAHh" not in refused.refusal and "AQICAHh" not in json.dumps(refused.log)
