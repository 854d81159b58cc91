#!/usr/bin/env bash
# Installs the packages that a group of commands needs: Debian packages, and Python packages in .venv. Idempotent. On a
# system without apt, only the groups `aws` and `check` work, and only Python packages are installed.
#   `scripts/prepare.sh aws` installs the packages for bakes and launches on AWS, and for the examples.
#   `scripts/prepare.sh demo` installs the packages of `aws` and of the local cloud.
#   `scripts/prepare.sh check` installs the Python packages of `make check`, and no Debian packages.
#   `scripts/prepare.sh lint` installs the packages of `make lint`.
#   `scripts/prepare.sh bench` installs the packages of `demo` and of `make bench`.
#   `scripts/prepare.sh test` installs the packages of all groups and of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

cloud=(podman runc slirp4netns uidmap mmdebstrap debian-archive-keyring openssh-client e2fsprogs iproute2 util-linux
  nginx-light)
contenders=(postgresql apache2-utils)
case "${1:-}" in
  aws) wanted=(packer git) extras=examples ;;
  demo) wanted=(packer git "${cloud[@]}") extras=examples,local-cloud ;;
  check) wanted=() extras=examples,local-cloud,test ;;
  lint) wanted=(packer git shellcheck) extras=examples,local-cloud,test ;;
  bench) wanted=(packer git "${cloud[@]}" "${contenders[@]}" chromium chromium-driver) extras=examples,local-cloud,test ;;
  test) wanted=(packer git "${cloud[@]}" "${contenders[@]}" mariadb-server certbot pebble chromium chromium-driver
    shellcheck testssl.sh lynis curl systemd prometheus) extras=examples,local-cloud,test ;;
  *) echo "usage: scripts/prepare.sh aws|check|demo|lint|bench|test" >&2; exit 2 ;;
esac

say() { echo "prepare: $*" >&2; }
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else say "installing packages needs root: install sudo, or run this as root"; exit 2; fi
}
# Runs a command as the owner of the checkout. Under sudo, the files in .venv thus belong to this owner, not to root.
as_owner() {
  local owner group
  owner=$(stat -c %u . 2>/dev/null || stat -f %u .) group=$(stat -c %g . 2>/dev/null || stat -f %g .)
  if [ "$(id -u)" = 0 ] && [ "$owner" != 0 ] && command -v setpriv >/dev/null; then
    setpriv --reuid="$owner" --regid="$group" --init-groups \
      env HOME="$(getent passwd "$owner" | cut -d: -f6)" PYTHONDONTWRITEBYTECODE= "$@"
  else "$@"; fi
}
installed() { dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
makes_venvs() { new_enough "$1" && "$1" -c 'import ensurepip, venv' 2>/dev/null; }

missing=()
if command -v apt-get >/dev/null; then
  makes_venvs python3 || wanted+=(python3 python3-venv)
  for package in "${wanted[@]}"; do
    if [ "$package" = packer ] && command -v packer >/dev/null; then continue; fi
    installed "$package" || missing+=("$package")
  done
elif [ "$1" != aws ] && [ "$1" != check ]; then
  say "the local cloud and the tests run on Debian 12 or Ubuntu 24.04, and this system has no apt: \`make prepare\` is enough for AWS"
  exit 2
fi
if [ ${#missing[@]} -gt 0 ]; then
  say "installing with apt: ${missing[*]}"
  log=$(mktemp -t mlflow-ami-apt.XXXXXX)
  # PostgreSQL, MariaDB and nginx are needed as programs only. policy-rc.d prevents the start of their services now, and
  # `systemctl disable` below prevents their start at the next boot.
  held=
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    held=1
    trap '[ -z "$held" ] || as_root rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee /usr/sbin/policy-rc.d >/dev/null
    as_root chmod 755 /usr/sbin/policy-rc.d
  fi
  as_root apt-get update -qq >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1 \
    || { cat "$log" >&2; say "apt could not install: ${missing[*]}"; exit 1; }
  if [ -d /run/systemd/system ]; then
    for package in "${missing[@]}"; do
      case $package in
        postgresql | nginx-light | mariadb-server)
          package=${package%-light}
          as_root systemctl disable --quiet "${package%-server}" || true ;;
        certbot) as_root systemctl disable --quiet certbot.timer || true ;;
        prometheus) as_root systemctl disable --quiet prometheus || true ;;
      esac
    done
  fi
  rm -f "$log"
fi

python=
for each in python3 python3.13 python3.12 python3.11; do
  if makes_venvs "$each"; then python=$each; break; fi
done
if [ -z "$python" ]; then
  say "Python 3.11 or newer with its module venv is needed, and python3 here is $(python3 -V 2>&1): install one"
  exit 2
fi
inputs=$(cat pyproject.toml provisioning/requirements.lock | cksum | tr ' ' -)
if ! new_enough .venv/bin/python || { [ ! -e ".venv/prepared-$inputs-$1" ] && [ ! -e ".venv/prepared-$inputs-test" ]; }; then
  say "installing Python packages into .venv"
  new_enough .venv/bin/python || as_owner "$python" -m venv --clear .venv
  as_owner .venv/bin/python -m pip install -q --disable-pip-version-check uv
  # .venv gets the MLflow release that the server's lock file names. If the package index lacks mlflow-skinny of this
  # release, the lock file omits mlflow-skinny (scripts/lock.py), and .venv gets the newest older MLflow release.
  same='=='
  grep -q '^mlflow-skinny==' provisioning/requirements.lock || same='<='
  mlflow=$(sed -n "s/^mlflow==\([^ ;]*\).*/mlflow$same\1/p" provisioning/requirements.lock)
  as_owner .venv/bin/uv pip install -q --python .venv/bin/python -e ".[$extras]" ${mlflow:+"$mlflow"}
  for stamp in .venv/prepared-*; do case $stamp in *"-$inputs-"*) ;; *) rm -f "$stamp" ;; esac; done
  as_owner touch ".venv/prepared-$inputs-$1"
fi
if [ "$1" = aws ]; then
  for each in packer pulumi; do
    command -v "$each" >/dev/null || say "$each is not on PATH: README says where to get it"
  done
fi
say "ready"
