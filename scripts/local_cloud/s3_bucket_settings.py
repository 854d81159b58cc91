"""Bucket settings that SeaweedFS lacks or implements differently from AWS.

nginx (store_front.py) sends requests about these settings to this module. This module first sends each request to
SeaweedFS, which verifies the signature, the role's policies and the bucket's policy. If SeaweedFS refuses the request,
the refusal is returned. If SeaweedFS accepts the request, moto handles most settings. A bucket's record in moto is
created with AWS's defaults at the first use, and deleted with the bucket. The sources are "Amazon S3 API Reference" and
"Amazon S3 User Guide".

CreateBucket, "Default encryption FAQ": a new bucket is encrypted with AES256. SeaweedFS does not encrypt by default.
GetBucketEncryption: every bucket has an encryption configuration. DeleteBucketEncryption restores AES256.
GetPublicAccessBlock, "Blocking public access": all four settings of a new bucket are on. SeaweedFS returns 501.
GetBucketOwnershipControls, "Controlling ownership of objects": the response is BucketOwnerEnforced for a new bucket,
  and an error after DeleteBucketOwnershipControls. SeaweedFS always returns BucketOwnerEnforced.
GetBucketLocation returns the region. SeaweedFS returns an empty text, which clients read as us-east-1.
GetBucketAccelerateConfiguration returns an empty setting if the bucket never had one. SeaweedFS returns Suspended.
GetBucketAcl returns the owner's canonical user ID. SeaweedFS returns the name of the identity from its configuration.
PutBucketAcl with BucketOwnerEnforced returns AccessControlListNotSupported. SeaweedFS and moto accept PutBucketAcl.
GetBucketRequestPayment returns NoSuchBucket for a missing bucket. SeaweedFS returns BucketOwner.
DeleteBucketPolicy returns 204 if the bucket has no policy. SeaweedFS returns 404.
DeleteBucket returns BucketNotEmpty if the bucket has a version or a delete marker. SeaweedFS deletes all of them.
"""

from __future__ import annotations

import http.client
import io
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import ClientError
from moto.s3.models import PublicAccessBlock, s3_backends

from scripts.local_cloud import store_front
from scripts.local_cloud.layout import ACCOUNT, Allotment
from scripts.local_cloud.permissions import Denial, Request

SECONDS = 60
MARK = "HTTP_" + store_front.TRANSPORT.upper().replace("-", "_")
REFUSED = (400, 401, 403, 503)
OWNER_ENFORCED = "BucketOwnerEnforced"
ABSENT_ENCRYPTION = b"ServerSideEncryptionConfigurationNotFoundError"
XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
DEFAULT_ENCRYPTION = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]}
ENCRYPTION_DOCUMENT = (
    XML + '<ServerSideEncryptionConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Rule>'
    "<ApplyServerSideEncryptionByDefault><SSEAlgorithm>AES256</SSEAlgorithm></ApplyServerSideEncryptionByDefault>"
    "<BucketKeyEnabled>false</BucketKeyEnabled></Rule></ServerSideEncryptionConfiguration>"
)
OWN_HEADERS = ("connection", "transfer-encoding", "content-length", "date", "server", "keep-alive")

UNVERIFIED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
UNVERIFIED.check_hostname, UNVERIFIED.verify_mode = False, ssl.CERT_NONE
"""TLS settings that do not verify the certificate, only for SeaweedFS on this host's loopback address."""

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


@dataclass(frozen=True)
class StoreResponse:
    status: int
    headers: Mapping[str, str]
    body: bytes = b""


