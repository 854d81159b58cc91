"""The parts of scripts/images.py.

catalog     images of an account and region: descriptions, tags, names
record      the facts of an image, stored in Systems Manager
channels    which image a channel names, and its history
claims      why an image must stay: instances, channels, stacks, PostgreSQL majors
listing     list, show
comparing   diff
promoting   promote, and the drills that it requires
retiring    deprecate, retire, sweep
copying     copy to other regions
sharing     share, unshare
"""
