"""The modules of follow.py: `proposal` makes the patch, and `page` makes the report page."""
