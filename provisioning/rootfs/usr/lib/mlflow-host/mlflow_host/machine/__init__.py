"""Shared code of all processes on the host: configuration, boot status, nginx, AWS calls, crash-safe file writes."""
