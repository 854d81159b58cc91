# Packer 1.6 has amazon-ebs built in and refuses this block; scripts/bake.py leaves this file out for it.
packer {
  required_version = ">= 1.7.0"

  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = ">= 1.3.0, < 2.0.0"
    }
  }
}
