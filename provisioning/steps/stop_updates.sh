#!/usr/bin/env bash
# Bake step: turn off automatic updates. To update packages, bake a new image.
set -euo pipefail

systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer apt-daily.service apt-daily-upgrade.service
if systemctl cat unattended-upgrades.service >/dev/null 2>&1; then
  systemctl mask --quiet unattended-upgrades.service
fi
install -m 0644 /dev/stdin /etc/apt/apt.conf.d/99mlflow-host <<'EOF'
APT::Periodic::Enable "0";
EOF
if command -v snap >/dev/null; then snap refresh --hold; fi

# Disable the distribution's services that this project's units replace.
for unit in postgresql.service certbot.timer; do
  if systemctl is-enabled --quiet "$unit" 2>/dev/null; then systemctl disable --quiet "$unit"; fi
done

# Hold the packages on which the server depends, so that `apt upgrade` does not change these packages.
dpkg-query --show --showformat '${db:Status-Abbrev} ${Package}\n' |
  awk '$1 == "ii" && $2 ~ /^(postgresql|libpq5|nginx|libnginx|python3|libpython3|pgbackrest|certbot)/ { print $2 }' |
  xargs apt-mark hold >/dev/null
