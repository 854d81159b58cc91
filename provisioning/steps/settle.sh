#!/usr/bin/env bash
# Bake step: wait for the first boot to end, stop everything that locks apt, create the folder for uploads.
set -euo pipefail

# Exit status 0: no error; 2: finished with recoverable warnings.
cloud-init status --wait >/dev/null || [ $? = 2 ]

systemctl stop --quiet apt-daily.timer apt-daily-upgrade.timer
systemctl stop --quiet apt-daily.service apt-daily-upgrade.service unattended-upgrades.service 2>/dev/null || true

# Do not start services when their packages are installed.
install -m 0755 /dev/stdin /usr/sbin/policy-rc.d <<'EOF'
#!/bin/sh
exit 101
EOF

install -d -m 0700 -o "$SUDO_UID" -g "$SUDO_GID" /tmp/mlflow-host-bake
