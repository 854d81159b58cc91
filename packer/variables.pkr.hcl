# ── Source image ────────────────────────────────────────────────────────────────────────────────────────────────────

variable "architecture" {
  type        = string
  default     = "x86_64"
  description = "Architecture of the image, in EC2's terms: x86_64 (t3, m7i), or arm64 for Graviton (t4g, m7g)."

  validation {
    condition     = var.architecture == "x86_64" || var.architecture == "arm64"
    error_message = "The architecture must be x86_64 or arm64."
  }
}

variable "source_ami_name" {
  type        = string
  default     = ""
  description = "Name of the source image: an exact name, or a pattern whose newest match is used. Empty: Ubuntu 24.04 of the architecture."
}

variable "source_ami_owners" {
  type        = list(string)
  default     = ["099720109477"]
  description = "Account IDs or aliases of the allowed owners of the source image. The default is Canonical."
}

variable "ssh_username" {
  type        = string
  default     = "ubuntu"
  description = "User of the source image with passwordless sudo."
}

# ── Resulting image ─────────────────────────────────────────────────────────────────────────────────────────────────

variable "image_version" {
  type        = string
  default     = ""
  description = "Version of the image, such as 20261122T101500Z. Empty: the time of the build, in UTC."
}

variable "git_commit" {
  type        = string
  default     = "unknown"
  description = "Commit that the image is built from. Recorded in the image."
}

variable "git_dirty" {
  type        = bool
  default     = true
  description = "Whether the checkout differs from git_commit. Recorded in the image."
}

variable "root_volume_gib" {
  type        = number
  default     = 8
  description = "Size of the root volume, in GiB."
}

variable "encrypted" {
  type        = bool
  default     = true
  description = "Whether the root volume and the image's snapshot are encrypted. Only an unencrypted image can be made public."
}

variable "kms_key_id" {
  type        = string
  default     = ""
  description = "KMS key of the encrypted snapshot. Empty: the account's default key for EBS; other accounts cannot use such an image."
}

# ── Builder ─────────────────────────────────────────────────────────────────────────────────────────────────────────

variable "region" {
  type        = string
  description = "Region in which the image is built and registered."
}

variable "instance_type" {
  type        = string
  default     = ""
  description = "Instance type of the builder, of the architecture of the image. Empty: t3.medium, or t4g.medium for arm64."
}

variable "subnet_id" {
  type        = string
  default     = ""
  description = "Subnet of the builder. Empty: one of the region's default VPC."
}

variable "ssh_cidrs" {
  type        = list(string)
  default     = ["0.0.0.0/0"]
  description = "Networks that can reach the builder's SSH port. The key pair exists only during the build."
}

variable "bake_id" {
  type        = string
  default     = "unnamed"
  description = "ID of this build. All temporary resources have it in the tag mlflow-ami:bake, so that they can be found and removed."
}

variable "ca_bundle" {
  type        = string
  default     = ""
  description = "File of PEM certificates for downloading Python packages, for networks that re-sign TLS. It is not part of the image."
}

variable "ec2_endpoint" {
  type        = string
  default     = ""
  description = "URL of the EC2 API, for VPC endpoints and EC2-compatible clouds. Empty: the region's own."
}

variable "output_directory" {
  type        = string
  default     = "."
  description = "Local directory for manifest.json, image.json and sbom.cdx.json."
}

locals {
  image_version = var.image_version == "" ? formatdate("YYYYMMDD'T'hhmmss'Z'", timestamp()) : var.image_version

  # The lock file defines the MLflow release. The code uses split(), because Packer 1.6 has no regex().
  requirements   = "${path.root}/../provisioning/requirements.lock"
  mlflow_version = split(" ", split("\nmlflow==", file(local.requirements))[1])[0]

  # For each architecture: Ubuntu's name for it, the builder's default instance type, and the end of the image's name.
  amd64   = { ubuntu = "amd64", builder = "t3.medium", suffix = "" }
  arm64   = { ubuntu = "arm64", builder = "t4g.medium", suffix = "-arm64" }
  machine = var.architecture == "arm64" ? local.arm64 : local.amd64

  canonicals      = "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-${local.machine.ubuntu}-server-*"
  source_ami_name = var.source_ami_name == "" ? local.canonicals : var.source_ami_name
  instance_type   = var.instance_type == "" ? local.machine.builder : var.instance_type

  ami_name = "mlflow-ami-${local.mlflow_version}-${local.image_version}${local.machine.suffix}"

  # Tags of the image and its snapshots. Later, scripts/bake.py adds facts from image.json.
  tags = {
    "Name"                      = local.ami_name
    "mlflow-ami:bake"           = var.bake_id
    "mlflow-ami:image-version"  = local.image_version
    "mlflow-ami:git-commit"     = var.git_commit
    "mlflow-ami:mlflow-version" = local.mlflow_version
    "mlflow-ami:architecture"   = var.architecture
  }
}
