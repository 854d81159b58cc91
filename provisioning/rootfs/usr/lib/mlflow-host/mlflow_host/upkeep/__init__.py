"""Modules that timers run: disk space, CloudWatch metrics, users."""
