"""The modules of scripts/images.py.

`ec2_images` reads the images of one account and region, with the images' descriptions, tags and names.
`record` stores the facts of an image in Systems Manager.
`channels` reads and sets the image that a channel names, and reads the channel's history.
`claims` finds the reasons why an image must stay: instances, channels, stacks and PostgreSQL major versions.
`list_and_show` contains the commands `list` and `show`.
`comparing` contains the command `diff`.
`promoting` contains the command `promote`, and records the drills that this command requires.
`retiring` contains the commands `deprecate`, `retire` and `sweep`.
`copying` contains the command `copy`, which copies images to other regions.
`sharing` contains the commands `share` and `unshare`.
"""
