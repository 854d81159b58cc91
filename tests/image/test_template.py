"""Tests of the Packer template and the provisioning: types, descriptions, format, completeness, no local cloud."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.baking import packer_run, request, source_images, template
from tests.support.servers import script

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "packer"
STEPS = REPOSITORY / "provisioning" / "steps"
VARIABLE = re.compile(r'^variable "(\w+)" \{\n(.*?)^\}', re.MULTILINE | re.DOTALL)


def hcl() -> dict[str, str]:
    """Return the text of every file of the template, by file name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATE.glob("*.pkr.hcl"))}


def variables() -> dict[str, str]:
    """Return the body of every variable block, by the variable's name."""
    return dict(VARIABLE.findall("".join(hcl().values())))


def test_template_is_split_by_role() -> None:
    assert set(hcl()) == {"plugins.pkr.hcl", "variables.pkr.hcl", "source.pkr.hcl", "build.pkr.hcl"}
    assert "required_plugins" in hcl()["plugins.pkr.hcl"]
    assert all("required_plugins" not in text for name, text in hcl().items() if name != "plugins.pkr.hcl")


def test_every_variable_is_typed_described_and_used() -> None:
    everything = "".join(hcl().values())
    assert variables()
    for name, body in variables().items():
        assert re.search(r"^  type\s+= ", body, re.MULTILINE), f"variable {name} has no type"
        assert re.search(r'^  description = "[A-Z].*\."$', body, re.MULTILINE), f"variable {name} is not described"
        assert f"var.{name}" in everything, f"variable {name} is used nowhere"


def test_only_the_region_has_to_be_given() -> None:
    assert [name for name, body in variables().items() if "default" not in body] == ["region"]


def test_image_is_encrypted_by_default() -> None:
    assert re.search(r"default\s+= true", variables()["encrypted"])
    assert re.search(r"encrypted\s+= var\.encrypted", hcl()["source.pkr.hcl"])


def test_source_image_is_canonicals_newest_unless_named() -> None:
    assert re.search(r'default\s+= \["099720109477"\]', variables()["source_ami_owners"])
    assert re.search(r'default\s+= ""', variables()["source_ami_name"])


EXPECTED = {
    "x86_64": (source_images.SOURCE_NAMES["x86_64"], "t3.medium", r"mlflow-ami-\d+\.\d+\.\d+-2026v"),
    "arm64": (source_images.SOURCE_NAMES["arm64"], "t4g.medium", r"mlflow-ami-\d+\.\d+\.\d+-2026v-arm64"),
}


@pytest.mark.skipif(not shutil.which("packer"), reason="packer is not installed")
@pytest.mark.parametrize("architecture", EXPECTED)
def test_source_image_builder_and_names_follow_the_architecture(architecture: str, tmp_path: Path) -> None:
    """Packer evaluates the locals of the template in the folder that bake.py stages."""
    staged = template.stage(request.Bake("id", "v", tmp_path), packer_run.find_packer(), None)
    given = ["-var=region=eu-central-1", "-var=image_version=2026v", f"-var=architecture={architecture}"]

    def value(name: str) -> str:
        asked = subprocess.run(
            ["packer", "console", *given, str(staged.template)], input=name, capture_output=True, text=True
        )
        return asked.stdout.strip()

    found = [value(f"local.{name}") for name in ("source_ami_name", "instance_type", "ami_name")]
    source, builder, name = EXPECTED[architecture]
    assert found[:2] == [source, builder]
    assert re.fullmatch(name, found[2])
    assert value('local.tags["mlflow-ami:architecture"]') == architecture


@pytest.mark.skipif(not shutil.which("packer"), reason="packer is not installed")
def test_packer_refuses_an_unknown_architecture(tmp_path: Path) -> None:
    staged = template.stage(request.Bake("id", "v", tmp_path), packer_run.find_packer(), None)
    command = ["packer", "validate", "-var=region=eu-central-1", "-var=architecture=riscv64", str(staged.template)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "The architecture must be x86_64 or arm64." in done.stdout + done.stderr


def test_image_and_builder_answer_imdsv2_only_with_every_packer() -> None:
    whole = hcl()["source.pkr.hcl"]
    assert re.search(r'^  imds_support = "v2.0"$', whole, re.MULTILINE)
    assert re.search(r'^    http_tokens +=  *"required"$', whole, re.MULTILINE)
    old = template.for_packer_1_6(whole)
    assert "imds_support" not in old and "metadata_options" not in old
    before, after = whole.split("  # BEGIN Packer 1.7")[0], whole.split("  # END Packer 1.7 and later\n")[1]
    assert old == before + after


def test_build_names_every_step_and_every_step_exists() -> None:
    named = re.findall(r"/provisioning/steps/([\w.]+)\"", hcl()["build.pkr.hcl"])
    assert sorted(named) == sorted(path.name for path in STEPS.iterdir() if path.is_file())
    assert named[-1] == "assert_image.py", "a step runs after assert_image"
    assert named[-2] == "clean.sh"


def test_steps_stop_at_the_first_error_and_fit_on_a_page() -> None:
    for step in sorted(STEPS.glob("*.sh")):
        lines = step.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "#!/usr/bin/env bash", step.name
        assert lines[1].startswith("# "), f"{step.name} has no comment with its purpose"
        assert "set -euo pipefail" in lines[:6], step.name
        assert len(lines) <= 70, step.name
        assert step.stat().st_mode & 0o111, f"{step.name} is not executable"


@pytest.mark.parametrize("folder", ["packer", "provisioning"])
def test_provisioning_does_not_mention_the_embedded_cloud(folder: str) -> None:
    tells = re.compile(r"local.?cloud|embedded cloud|\bmoto\b|seaweed|podman|127\.10\.", re.IGNORECASE)
    for path in (REPOSITORY / folder).rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".lock", ".pyc"):
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                assert not tells.search(line), f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"


@pytest.mark.skipif(not shutil.which("packer"), reason="packer is not installed")
def test_template_is_formatted() -> None:
    done = subprocess.run(["packer", "fmt", "-check", "-diff", str(TEMPLATE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("packer"), reason="packer is not installed")
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--subnet", "subnet-1"],
        ["--unencrypted"],
        ["--kms-key", "alias/x"],
        ["--instance-type", "c7i.large"],
        ["--architecture", "arm64"],
    ],
)
def test_packer_accepts_the_template_offline(options: list[str]) -> None:
    assert "accepts the template" in script("bake.py", "--validate", *options).stderr


@pytest.mark.skipif(not shutil.which("packer"), reason="packer is not installed")
def test_packer_accepts_the_template_with_a_ca_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("-----BEGIN CERTIFICATE-----\n")
    assert "accepts the template" in script("bake.py", "--validate", "--ca-bundle", str(bundle)).stderr
