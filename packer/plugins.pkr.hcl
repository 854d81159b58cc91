# Packer 1.6 contains amazon-ebs and rejects this block, so scripts/bake.py omits this file for Packer 1.6.
packer {
  required_version = ">= 1.7.0"

  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = ">= 1.3.0, < 2.0.0"
    }
  }
}
