# ── What goes in ────────────────────────────────────────────────────────────────────────────────────────────────────

variable "source_ami_name" {
  type        = string
  default     = "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*"
  description = "Name of the image to build on: a pattern, of which the newest match is taken, or an exact name."
}

variable "source_ami_owners" {
  type        = list(string)
  default     = ["099720109477"]
  description = "Account ids or aliases that may own the source image. The default is Canonical."
}

variable "ssh_username" {
  type        = string
  default     = "ubuntu"
  description = "User of the source image that may use sudo without a password."
}

# ── What comes out ──────────────────────────────────────────────────────────────────────────────────────────────────

variable "image_version" {
  type        = string
  default     = ""
  description = "Version of the image, as 20261122T101500Z. Empty: the time of the build, in UTC."
}

variable "git_commit" {
  type        = string
  default     = "unknown"
  description = "Commit the image is built from, recorded in it."
}

variable "git_dirty" {
  type        = bool
  default     = true
  description = "Whether the checkout differed from git_commit, recorded in the image."
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
  description = "KMS key of the encrypted snapshot. Empty: the account's default key for EBS, which no other account can use."
}

# ── Where and how it is built ───────────────────────────────────────────────────────────────────────────────────────

variable "region" {
  type        = string
  description = "Region the image is built and registered in."
}

variable "instance_type" {
  type        = string
  default     = "t3.medium"
  description = "Instance type of the builder. It has no influence on where the image can run, architecture apart."
}

variable "subnet_id" {
  type        = string
  default     = ""
  description = "Subnet of the builder. Empty: one of the region's default VPC."
}

variable "ssh_cidrs" {
  type        = list(string)
  default     = ["0.0.0.0/0"]
  description = "Networks from which the builder's SSH port is reached, with a key pair that exists for the build only."
}

variable "bake_id" {
  type        = string
  default     = "unnamed"
  description = "Names this build: everything temporary carries it in the tag mlflow-ami:bake, so that it can be found and removed."
}

variable "ca_bundle" {
  type        = string
  default     = ""
  description = "File of PEM certificates that Python packages are downloaded with, for networks that re-sign TLS. It does not stay in the image."
}

variable "ec2_endpoint" {
  type        = string
  default     = ""
  description = "URL of the EC2 API, for VPC endpoints and EC2-compatible clouds. Empty: the region's own."
}

variable "output_directory" {
  type        = string
  default     = "."
  description = "Directory on this machine that receives manifest.json and image.json."
}

locals {
  image_version = var.image_version == "" ? formatdate("YYYYMMDD'T'hhmmss'Z'", timestamp()) : var.image_version

  # The lock file is the one place that says which MLflow this is. (Packer 1.6 has no regex().)
  requirements   = "${path.root}/../provisioning/requirements.lock"
  mlflow_version = split(" ", split("\nmlflow==", file(local.requirements))[1])[0]

  ami_name = "mlflow-ami-${local.mlflow_version}-${local.image_version}"

  # What stays carries these; scripts/bake.py adds the facts it reads back from the image.
  tags = {
    "Name"                      = local.ami_name
    "mlflow-ami:bake"           = var.bake_id
    "mlflow-ami:image-version"  = local.image_version
    "mlflow-ami:git-commit"     = var.git_commit
    "mlflow-ami:mlflow-version" = local.mlflow_version
  }
}
