#!/usr/bin/env bash
# Installs what the distribution provides: PostgreSQL without a cluster, nginx, Python, backup and certificate tools.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1

# The cluster lives on the data volume, which no image has. Written before PostgreSQL's own scripts look for it.
install -D -m 0644 /dev/stdin /etc/postgresql-common/createcluster.d/mlflow-host.conf <<'EOF'
create_main_cluster = false
EOF

packages=(
  ca-certificates
  certbot
  logrotate
  nftables
  nginx
  pgbackrest
  postgresql
  python3
  python3-venv
  zstd
)

apt-get update --quiet=2
# A machine that will be stopped and imaged has no use for an fsync per unpacked file.
apt-get install --yes --quiet=2 --no-install-recommends -o DPkg::Lock::Timeout=300 -o DPkg::Options::=--force-unsafe-io \
  "${packages[@]}" </dev/null
sync

nginx -v
psql --version
if [ -n "$(pg_lsclusters --no-header)" ]; then
  echo "install_packages: a PostgreSQL cluster was made at installation:" >&2
  pg_lsclusters >&2
  exit 1
fi
