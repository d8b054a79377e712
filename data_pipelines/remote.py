"""Objects of an S3 store: ranged reads that go on where they broke off, retried with jitter, each with its own deadline.

s3fs finds credentials and endpoint (AWS_PROFILE, AWS_ENDPOINT_URL, ...) and runs the event loop. The retries of botocore and s3fs are
off: they begin a broken read anew, and wait for minutes on a server that accepts connections and says nothing.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, BinaryIO

from data_pipelines.errors import AccessDenied, StorageUnavailable, UserError

PATIENCE_SECONDS = 120.0
"""How long a read may go without a byte, over all its attempts, before the run stops, unless DIT_S3_PATIENCE says otherwise."""
STALL_SECONDS = 10.0
"""How long one attempt may go without a byte."""

_CHUNK = 1 << 20
_PART, _MOST_PARTS, _SENDERS = 8 << 20, 10_000, 4  # 10,000 parts is what S3 takes; memory of an upload is four parts
_SLOWEST = 1 << 18  # bytes a second that an upload may take before its attempt counts as stalled
_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds; the pause is drawn from [0, min(longest, 0.1 * 2^attempt)], so ranks do not come back at once
_DRAW = random.SystemRandom()  # no draw of a run comes from a process-wide generator, nor may this one disturb it
_MISSING = ("NoSuchKey", "NoSuchBucket", "404")
_TEMPORARY = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "InternalError", "ServiceUnavailable")

Attempt = Callable[[Any, asyncio.Timeout], Awaitable[None]]


def read_object(address: str, start: int = 0, end: int | None = None) -> bytes:
    """Bytes [start, end) of an object, fewer if it ends before. Raises FileNotFoundError, AccessDenied, StorageUnavailable."""
    bucket, key = _split(address)
    chunks: list[bytes] = []

    async def attempt(client: Any, deadline: asyncio.Timeout) -> None:
        at = start + sum(map(len, chunks))
        wanted = f"bytes={at}-{'' if end is None else end - 1}"
        reply = await client.get_object(Bucket=bucket, Key=key, Range=wanted)
        if "ContentRange" not in reply and at:
            raise UserError(f"{address}: the server ignores ranges, which reading of shards needs")
        async with reply["Body"] as body:
            while chunk := await body.read(_CHUNK):
                chunks.append(chunk)
                _extend(deadline)
        total = int(reply["ContentRange"].rpartition("/")[2]) if "ContentRange" in reply else reply["ContentLength"]
        if start + sum(map(len, chunks)) < min(total, total if end is None else end):
            raise ConnectionResetError("the reply was cut short")

    if end is not None and end <= start:
        return b""
    with suppress(_OutOfRange):  # nothing there, or nothing more
        _persist(address, attempt, lambda: len(chunks))
    return b"".join(chunks)


def list_objects(address: str) -> dict[str, int]:
    """Address and length of every object directly below the folder `address`. Raises FileNotFoundError if there is none."""
    if not (found := list_tree(address, Delimiter="/")):
        raise FileNotFoundError(address)
    return found


def list_tree(address: str, **options: str) -> dict[str, int]:
    """Address and length of every object below the folder `address`. Raises FileNotFoundError if there is no such bucket."""
    bucket, key = _split(address)
    prefix = key.rstrip("/") + "/" if key else ""
    found: dict[str, int] = {}

    async def attempt(client: Any, deadline: asyncio.Timeout) -> None:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **options)
        async for page in pages:
            found.update({f"s3://{bucket}/{item['Key']}": int(item["Size"]) for item in page.get("Contents", [])})
            _extend(deadline)

    _persist(address, attempt, lambda: len(found))
    return found


def write_object(address: str, data: bytes) -> None:
    """Write a whole object. Raises AccessDenied, StorageUnavailable."""
    bucket, key = _split(address)

    async def attempt(client: Any, deadline: asyncio.Timeout) -> None:
        _extend(deadline, len(data))
        await client.put_object(Bucket=bucket, Key=key, Body=data)

    _persist(address, attempt, lambda: 0)


def delete_object(address: str) -> None:
    """Delete an object; it need not be there. Raises AccessDenied, StorageUnavailable."""
    bucket, key = _split(address)

    async def attempt(client: Any, deadline: asyncio.Timeout) -> None:
        await client.delete_object(Bucket=bucket, Key=key)

    with suppress(FileNotFoundError):
        _persist(address, attempt, lambda: 0)


def upload_object(address: str, file: BinaryIO) -> None:
    """Write the content of `file` as one object: parts of 8 MiB, four at a time, each tried again by itself; the object appears whole.

    Raises AccessDenied, StorageUnavailable, OSError; the store is then told to forget the parts.
    """
    size = os.fstat(file.fileno()).st_size
    part = max(_PART, -(-size // _MOST_PARTS))
    if size <= part:
        write_object(address, os.pread(file.fileno(), size, 0))
        return
    bucket, key = _split(address)
    place = {"Bucket": bucket, "Key": key}
    tags: dict[int, str] = {}

    async def begin(client: Any, deadline: asyncio.Timeout) -> None:
        place["UploadId"] = (await client.create_multipart_upload(**place))["UploadId"]

    async def complete(client: Any, deadline: asyncio.Timeout) -> None:
        parts = [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
        _extend(deadline, size)  # some stores put the object together only now
        await client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts})

    async def abort(client: Any, deadline: asyncio.Timeout) -> None:
        await client.abort_multipart_upload(**place)

    def send(number: int) -> None:
        data = os.pread(file.fileno(), part, (number - 1) * part)

        async def attempt(client: Any, deadline: asyncio.Timeout) -> None:
            _extend(deadline, len(data))
            tags[number] = (await client.upload_part(**place, PartNumber=number, Body=data))["ETag"]

        _persist(address, attempt, lambda: 0)

    _persist(address, begin, lambda: 0)
    senders = ThreadPoolExecutor(_SENDERS)
    try:
        list(senders.map(send, range(1, -(-size // part) + 1)))
        with suppress(FileNotFoundError):  # it was completed, and only the answer was lost
            _persist(address, complete, lambda: 0)
    except Exception:
        senders.shutdown(cancel_futures=True)
        with suppress(Exception):  # a store that is away cannot be told; a lifecycle rule of the bucket clears such parts
            from fsspec.asyn import sync

            sync(_filesystem(os.getpid()).loop, _once, abort)
        raise
    finally:
        senders.shutdown()


def _split(address: str) -> tuple[str, str]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return bucket, key


@cache
def _filesystem(process: int) -> Any:
    """One session a process: threads share it, a fork makes its own."""
    import s3fs

    checks = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    config = {**checks, "retries": {"total_max_attempts": 1}, "connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
    return s3fs.S3FileSystem(config_kwargs=config, skip_instance_cache=True)


def _extend(deadline: asyncio.Timeout, size: int = 0) -> None:
    """Allow as long again, and the time that `size` bytes take on a slow line."""
    deadline.reschedule(asyncio.get_running_loop().time() + STALL_SECONDS + size / _SLOWEST)


async def _once(attempt: Attempt) -> None:
    client = await _filesystem(os.getpid()).set_session()  # made once, and not by the server that the deadline is for
    async with asyncio.timeout(STALL_SECONDS) as deadline:
        await attempt(client, deadline)


def _patience() -> float:
    """Seconds to wait for a byte. Raises UserError if DIT_S3_PATIENCE is no number of seconds."""
    given = os.environ.get("DIT_S3_PATIENCE", str(PATIENCE_SECONDS))
    with suppress(ValueError):
        if (seconds := float(given)) >= 0:
            return seconds
    raise UserError(f"DIT_S3_PATIENCE = {given!r}: expected seconds to wait for a store, such as 120; change this environment variable")


def _persist(address: str, attempt: Attempt, progress: Callable[[], int]) -> None:
    """Await `attempt` until it succeeds; patience and pauses begin anew with every byte that arrives."""
    from fsspec.asyn import sync

    patience, fs = _patience(), _filesystem(os.getpid())
    tries, since, before = 0, time.monotonic(), 0
    while True:
        try:
            return sync(fs.loop, _once, attempt)  # type: ignore[no-any-return]
        except Exception as error:
            reason = _reason_to_retry(error, address)
        if progress() > before:
            tries, since, before = 0, time.monotonic(), progress()
        tries += 1
        pause = _DRAW.uniform(0, min(_LONGEST_PAUSE, _PAUSE * 2**tries))
        if (waited := time.monotonic() - since) + pause > patience:
            raise StorageUnavailable(
                f"{address}: no answer in {waited:.0f} s and {tries} attempts, the last: {reason}. The run stops, since its samples are "
                "there and only the server is not; start the same command when it is back (DIT_S3_PATIENCE: seconds to wait)"
            )
        time.sleep(pause)


class _OutOfRange(Exception):
    """The range begins at or after the end of the object."""


def _reason_to_retry(error: Exception, address: str) -> str:
    """What went wrong, if another attempt may mend it; raises what it is otherwise."""
    import aiohttp
    from botocore import exceptions

    who = _credentials()
    refused = f"s3://{_split(address)[0]}: access denied for {who}"
    mend = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to credentials that may (and AWS_ENDPOINT_URL to their server)"
    if isinstance(error, exceptions.ClientError):
        code, status = str(error.response["Error"].get("Code")), error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 404 or code in _MISSING:
            raise FileNotFoundError(address) from error
        if status == 416:
            raise _OutOfRange from error
        if status >= 500 or status in (408, 429) or code in _TEMPORARY:
            return f"{status} {code}"
        raise AccessDenied(f"{refused} ({status} {code}); {mend}") from error
    missing = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError)
    if isinstance(error, (*missing, exceptions.ProfileNotFound, exceptions.TokenRetrievalError, exceptions.UnauthorizedSSOTokenError)):
        raise AccessDenied(f"{refused} ({type(error).__name__}); {mend}") from error
    if isinstance(error, exceptions.ParamValidationError | exceptions.InvalidRegionError):
        raise UserError(f"address {address!r}: {error}") from error
    if isinstance(error, exceptions.BotoCoreError | aiohttp.ClientError | OSError | TimeoutError):
        return f"{type(error).__name__}: {str(error) or f'no byte in {STALL_SECONDS:g} s'}"
    raise error


def _credentials() -> str:
    """Who asks, as far as it may be shown."""
    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    key = os.environ.get("AWS_ACCESS_KEY_ID", "")
    return " and ".join([f"profile {profile or 'default'!r}"] * (bool(profile) or not key) + [f"key id {key[:4]}..."] * bool(key))
