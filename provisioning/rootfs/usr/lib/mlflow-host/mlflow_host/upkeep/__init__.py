"""Programs that timers start (disk space, CloudWatch metrics, credentials, users), and the watchdog service."""