class BucketSettings:
    """Handles the requests from store_front.py. This object owns SeaweedFS clients with the account's access key."""

    def __init__(
        self,
        allotment: Allotment,
        moto: Application,
        refusal: Callable[[Mapping[str, Any], Request], Denial | None],
        lock: threading.RLock,
        save: Callable[[], None],
    ) -> None:
        """`moto` handles a WSGI request. `refusal` returns the denial of a role's request, or None. Callers of `moto`
        and `refusal` must hold `lock`."""
        self.allotment, self.moto, self.refusal, self.lock, self.save = allotment, moto, refusal, lock, save
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # SeaweedFS is on this host's loopback
        connect: Any = boto3.client
        port, tls_port = allotment.inner_s3_ports
        self.store, self.plain_store = (
            connect(
                "s3",
                endpoint_url=f"{scheme}://{allotment.inner_address}:{number}",
                verify=False,
                region_name=allotment.region,
                aws_access_key_id=allotment.access_key,
                aws_secret_access_key=allotment.secret_key,
                config=Config(s3={"addressing_style": "path"}),
            )
            for scheme, number in (("https", tls_port), ("http", port))
        )

    def __call__(self, environ: dict[str, Any], body: bytes) -> StoreResponse:
        method, bucket = environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"]).strip("/")
        queried = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        setting = next((name for name in (*store_front.SETTINGS, "encryption", "policy") if name in queried), "")
        if method == "DELETE" and not setting and self._may_delete(environ, bucket) and self._holds_anything(bucket):
            return error(409, "BucketNotEmpty", "The bucket you tried to delete is not empty", bucket)
        answered = self._ask_store(environ, body)
        if answered.status in REFUSED:
            return answered
        if not setting:
            return self._made_or_deleted(method, bucket, environ, answered)
        if not self._exists(bucket):
            with self.lock:
                self._forget(bucket)
            return error(404, "NoSuchBucket", "The specified bucket does not exist", bucket)
        if setting == "encryption":
            return self._encryption(method, bucket, answered)
        if setting == "policy":
            return StoreResponse(204, {}) if answered.status == 404 else answered
        if setting == "requestPayment":
            return answered
        with self.lock:
            record = self._record(bucket)
            if method == "PUT" and setting == "acl" and record.ownership_rule == OWNER_ENFORCED:
                return error(400, "AccessControlListNotSupported", "The bucket does not allow ACLs", bucket)
            found = self._ask_moto(environ, body)
            if method != "GET":
                self.save()
        return found

    def _made_or_deleted(
        self, method: str, bucket: str, environ: Mapping[str, Any], answered: StoreResponse
    ) -> StoreResponse:
        if answered.status >= 300:
            return answered
        if method == "PUT":
            self.store.put_bucket_encryption(Bucket=bucket, ServerSideEncryptionConfiguration=DEFAULT_ENCRYPTION)
        with self.lock:
            self._forget(bucket)
            if method == "PUT":
                owner = environ.get("HTTP_X_AMZ_OBJECT_OWNERSHIP") or OWNER_ENFORCED
                self._record(bucket).ownership_rule = owner
            self.save()
        return answered

    def _encryption(self, method: str, bucket: str, answered: StoreResponse) -> StoreResponse:
        if method == "DELETE":
            self.store.put_bucket_encryption(Bucket=bucket, ServerSideEncryptionConfiguration=DEFAULT_ENCRYPTION)
            return StoreResponse(204, {})
        if answered.status == 404 and ABSENT_ENCRYPTION in answered.body:
            return StoreResponse(200, {"Content-Type": "application/xml"}, ENCRYPTION_DOCUMENT.encode())
        return answered

    def _exists(self, bucket: str) -> bool:
        return _status(self.store.head_bucket, Bucket=bucket) != 404

    def _may_delete(self, environ: Mapping[str, Any], bucket: str) -> bool:
        """Return whether the role's policies and the bucket's policy allow the request."""
        if environ[MARK] == "http" and _status(self.plain_store.head_bucket, Bucket=bucket) == 403:
            return False
        with self.lock:
            wanted = Request("s3", "s3:DeleteBucket", (f"arn:aws:s3:::{bucket}",), {"aws:SecureTransport": "true"})
            return self.refusal(environ, wanted) is None

    def _holds_anything(self, bucket: str) -> bool:
        if not self._exists(bucket):
            return False
        found = self.store.list_object_versions(Bucket=bucket, MaxKeys=1)
        return bool(found.get("Versions") or found.get("DeleteMarkers"))

    def _record(self, bucket: str) -> Any:
        """Return moto's record of a bucket. A missing record is created with AWS's settings for a new bucket."""
        backend: Any = s3_backends[ACCOUNT]["aws"]
        if bucket not in backend.buckets:
            record = backend.create_bucket(bucket, self.allotment.region)
            record.ownership_rule = OWNER_ENFORCED
            record.public_access_block = PublicAccessBlock("true", "true", "true", "true")
        return backend.buckets[bucket]

    def _forget(self, bucket: str) -> None:
        backend: Any = s3_backends[ACCOUNT]["aws"]
        backend.buckets.pop(bucket, None)
        s3_backends.bucket_accounts.pop(bucket, None)

    def _ask_store(self, environ: Mapping[str, Any], body: bytes) -> StoreResponse:
        """Send the unchanged request to SeaweedFS, with TLS if the client used TLS. Return SeaweedFS's response."""
        port, tls_port = self.allotment.inner_s3_ports
        connection: http.client.HTTPConnection
        if environ[MARK] == "https":
            address = self.allotment.inner_address
            connection = http.client.HTTPSConnection(address, tls_port, timeout=SECONDS, context=UNVERIFIED)
        else:
            connection = http.client.HTTPConnection(self.allotment.inner_address, port, timeout=SECONDS)
        try:
            connection.request(environ["REQUEST_METHOD"], environ["RAW_URI"], body or None, _headers(environ))
            got = connection.getresponse()
            headers = {name: value for name, value in got.getheaders() if name.lower() not in OWN_HEADERS}
            return StoreResponse(got.status, headers, got.read())
        except OSError as failed:
            return error(503, "ServiceUnavailable", f"The object store does not answer: {failed}", environ["PATH_INFO"])
        finally:
            connection.close()

    def _ask_moto(self, environ: dict[str, Any], body: bytes) -> StoreResponse:
        told: list[Any] = []
        text = b"".join(self.moto({**environ, "wsgi.input": io.BytesIO(body)}, lambda *given: told.extend(given)))
        headers = {name: value for name, value in told[1] if name.lower() not in OWN_HEADERS}
        return StoreResponse(int(told[0].split()[0]), headers, text)


def _status(call: Callable[..., Any], **arguments: Any) -> int:
    try:
        return int(call(**arguments)["ResponseMetadata"]["HTTPStatusCode"])
    except ClientError as refused:
        return int(refused.response["ResponseMetadata"]["HTTPStatusCode"])


def error(status: int, code: str, message: str, bucket: str) -> StoreResponse:
    """Return an error in the XML format of S3's REST errors."""
    text = f"{XML}<Error><Code>{code}</Code><Message>{message}</Message><BucketName>{bucket}</BucketName></Error>"
    return StoreResponse(status, {"Content-Type": "application/xml"}, text.encode())


def _headers(environ: Mapping[str, Any]) -> dict[str, str]:
    """Return the request's headers with unchanged values, because the client signed the values."""
    headers = {name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
    headers |= {"CONTENT-TYPE": environ["CONTENT_TYPE"]} if environ.get("CONTENT_TYPE") else {}
    return {name: value for name, value in headers.items() if name.lower() not in OWN_HEADERS}
