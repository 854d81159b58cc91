#!/usr/bin/env bash
# Lets the first boot end and keeps everything off apt's lock, then makes room for what the bake uploads.
set -euo pipefail

# Where cloud-init found nothing wrong this is 0; 2 is "done, with a recoverable warning".
cloud-init status --wait >/dev/null || [ $? = 2 ]

systemctl stop --quiet apt-daily.timer apt-daily-upgrade.timer
systemctl stop --quiet apt-daily.service apt-daily-upgrade.service unattended-upgrades.service 2>/dev/null || true

# Services that packages bring are started by the first boot of the image, not by their installation.
install -m 0755 /dev/stdin /usr/sbin/policy-rc.d <<'EOF'
#!/bin/sh
exit 101
EOF

install -d -m 0700 -o "$SUDO_UID" -g "$SUDO_GID" /tmp/mlflow-host-bake
