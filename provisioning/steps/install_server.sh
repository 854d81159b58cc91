#!/usr/bin/env bash
# Installs the server's Python environment in /opt/mlflow: exactly what requirements.lock names, byte-compiled.
set -euo pipefail
umask 022

bake=/tmp/mlflow-host-bake
installer=$bake/installer
if [ -e "$bake/ca-bundle.pem" ]; then
  export PIP_CERT=$bake/ca-bundle.pem SSL_CERT_FILE=$bake/ca-bundle.pem
fi

# uv installs in a fraction of pip's time; it is pinned by hash like the rest and does not stay.
python3 -m venv "$installer"
"$installer/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check --require-hashes \
  --only-binary :all: --requirement "$bake/installer.lock"

python3 -m venv --without-pip /opt/mlflow
UV_LINK_MODE=copy "$installer/bin/uv" pip sync --no-config --no-cache --quiet --python /opt/mlflow/bin/python \
  --require-hashes --only-binary :all: --compile-bytecode "$bake/requirements.lock"
rm -f /opt/mlflow/.lock

# What is installed can be compared with what was asked for, in the image as well as at the bake.
install -D -m 0644 "$bake/requirements.lock" /usr/share/mlflow-host/requirements.lock

# The boot package is imported from where it ships.
site_packages=$(/opt/mlflow/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo /usr/lib/mlflow-host >"$site_packages/mlflow-host.pth"

# nginx serves the user interface from disk, compressed once and for all (gzip_static).
find "$site_packages/mlflow/server/js/build" -type f \( -name '*.js' -o -name '*.css' -o -name '*.svg' \) -size +1k \
  -exec gzip -9 --keep --force {} +

/opt/mlflow/bin/mlflow --version
