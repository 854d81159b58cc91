#!/usr/bin/env bash
# Prepares a Debian 12 or Ubuntu 24.04 machine: installs the missing apt packages and fills .venv. Safe to run again.
#   scripts/prepare.sh demo   what baking and rehearsing need
#   scripts/prepare.sh test   that, and what the tests need
set -euo pipefail
cd "$(dirname "$0")/.."

demo_packages=(podman runc slirp4netns uidmap packer mmdebstrap debian-archive-keyring openssh-client e2fsprogs iproute2 git)
test_packages=(postgresql nginx-light certbot pebble chromium chromium-driver shellcheck testssl.sh lynis)

case "${1:-}" in
  demo) wanted=("${demo_packages[@]}") extras= ;;
  test) wanted=("${demo_packages[@]}" "${test_packages[@]}") extras='[test]' ;;
  *) echo "usage: scripts/prepare.sh demo|test" >&2; exit 2 ;;
esac

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else echo "prepare: installing packages needs root: install sudo or run as root" >&2; exit 2; fi
}
installed() { dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }

python=$(command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then wanted+=(python3 python3-venv); fi

missing=()
for package in "${wanted[@]}"; do installed "$package" || missing+=("$package"); done
if [ ${#missing[@]} -gt 0 ]; then
  echo "prepare: installing with apt: ${missing[*]}" >&2
  log=$(mktemp -t mlflow-ami-apt.XXXXXX)
  # Services that a test only wants the programs of (PostgreSQL, nginx) are neither started now nor at the next boot.
  held=
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    held=1
    trap '[ -z "$held" ] || as_root rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee /usr/sbin/policy-rc.d >/dev/null
    as_root chmod 755 /usr/sbin/policy-rc.d
  fi
  as_root apt-get update -qq >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1 \
    || { cat "$log" >&2; echo "prepare: apt could not install: ${missing[*]}" >&2; exit 1; }
  if [ -d /run/systemd/system ]; then
    for package in "${missing[@]}"; do
      case $package in
        postgresql | nginx-light) as_root systemctl disable --quiet "${package%-light}" || true ;;
        certbot) as_root systemctl disable --quiet certbot.timer || true ;;
      esac
    done
  fi
  rm -f "$log"
fi

stamp=.venv/prepared-$(sha256sum pyproject.toml provisioning/requirements.lock | sha256sum | cut -c1-16)-${1}
if [ ! -e "$stamp" ]; then
  echo "prepare: installing Python packages into .venv" >&2
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip install -q --disable-pip-version-check uv
  # The client in .venv is the release that the server's lock file names.
  mlflow=$(sed -n 's/^mlflow==\([^ ;]*\).*/mlflow==\1/p' provisioning/requirements.lock)
  .venv/bin/uv pip install -q --python .venv/bin/python -e ".$extras" ${mlflow:+"$mlflow"}
  rm -f .venv/prepared-*
  touch "$stamp"
fi
echo "prepare: ready" >&2
