"""users.py adds, changes and removes users in the parameter that the server reads. No change is lost, and the last
admin is never removed. moto stands in for the parameter store."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from moto import mock_aws

from mlflow_host.contract import credentials
from scripts import prompts, users
from scripts.connect import ConnectedStack
from scripts.rehearsal.status_document import administrator

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAME = "/mlflow-ami/dev/credentials"
PASSPHRASE = "a passphrase that nobody knows"
ADMIN = {"admin": {"password": "Generated-by-Pulumi", "role": "admin"}}


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectedStack]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with mock_aws():
        made = ConnectedStack(
            "dev", boto3.client("ssm", region_name="eu-central-1"), {"credentials_parameter": NAME}, Path("-")
        )
        monkeypatch.setattr(users, "choose", lambda arguments: made)
        put(made, ADMIN)
        yield made


def put(stack: ConnectedStack, people: Any, **more: Any) -> None:
    document = {"format": 1, "kek_passphrase": PASSPHRASE, "users": people, **more}
    stack.ssm.put_parameter(Name=NAME, Type="SecureString", Value=json.dumps(document), Overwrite=True)


def kept(stack: ConnectedStack) -> credentials.Credentials:
    """Return the credentials that the server would read from the parameter."""
    return credentials.parse(stack.ssm.get_parameter(Name=NAME, WithDecryption=True)["Parameter"]["Value"])


def roles(stack: ConnectedStack) -> dict[str, str]:
    return {user.name: user.role for user in kept(stack).users}


def test_added_user_gets_a_generated_password_stored_as_a_hash(
    stack: ConnectedStack, capsys: pytest.CaptureFixture[str]
) -> None:
    assert users.main(["add", "ada"]) == 0
    out, err = capsys.readouterr()
    password = out.strip()
    assert len(password) == users.LENGTH and password not in err
    assert roles(stack) == {"admin": "admin", "ada": "writer"}
    assert kept(stack).kek_passphrase == PASSPHRASE
    (ada,) = [user for user in kept(stack).users if user.name == "ada"]
    assert ada.password.startswith("{SSHA}") and password not in ada.password
    assert credentials.hashed(ada.password) == ada.password, "the server would hash the hash"
    parameter = stack.ssm.get_parameter(Name=NAME)["Parameter"]
    assert parameter["Type"] == "SecureString"


def test_password_from_standard_input_is_not_printed(
    stack: ConnectedStack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("correct-horse-battery\n"))
    assert users.main(["add", "bob", "--role", "reader", "--stdin"]) == 0
    assert "correct-horse" not in "".join(capsys.readouterr())
    assert roles(stack)["bob"] == "reader"


@pytest.mark.parametrize("password", ["short", "", "with spaces in it", "é" * 12, "{SSHA}c29tZXRoaW5n", "x" * 129])
def test_bad_password_is_refused_without_showing_it(
    password: str, stack: ConnectedStack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{password}\n"))
    assert users.main(["add", "bob", "--stdin"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("users: a password must") and (not password or password not in err)
    assert roles(stack) == {"admin": "admin"}


def test_prompted_password_is_entered_twice(
    stack: ConnectedStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["correct-horse-battery", "correct-horse-bttery"])
    monkeypatch.setattr(prompts, "ask_secret", lambda name, instead: next(answers))
    assert users.main(["add", "bob", "--prompt"]) == 2
    assert capsys.readouterr().err == "users: the two passwords differ\n"


@pytest.mark.parametrize("how", ["--prompt", "--stdin"])
@pytest.mark.parametrize("stdin", ["<&-", "</dev/null"], ids=["closed", "empty"])
def test_prompt_without_a_terminal_is_one_error_sentence(how: str, stdin: str, tmp_path: Path) -> None:
    """The program runs in a new session without a controlling terminal, so it cannot open a terminal."""
    ask = "users.new_password(argparse.Namespace(name='bob', prompt={}, stdin={}))"
    program = (
        f"import argparse, enter_venv; from scripts import users; {ask.format(how == '--prompt', how == '--stdin')}"
    )
    guarded = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\ntry:\n    exec({program!r})\n"
    script = guarded + "except Exception as error:\n    print(type(error).__name__, error)\n"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {stdin}', sys.executable, script],
        capture_output=True, text=True, start_new_session=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith("ChangeRefused "), done.stdout + done.stderr
    assert ("no terminal to ask for Password for bob" if how == "--prompt" else "is empty") in done.stdout


def test_no_command_takes_a_password_as_an_argument(stack: ConnectedStack) -> None:
    for argv in (["add", "bob", "--password", "correct-horse-battery"], ["rotate", "admin", "correct-horse-battery"]):
        with pytest.raises(SystemExit) as ended:
            users.main(argv)
        assert ended.value.code == 2


def test_rotation_changes_the_password_and_nothing_else(
    stack: ConnectedStack, capsys: pytest.CaptureFixture[str]
) -> None:
    users.main(["add", "ada", "--role", "reader"])
    before = {user.name: user for user in kept(stack).users}
    users.main(["rotate", "ada"])
    after = {user.name: user for user in kept(stack).users}
    assert after["admin"] == before["admin"]
    assert after["ada"].role == "reader" and after["ada"].password != before["ada"].password


def test_password_of_the_stacks_admin_stays_readable_to_connect(
    stack: ConnectedStack, capsys: pytest.CaptureFixture[str]
) -> None:
    users.main(["rotate", "admin"])
    assert kept(stack).users[0].password == capsys.readouterr().out.strip() != "Generated-by-Pulumi"


def test_the_admins_new_password_is_a_hash_for_the_machine_and_readable_for_connect(
    stack: ConnectedStack, capsys: pytest.CaptureFixture[str]
) -> None:
    stack.facts["password_parameter"] = "/mlflow-ami/dev/admin-password"
    users.main(["add", "ada"])
    users.main(["rotate", "ada"])
    with pytest.raises(stack.ssm.exceptions.ParameterNotFound):
        stack.ssm.get_parameter(Name="/mlflow-ami/dev/admin-password")
    capsys.readouterr()
    users.main(["rotate", "admin"])
    password = capsys.readouterr().out.strip()
    assert kept(stack).users[0].password.startswith("{SSHA}")
    assert administrator(stack.ssm, stack.facts) == ("admin", password)


@pytest.mark.parametrize("argv", [["remove", "admin"], ["role", "admin", "reader"]])
def test_last_admin_cannot_be_removed(
    argv: list[str], stack: ConnectedStack, capsys: pytest.CaptureFixture[str]
) -> None:
    users.main(["add", "ada"])
    assert users.main(argv) == 2
    assert "this is the last admin" in capsys.readouterr().err
    assert roles(stack) == {"admin": "admin", "ada": "writer"}
    users.main(["role", "ada", "admin"])
    assert users.main(argv) == 0
    assert roles(stack) | {"admin": ""} == {"admin": "", "ada": "admin"}


def test_user_order_does_not_matter(stack: ConnectedStack) -> None:
    """In the short form, the first user is the admin. If the first user is removed, the second user must not become an
    admin."""
    put(stack, {"ada": "Password-of-ada", "bob": "Password-of-bob"})
    users.main(["add", "eve"])
    assert roles(stack) == {"ada": "admin", "bob": "writer", "eve": "writer"}
    assert users.main(["remove", "ada"]) == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["add", "admin"], "admin exists already: `rotate` sets a new password, `role` sets another role"),
        (["remove", "nobody"], "there is no user nobody: `users.py list` shows the users"),
        (["rotate", "nobody"], "there is no user nobody"),
        (["role", "nobody", "admin"], "there is no user nobody"),
        (["add", "a:b"], 'the user name "a:b" must be 1 to 64 letters'),
    ],
)
def test_impossible_change_is_one_error_sentence(
    argv: list[str], sentence: str, stack: ConnectedStack, capsys: pytest.CaptureFixture[str]
) -> None:
    assert users.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1
    assert roles(stack) == {"admin": "admin"}


def test_list_shows_roles_and_no_password(stack: ConnectedStack, capsys: pytest.CaptureFixture[str]) -> None:
    users.main(["add", "ada"])
    capsys.readouterr()
    users.main(["list"])
    assert capsys.readouterr().out == "admin  admin\nada    writer\n"
    users.main(["list", "--json"])
    assert json.loads(capsys.readouterr().out) == {"admin": "admin", "ada": "writer"}


def test_missing_or_unusable_parameter_is_reported(stack: ConnectedStack, capsys: pytest.CaptureFixture[str]) -> None:
    stack.ssm.put_parameter(Name=NAME, Type="SecureString", Value='{"format": 1, "kek_passphrase": 7}', Overwrite=True)
    assert users.main(["list"]) == 2
    assert "kek_passphrase must be a string" in capsys.readouterr().err
    stack.ssm.put_parameter(Name=NAME, Type="SecureString", Value="nonsense", Overwrite=True)
    assert users.main(["add", "ada"]) == 2
    assert "it is not JSON" in capsys.readouterr().err
    for value in ("5", "null", '["users"]', '"text"'):
        stack.ssm.put_parameter(Name=NAME, Type="SecureString", Value=value, Overwrite=True)
        assert users.main(["list"]) == 2
        assert capsys.readouterr().err == f"users: the parameter {NAME} cannot be read: it is not a JSON object\n"
    stack.ssm.delete_parameter(Name=NAME)
    assert users.main(["list"]) == 2
    assert "ParameterNotFound" in capsys.readouterr().err


# ── Concurrent changes ────────────────────────────────────────────────────────────────────────────────────────────────


def others_first(stack: ConnectedStack, monkeypatch: pytest.MonkeyPatch, *others: Callable[[], object]) -> None:
    """Call all functions in `others` after the next change has read the parameter and before it writes the
    parameter."""
    waiting = list(others)
    write = users.write

    def overtaken(stack: ConnectedStack, document: dict[str, Any], wanted: users.Users) -> int:
        while waiting:
            waiting.pop(0)()
        return write(stack, document, wanted)

    monkeypatch.setattr(users, "write", overtaken)


def test_concurrent_change_is_merged(stack: ConnectedStack, monkeypatch: pytest.MonkeyPatch) -> None:
    users.main(["add", "bob"])
    bob, eve = ({"password": f"Password-of-{name}", "role": "reader"} for name in ("bob", "eve"))
    others_first(
        stack,
        monkeypatch,
        lambda: put(stack, {**ADMIN, "bob": bob, "eve": eve}),
        lambda: put(stack, {**ADMIN, "eve": {**eve, "role": "writer"}}),
    )
    assert users.main(["add", "ada"]) == 0
    assert roles(stack) == {"admin": "admin", "ada": "writer", "eve": "writer"}, "bob was removed, eve added"


def test_two_admins_cannot_remove_each_other(
    stack: ConnectedStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    users.main(["add", "ada", "--role", "admin"])
    ada = kept(stack).users[1]
    others_first(stack, monkeypatch, lambda: put(stack, {"ada": {"password": ada.password, "role": "admin"}}))
    assert users.main(["remove", "ada"]) == 2
    assert "this is the last admin" in capsys.readouterr().err
    assert roles(stack) == {"ada": "admin"}


@hypothesis_settings(max_examples=150)
@given(*[st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz").map(lambda p: {"password": p}))] * 3)
def test_two_concurrent_changes_are_both_kept(before: users.Users, ours: users.Users, theirs: users.Users) -> None:
    found = users.merged(before, ours, theirs)
    for name in "abc":
        was, mine, other = before.get(name), ours.get(name), theirs.get(name)
        assert found.get(name) == (other if mine == was else mine)


@pytest.mark.long
@hypothesis_settings(max_examples=300)
@given(
    st.one_of(
        st.text(max_size=40),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=20),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["format", "users", "password", "role", "kek_passphrase", "a"]), inner
                )
            ),
            max_leaves=12,
        ).map(json.dumps),
        st.dictionaries(
            st.text(max_size=8), st.text(max_size=8) | st.dictionaries(st.text(max_size=8), st.text(max_size=8))
        ).map(lambda people: json.dumps({"format": 1, "kek_passphrase": "k" * 20, "users": people})),
    )
)
def test_any_parameter_content_gives_users_or_error_sentences(text: str) -> None:
    """Any content gives users or error sentences, and the password file has exactly one line per user."""
    try:
        found = credentials.parse(text)
    except credentials.CredentialsError as error:
        assert error.problems and all(problem.isprintable() for problem in error.problems)
        return
    assert any(user.role == "admin" for user in found.users)
    lines = credentials.password_file(found.users).splitlines()
    assert [line.split(":")[0] for line in lines] == [user.name for user in found.users]
