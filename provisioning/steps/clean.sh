#!/usr/bin/env bash
# Bake step: remove the builder's identity, keys, credentials, logs and caches. assert_image.py checks the result.
set -euo pipefail

rm -rf /tmp/mlflow-host-bake /usr/sbin/policy-rc.d

# Caches. The package lists are removed too, because they would be outdated when the image is used.
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/cache/apt/*.bin
rm -rf /root/.cache /home/*/.cache /root/.local/share/uv

# Identity. Each machine creates its own host keys, machine ID and certificates at its first boot.
cloud-init clean --logs --seed
rm -f /etc/ssh/ssh_host_*
rm -f /etc/ssl/private/ssl-cert-snakeoil.key /etc/ssl/certs/ssl-cert-snakeoil.pem
find /etc/ssl/certs -xtype l -delete
rm -f /var/lib/systemd/random-seed /var/lib/systemd/credential.secret /var/lib/dbus/machine-id
ln -sf /etc/machine-id /var/lib/dbus/machine-id
: >/etc/machine-id

# Remove the network configuration for the builder's interfaces. cloud-init writes a new configuration on each machine.
rm -f /etc/netplan/50-cloud-init.yaml /etc/network/interfaces.d/50-cloud-init /etc/systemd/network/10-cloud-init-*

# Access and history.
rm -rf /root/.ssh /home/*/.ssh
rm -f /root/.*_history /home/*/.*_history /root/.wget-hsts /root/.lesshst /home/*/.lesshst
rm -f /root/.sudo_as_admin_successful /home/*/.sudo_as_admin_successful

# Logs. After this command, journald writes to memory, so that the image contains no log of the builder's shutdown.
journalctl --relinquish-var
if systemctl cat rsyslog.service >/dev/null 2>&1; then
  systemctl mask --runtime --now --quiet syslog.socket rsyslog.service
fi
rm -rf /var/log/journal/* /var/log/apt /var/log/unattended-upgrades /var/log/dist-upgrade /var/log/cloud-init*
find /var/log -type f \( -name '*.gz' -o -name '*.[0-9]' -o -name '*.old' \) -delete
find /var/log -type f -exec truncate --size 0 {} +
install -d /var/log/apt

find /tmp /var/tmp -mindepth 1 -maxdepth 1 ! -name 'systemd-private-*' ! -name "$(basename "$0")" -exec rm -rf {} +
sync
