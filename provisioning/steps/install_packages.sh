#!/usr/bin/env bash
# Bake step: install PostgreSQL without a cluster, nginx, Python, and the tools for backups and certificates.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1

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

missing=()
for package in "${packages[@]}"; do
  if [[ $(LC_ALL=C apt-cache policy "$package") != *"Candidate: "[^\(]* ]]; then missing+=("$package"); fi
done
if [ ${#missing[@]} -gt 0 ]; then
  # shellcheck source=/dev/null
  system=$(. /etc/os-release && echo "$PRETTY_NAME")
  echo "install_packages: cannot install ${missing[*]}: the archives of $system have no such package for" \
    "$(dpkg --print-architecture); choose another source image, on Ubuntu one with the component universe" >&2
  exit 1
fi

# Do not create a cluster in the image, because each machine has its cluster on the data volume. PostgreSQL's package
# scripts read this setting during installation.
install -D -m 0644 /dev/stdin /etc/postgresql-common/createcluster.d/mlflow-host.conf <<'EOF'
create_main_cluster = false
EOF

# dpkg skips the fsync after each unpacked file, because the `sync` below writes all files to disk.
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
