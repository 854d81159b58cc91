"""The modules of scripts/bake.py, in the order in which a bake uses them.

`request` reads the inputs of a bake: the checkout, the AWS credentials, the region and the network.
`source_images` finds the source image.
`template` copies the Packer template, sets its variables and computes its hash.
`packer_run` runs Packer and follows its log.
`report` prints the progress and the result, and tags the image.
`cleanup` removes temporary resources and old files.
"""
