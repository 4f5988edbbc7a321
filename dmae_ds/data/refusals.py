"""Errors of remote storage that another try does not solve, in words: credentials, permissions, addresses."""

import re

PERMANENT_STATUS = (400, 401, 403, 404, 405, 410, 416)
# What a library raises before it asks a server, by the names of its classes: botocore's NoCredentialsError,
# ProfileNotFound, UnauthorizedSSOTokenError, NoRegionError; Google's DefaultCredentialsError.
_UNANSWERED = re.compile(r"Credential|Profile|SSOToken|NoRegion|Gated|Unauthorized")
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for MinIO, R2 and other services "
    "also AWS_ENDPOINT_URL; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`; for a public "
    "bucket set FSSPEC_GS_TOKEN=anon",
    "hf": "set HF_TOKEN, or run `hf auth login`",
}


def describe(error: BaseException) -> str:
    """The error's class and text in one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())}".strip()[:200]


def describe_refusal(error: BaseException, scheme: str) -> str | None:
    """What to do about an error that stays; None for one that may be over with the next try."""
    way_out = CREDENTIALS.get(scheme, "check the credentials in the URL")
    if any(_UNANSWERED.search(kind.__name__) for kind in type(error).__mro__):
        return f"no credentials for {scheme}:// were found ({describe(error)}); {way_out}"
    status = status_of(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"permission denied ({describe(error)}); check the credentials: {way_out}"
    if status in PERMANENT_STATUS:
        return f"the server refused the request ({describe(error)})"
    return None


def status_of(error: BaseException) -> int | None:
    """HTTP status of an error, where its library keeps it: aiohttp, gcsfs, requests or botocore."""
    answer = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "code"), (answer, "status_code")):
        value = getattr(holder, name, None)
        if str(value).isdecimal():
            return int(value)
    parsed = getattr(error.__cause__, "response", None)  # of botocore, which s3fs translates to an OSError
    metadata = parsed.get("ResponseMetadata", {}) if isinstance(parsed, dict) else {}
    value = metadata.get("HTTPStatusCode")
    return int(value) if str(value).isdecimal() else None
