#!/usr/bin/env bash
# Bake step: install distribution packages: PostgreSQL without a cluster, nginx, Python, backup and certificate tools.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1

# The cluster belongs on the data volume. PostgreSQL's package scripts read this setting during installation.
install -D -m 0644 /dev/stdin /etc/postgresql-common/createcluster.d/mlflow-host.conf <<'EOF'
create_main_cluster = false
EOF

packages=(
  ca-certificates
  certbot
  logrotate
  nftables
  nginx
  openssl
  pgbackrest
  postgresql
  python3
  python3-venv
  zstd
)

apt-get update --quiet=2
# Skip the fsync per unpacked file; the sync below is enough.
apt-get install --yes --quiet=2 --no-install-recommends -o DPkg::Lock::Timeout=300 -o DPkg::Options::=--force-unsafe-io \
  "${packages[@]}" </dev/null
sync

nginx -v
psql --version
if [ -n "$(pg_lsclusters --no-header)" ]; then
  echo "install_packages: the installation created a PostgreSQL cluster:" >&2
  pg_lsclusters >&2
  exit 1
fi
