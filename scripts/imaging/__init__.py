"""The parts of scripts/images.py.

catalog     images of an account and region: descriptions, tags, names
record      the facts of an image, kept in Systems Manager beside it
channels    which image a channel names, and its history
claims      who needs an image: instances, channels, stacks, PostgreSQL majors
listing     list, show
comparing   diff
promoting   promote, and the drills that it asks for
retiring    deprecate, retire, sweep
copying     copy to other regions
sharing     share, unshare
"""
