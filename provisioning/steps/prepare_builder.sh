#!/usr/bin/env bash
# Bake step: wait for the end of the first boot, stop all services that lock apt, and create the folder for uploads.
set -euo pipefail

# `cloud-init status` returns 0 if there were no errors, and 2 if cloud-init finished with recoverable warnings.
cloud-init status --wait >/dev/null || [ $? = 2 ]

systemctl stop --quiet apt-daily.timer apt-daily-upgrade.timer
systemctl stop --quiet apt-daily.service apt-daily-upgrade.service unattended-upgrades.service 2>/dev/null || true

# This policy prevents dpkg from starting services when their packages are installed.
install -m 0755 /dev/stdin /usr/sbin/policy-rc.d <<'EOF'
#!/bin/sh
exit 101
EOF

install -d -m 0700 -o "$SUDO_UID" -g "$SUDO_GID" /tmp/mlflow-host-bake
