#!/usr/bin/env bash
# Bake step: install the packages of requirements.lock in the server's environment /opt/mlflow, and byte-compile them.
set -euo pipefail
umask 022

bake=/tmp/mlflow-host-bake
installer=$bake/installer
if [ -e "$bake/ca-bundle.pem" ]; then
  export PIP_CERT=$bake/ca-bundle.pem SSL_CERT_FILE=$bake/ca-bundle.pem
fi

# uv installs much faster than pip. uv is also pinned by hash, and it is not part of the image.
python3 -m venv "$installer"
"$installer/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check --require-hashes \
  --only-binary :all: --requirement "$bake/installer.lock"

python3 -m venv --without-pip /opt/mlflow
UV_LINK_MODE=copy "$installer/bin/uv" pip sync --no-config --no-cache --quiet --python /opt/mlflow/bin/python \
  --require-hashes --only-binary :all: --compile-bytecode "$bake/requirements.lock"
rm -f /opt/mlflow/.lock

# Keep the lock file in the image, so that assert_image.py can compare the installed packages with the lock file.
install -D -m 0644 "$bake/requirements.lock" /usr/share/mlflow-host/requirements.lock

# This .pth file lets the server's Python import the package mlflow_host from /usr/lib/mlflow-host.
site_packages=$(/opt/mlflow/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo /usr/lib/mlflow-host >"$site_packages/mlflow-host.pth"

# nginx serves the user interface from disk. The files are compressed here, so that nginx does not compress them for
# each response (gzip_static).
find "$site_packages/mlflow/server/js/build" -type f \( -name '*.js' -o -name '*.css' -o -name '*.svg' \) -size +1k \
  -exec gzip -9 --keep --force {} +

/opt/mlflow/bin/mlflow --version
