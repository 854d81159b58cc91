"""Modules that timers run (disk space, CloudWatch metrics, users), and the watchdog of PostgreSQL and nginx."""
