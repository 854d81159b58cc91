build {
  sources = ["source.amazon-ebs.mlflow"]

  # ── Receive ───────────────────────────────────────────────────────────────────────────────────────────────────────

  provisioner "shell" {
    execute_command = "sudo env {{ .Vars }} {{ .Path }}"
    scripts         = ["${path.root}/../provisioning/steps/prepare_builder.sh"]
  }

  provisioner "file" {
    source      = "${path.root}/../provisioning/rootfs"
    destination = "/tmp/mlflow-host-bake"
  }

  provisioner "file" {
    sources     = [local.requirements, "${path.root}/../provisioning/installer.lock"]
    destination = "/tmp/mlflow-host-bake/"
  }

  dynamic "provisioner" {
    labels   = ["file"]
    for_each = var.ca_bundle == "" ? [] : [var.ca_bundle]
    content {
      source      = provisioner.value
      destination = "/tmp/mlflow-host-bake/ca-bundle.pem"
    }
  }

  # ── Install ───────────────────────────────────────────────────────────────────────────────────────────────────────

  provisioner "shell" {
    execute_command = "sudo env {{ .Vars }} {{ .Path }}"
    scripts = [
      "${path.root}/../provisioning/steps/install_packages.sh",
      "${path.root}/../provisioning/steps/install_server.sh",
      "${path.root}/../provisioning/steps/install_rootfs.sh",
      "${path.root}/../provisioning/steps/stop_updates.sh",
    ]
  }

  # ── Record ────────────────────────────────────────────────────────────────────────────────────────────────────────

  provisioner "shell" {
    execute_command = "sudo env {{ .Vars }} {{ .Path }}"
    environment_vars = [
      "IMAGE_VERSION=${local.image_version}",
      "GIT_COMMIT=${var.git_commit}",
      "GIT_DIRTY=${var.git_dirty}",
      "SOURCE_AMI=${build.SourceAMI}",
      "SOURCE_AMI_NAME=${build.SourceAMIName}",
    ]
    scripts = ["${path.root}/../provisioning/steps/record_facts.py"]
  }

  provisioner "file" {
    direction   = "download"
    source      = "/usr/share/mlflow-host/image.json"
    destination = "${var.output_directory}/image.json"
  }

  provisioner "file" {
    direction   = "download"
    source      = "/usr/share/mlflow-host/sbom.cdx.json"
    destination = "${var.output_directory}/sbom.cdx.json"
  }

  # ── Clean and check. No step runs after assert_image.py ────────────────────────────────────────────────────────────

  provisioner "shell" {
    execute_command = "sudo env {{ .Vars }} {{ .Path }}"
    scripts = [
      "${path.root}/../provisioning/steps/clean.sh",
      "${path.root}/../provisioning/steps/assert_image.py",
    ]
  }

  post-processor "manifest" {
    output = "${var.output_directory}/manifest.json"
  }
}
