source "amazon-ebs" "mlflow" {
  ami_name        = local.ami_name
  ami_description = "MLflow ${local.mlflow_version} tracking server (mlflow-ami ${local.image_version}, ${var.git_commit})"
  tags            = local.tags
  snapshot_tags   = local.tags

  source_ami_filter {
    owners      = var.source_ami_owners
    most_recent = true
    filters = {
      name                = local.source_ami_name
      architecture        = var.architecture
      root-device-type    = "ebs"
      virtualization-type = "hvm"
    }
  }

  region                      = var.region
  instance_type               = local.instance_type
  subnet_id                   = var.subnet_id
  associate_public_ip_address = true
  ena_support                 = true
  run_tags                    = merge(local.tags, { "Name" = "mlflow-ami builder" })
  run_volume_tags             = merge(local.tags, { "Name" = "mlflow-ami builder" })

  # The builder and the image require IMDSv2. Packer 1.6 does not have the arguments below, so scripts/bake.py removes
  # them for Packer 1.6 and requires IMDSv2 itself. The builder has no instance profile, so its metadata service returns
  # no credentials.
  # BEGIN Packer 1.7 and later
  imds_support = "v2.0"
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  # END Packer 1.7 and later

  # The root volume is encrypted when it is created. With encrypt_boot, Packer would copy an unencrypted image.
  launch_block_device_mappings {
    device_name           = "/dev/sda1"
    volume_type           = "gp3"
    volume_size           = var.root_volume_gib
    iops                  = 3000
    throughput            = 125
    encrypted             = var.encrypted
    kms_key_id            = var.kms_key_id
    delete_on_termination = true
  }

  communicator                          = "ssh"
  ssh_username                          = var.ssh_username
  ssh_timeout                           = "5m"
  temporary_key_pair_name               = "mlflow-ami-bake-${var.bake_id}"
  temporary_security_group_source_cidrs = var.ssh_cidrs

  custom_endpoint_ec2     = var.ec2_endpoint
  skip_region_validation  = var.ec2_endpoint != ""
  skip_metadata_api_check = var.ec2_endpoint != ""
}
