"""The parts of follow.py: the patch (`proposal`), the page."""
