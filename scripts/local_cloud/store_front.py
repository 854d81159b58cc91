"""The S3 endpoint: nginx with an HTTP port and an HTTPS port. nginx forwards requests to SeaweedFS or to the daemon.

SeaweedFS handles objects, versions, policies and lifecycle rules. The daemon (s3_bucket_settings.py) handles bucket
settings that SeaweedFS lacks or implements differently from AWS. nginx forwards a TLS request with TLS, because
SeaweedFS evaluates `aws:SecureTransport` from the connection. SeaweedFS has a condition key for the header Referer, but
no condition key for the header If-None-Match. nginx therefore copies If-None-Match to the Referer header, and roles.py
renames `s3:if-none-match`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from scripts.local_cloud import object_store_ca
from scripts.local_cloud.layout import Allotment, LocalCloudError, Places, write_atomically

TRANSPORT = "X-Local-Cloud-Transport"
"""Header that nginx sends to the daemon. The header's value is the scheme of the client's request, http or https."""

SETTINGS = ("accelerate", "acl", "location", "ownershipControls", "publicAccessBlock", "requestPayment")
"""Sub-resources of a bucket that the daemon handles. The daemon also handles GET and DELETE of `encryption`, and DELETE
of `policy`."""

CONFIGURATION = """\
daemon off;
user root;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  server_tokens off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 0;
  client_body_timeout 600;
  keepalive_timeout 300;
  keepalive_requests 1000000;
  large_client_header_buffers 8 64k;
  underscores_in_headers on;
  ignore_invalid_headers off;
  merge_slashes off;
  upstream store {{ server {inner}:{store_port}; keepalive 64; }}
  upstream store_tls {{ server {inner}:{store_tls_port}; keepalive 64; }}
  upstream settings {{ server 127.0.0.1:{api_port}; keepalive 8; }}
  map "$request_method $request_uri" $asked {{
    default objects;
    "~^(PUT|DELETE) /[^/?]+/?$" settings;
    "~^[A-Z]+ /[^/?]+/?\\?(.*&)?({settings})(=|&|$)" settings;
    "~^(GET|DELETE) /[^/?]+/?\\?(.*&)?encryption(=|&|$)" settings;
    "~^DELETE /[^/?]+/?\\?(.*&)?policy(=|&|$)" settings;
  }}
  map "$scheme $asked" $target {{
    "http objects" http://store;
    "https objects" https://store_tls;
    default http://settings;
  }}
  # pgBackRest sends a Host header without the port.
  map $http_host $foreign_host {{
    default 1;
    "~^(127\\.0\\.0\\.1|localhost|\\[::1\\])(:({port}|{tls_port}))?$" 0;
  }}
  # HeadBucket's response contains the region.
  map "$request_method $request_uri" $bucket_region {{
    "~^HEAD /[^/?]+/?$" {region};
    default "";
  }}
  # Default content type of objects; aws-chunked is a transfer coding, not part of the object.
  map $http_content_type $stored_type {{ "" binary/octet-stream; default $http_content_type; }}
  map $upstream_http_content_encoding $kept_encoding {{
    aws-chunked "";
    "~^aws-chunked, *(?<rest>.*)" $rest;
    "~^(?<rest>.*), *aws-chunked$" $rest;
    default $upstream_http_content_encoding;
  }}
  server {{
    listen 127.0.0.1:{port};
    listen 127.0.0.1:{tls_port} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    # Only programs may use this endpoint. Any web site can make a browser send requests to it.
    if ($http_origin) {{ return 403; }}
    if ($foreign_host) {{ return 403; }}
    if ($request_method = OPTIONS) {{ return 403; }}
    location / {{
      proxy_pass $target;
      proxy_hide_header Access-Control-Allow-Origin;
      proxy_hide_header Access-Control-Allow-Methods;
      proxy_hide_header Access-Control-Allow-Headers;
      proxy_hide_header Access-Control-Allow-Credentials;
      proxy_hide_header Access-Control-Expose-Headers;
      proxy_hide_header Access-Control-Max-Age;
      proxy_http_version 1.1;
      proxy_ssl_verify off;
      proxy_set_header Host $http_host;
      proxy_set_header Connection "";
      proxy_set_header Content-Type $stored_type;
      proxy_set_header {transport} $scheme;
      proxy_set_header Referer $http_if_none_match;
      proxy_hide_header Content-Encoding;
      add_header Content-Encoding $kept_encoding always;
      add_header x-amz-bucket-region $bucket_region always;
      proxy_request_buffering off;
      proxy_buffering off;
      proxy_buffer_size 64k;
      proxy_buffers 8 64k;
      proxy_connect_timeout 5;
      proxy_read_timeout 600;
      proxy_send_timeout 600;
    }}
  }}
}}
"""


def folder(places: Places) -> Path:
    return places.object_store / "front"


def start(places: Places, allotment: Allotment) -> None:
    """Start nginx in its own session. Raises LocalCloudError if nginx ends within 0.1 s."""
    where = folder(places)
    where.mkdir(exist_ok=True, mode=0o700)
    path = where / "nginx.conf"
    write_atomically(path, configuration(places, allotment).encode())
    with (where / "start.log").open("wb") as log:
        nginx = subprocess.Popen(
            ["nginx", "-c", str(path), "-p", str(where), "-e", str(where / "error.log")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    write_atomically(where / "started.pid", str(nginx.pid).encode())
    time.sleep(0.1)
    if nginx.poll() is not None:
        said = (where / "start.log").read_text(errors="replace")[-600:].strip()
        raise LocalCloudError(f"nginx in front of the object store did not start: {said}")


def configuration(places: Places, allotment: Allotment) -> str:
    store_port, store_tls_port = allotment.inner_s3_ports
    return CONFIGURATION.format(
        folder=folder(places),
        inner=allotment.inner_address,
        store_port=store_port,
        store_tls_port=store_tls_port,
        api_port=allotment.api_port,
        settings="|".join(SETTINGS),
        region=allotment.region,
        port=allotment.s3_port,
        tls_port=allotment.s3_tls_port,
        certificate=object_store_ca.certificate_file(places),
        key=object_store_ca.key_file(places),
        transport=TRANSPORT,
    )


def running_pid(places: Places) -> int | None:
    """Return the process ID of this cloud's nginx, or None if nginx is not running."""
    try:
        pid = int((folder(places) / "started.pid").read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(folder(places)) in arguments else None


def stop(places: Places) -> None:
    """Stop nginx and wait until it has ended. Kills nginx after 10 s."""
    pid = running_pid(places)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while running_pid(places) is not None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += 1e9
        time.sleep(0.02)
