"""The parts of scripts/bake.py, in the order in which a bake uses them.

request         inputs: checkout, AWS credentials, region, network
source_images   the image to build on
template        the copied Packer template, its variables and its hash
packer_run      Packer's process and its log
report          progress, tags and result
cleanup         removal of temporary resources and of old files
"""
