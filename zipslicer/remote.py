"""Remote: a URL in, a ByteSource out: ranges of an object, merged, several at a time, each tried again when it fails.

Side door of source, imported when the first URL is opened. It speaks no protocol itself: obstore does for S3, Google
Cloud Storage and HTTP where it is installed, fsspec for these and for all else. Parsers and readers are those of files.

Two kinds of read come. What was announced (`ahead`) is exactly that: the ranges of tensors, fetched in parts of 8 MiB, up
to 16 at a time, some ahead of whoever reads them. All else is a parser's, which will soon ask for what follows: it comes
from blocks that are kept, the first two of which (the end of the file and its beginning) were fetched side by side.

With a folder as cache, what was announced is fetched in whole parts of a fixed grid, and each becomes a file there.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from .errors import ChangedError, UnsupportedError, ZipSlicerError
from .source import CLOSED_CHECKPOINT, HEAD_NBYTES, Closed, without_secrets

__all__ = ["RemoteFile"]

BLOCK = 512 << 10  # bytes of the end, of the beginning, and of what a parser asks for
KEPT = 16  # blocks
PART = 8 << 20  # bytes of one request, or an eighth more: the stores' own advice is 8 to 16 MB
REQUESTS = int(os.environ.get("ZIPSLICER_REQUESTS", "16"))  # at a time, of one open file
NEAR = 4096  # bytes between two ranges that are read along whatever they are, and
FARTHEST = 1 << 20  # bytes that are, where they are few beside what is wanted around them:
WASTE = 50  # of so many wanted bytes one
TRIES = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between them: doubled each time, and a random part of that
TIMEOUT = 60.0  # seconds for a request, of which there are TRIES

BY_OBSTORE = ("s3", "s3a", "gs", "http", "https")
# What fsspec's names of options are called by obstore; with others, fsspec is asked.
S3_OPTIONS = {
    "key": "access_key_id", "secret": "secret_access_key", "token": "session_token", "endpoint_url": "endpoint",
    "anon": "skip_signature", "region_name": "region",
}  # fmt: skip
PLAIN_URL = re.compile(r"https?://[\w.:\[\]-]+(/[\w.~-]+)+")  # nothing that one library may quote as another does not

Bytes = Any  # speaks the buffer protocol
Maker = Callable[[str, dict[str, Any]], "Store"]


class RefusedError(Exception):
    """What a store says of itself and trying again will not change: carries what is to be raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Facts(NamedTuple):
    """By which an object is known again: its size, and a mark that changes with its content, or ""."""

    size: int
    mark: str


class Store(Protocol):
    """One object. Its methods may be called by many threads at a time, and raise RefusedError, or whatever went wrong."""

    def begin(self) -> tuple[Facts, Bytes, Bytes]:
        """-> facts, and up to BLOCK bytes of the beginning and of the end."""
        ...

    def get(self, start: int, end: int, facts: Facts) -> Bytes:
        """Bytes, of the object that has these facts."""
        ...

    def check(self, facts: Facts) -> None:
        """After a read, where `get` could not tell. Raises: RefusedError."""
        ...


class RemoteFile:
    """An object behind a URL.

    Attributes:
        path: the URL without user, password and query, which may be secrets.
        origin: the URL itself.

    Raises:
        ImportError: neither obstore nor fsspec, or the package that fsspec needs, is installed.
        FileNotFoundError, PermissionError: as the store says; OSError where it does not answer, or not rightly.
        ChangedError: it was replaced meanwhile.
    """

    stamp = b""
    start = 0

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.origin: str | None = url
        self._url = url
        self.path: str | None = without_secrets(url)
        self._secrets = _secrets_of(url, storage_options or {})
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0
        self._lock = threading.Lock()
        self._again = threading.Lock()
        self._reading = threading.local()
        self._options = dict(storage_options or {})
        self._process = os.getpid()
        self._store, (self._facts, head, tail) = self._begin(_makers(url, self._options))
        self.size = self._facts.size
        self._cache = None if cache_dir is None else _Cache(cache_dir, self.path or url, self._facts)
        self.head = bytes(memoryview(head)[:HEAD_NBYTES])
        self._kept: OrderedDict[int, Bytes] = OrderedDict({self.size - len(tail): tail, 0: head})
        self.handle: Any = self

    def _begin(self, makers: Iterable[Maker]) -> tuple[Store, tuple[Facts, Bytes, Bytes]]:
        """The first store that opens it. What obstore cannot, for want of credentials that others find, fsspec may."""
        refused: Exception | None = None
        for make in makers:
            try:
                store: Store = self._insist(functools.partial(make, self._url, self._options))
                return store, self._insist(store.begin)
            except (FileNotFoundError, IsADirectoryError):  # noqa: PERF203 - of two stores at most, which are to be tried
                raise
            except (OSError, ValueError, UnsupportedError) as error:
                refused = refused or error
            except ImportError as error:
                lacking = error
        if refused is not None:
            raise refused
        raise ImportError(
            f"a URL is opened by fsspec or obstore ({lacking}): pip install 'zipslicer[remote]'"
        ) from None

    # ---------------------------------------------------------------- reading

    def preadv(self, buffers: Sequence[Any], offset: int, /) -> int:
        """Fill buffers from an offset on; -> how many bytes there were."""
        done = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while len(view):
                place = offset + done
                if place >= self.size:
                    return done
                text, at = self._bytes_at(place, len(view))
                got = min(len(view), len(text) - at)
                view[:got] = memoryview(text)[at : at + got]
                view = view[got:]
                done += got
        return done

    def _bytes_at(self, offset: int, nbytes: int) -> tuple[Bytes, int]:
        """Some bytes, and where in them those of an offset begin."""
        found = self._kept_at(offset)
        plan: _Plan | None = getattr(self._reading, "plan", None)
        if found is None and plan is not None:
            found = plan.at(offset)
        if found is not None:
            return found
        if nbytes > PART:
            with self.ahead([(offset, nbytes)]):
                return self._bytes_at(offset, PART)
        text = self._fetch(offset, min(self.size, offset + max(nbytes, BLOCK)))
        self._check()
        if len(text) <= BLOCK:
            with self._lock:
                self._kept[offset] = text
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return text, 0

    def _kept_at(self, offset: int) -> tuple[Bytes, int] | None:
        with self._lock:
            for start, text in self._kept.items():
                if start <= offset < start + len(text):
                    self._kept.move_to_end(start)
                    return text, offset - start
        return None

    def _trimmed(self, offset: int, end: int) -> tuple[int, int]:
        """(offset, nbytes) of what is not at hand from the first byte on."""
        while offset < end and (found := self._kept_at(offset)) is not None:
            offset += len(found[0]) - found[1]
        return offset, max(0, end - offset)

    @property
    def keeps(self) -> bool:
        return self._cache is not None

    @contextlib.contextmanager
    def ahead(self, extents: Iterable[tuple[int, int]]) -> Iterator[None]:
        """(offset, nbytes) of all that this thread will read within: fetched in file order, a few parts ahead."""
        away = [self._trimmed(offset, offset + nbytes) for offset, nbytes in extents]
        before = getattr(self._reading, "plan", None)
        parts = _parts(away, self.size) if self._cache is None else _grid(away, self.size)
        plan = self._reading.plan = _Plan(parts, self._submit, self._fetch)
        try:
            yield
            if plan.taken:
                self._check()
        finally:
            self._reading.plan = before
            plan.drop()

    def _submit(self, start: int, end: int) -> Future[Bytes]:
        with self._lock:
            if self._pool is None or self._pool_process != os.getpid():  # a forked child has none of its threads
                self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="zipslicer-remote")
                self._pool_process = os.getpid()
            return self._pool.submit(self._fetch, start, end)

    def _fetch(self, start: int, end: int) -> Bytes:
        if self.handle is not self:
            raise ValueError(CLOSED_CHECKPOINT)
        if self._process != os.getpid():
            self._begin_again()
        is_part = not start % PART and end == min(start + PART, self.size)
        cache = self._cache if is_part else None
        text = None if cache is None else cache.get(start, end - start)
        if text is None:
            text = self._insist(lambda: _whole(self._store.get(start, end, self._facts), end - start))
            if cache is not None:
                cache.put(start, text)
        return text

    def _begin_again(self) -> None:
        """In a forked child, which has no loop, no runtime and no connection of its parent's. Fsspec can be begun anew."""
        with self._again:
            if self._process != os.getpid():
                self._store, (facts, _, _) = self._begin(_makers(self._url, self._options)[-1:])
                if facts.size != self.size:
                    raise ChangedError("the object was changed after it was opened", path=self.path)
                self._facts, self._process = facts, os.getpid()

    def _check(self) -> None:
        self._insist(lambda: self._store.check(self._facts))

    def _insist(self, work: Callable[[], Any]) -> Any:
        """Try until it works. Raises: OSError, ChangedError and so on; none of them shows a secret."""
        for attempt in range(TRIES):
            try:
                return work()
            except RefusedError as refused:
                error = refused.error
                break
            except (ImportError, MemoryError):
                raise
            except Exception as failed:
                error = _final(failed, self.path)
                if isinstance(failed, (TypeError, ValueError)) and not hasattr(self, "size"):  # it never worked yet
                    error = ValueError(f"the URL or its storage_options are not right: {self._cleaned(failed)}")
                if not isinstance(error, _AgainError):
                    break
                error = OSError(5, f"the store does not answer rightly: {self._cleaned(failed)}", self.path)
            if attempt + 1 < TRIES:
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.random())  # noqa: S311 - no secret
        if isinstance(error, ZipSlicerError):
            error = error.located(path=self.path)
        raise error from None  # whose text may have a signed URL in it

    def _cleaned(self, error: Exception) -> str:
        """What an error of a library says, in a line, without secrets."""
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = re.sub(r"(\w+://)[^/\s@]*@", r"\1", text)
        text = re.sub(r"\?[^\s'\")]*=[^\s'\")]*", "", text)
        return " ".join(text.split())[:300]

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        self.handle = Closed()
        with self._lock:
            self._kept.clear()
            pool, self._pool = self._pool, None
        if pool is not None and self._pool_process == os.getpid():
            pool.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        if getattr(self, "handle", None) is self:
            self.close()


# ---------------------------------------------------------------- ranges


def _parts(extents: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Extents -> (start, end) of the requests for them: in file order, near ones together, large ones cut."""
    merged: list[list[int]] = []  # start, end, wanted bytes
    for start, nbytes in sorted(extents):
        end = min(start + nbytes, size)
        if end <= start:
            continue
        last = merged[-1] if merged else None
        if last is not None and start - last[1] <= max(NEAR, min(FARTHEST, last[2] // WASTE)):
            last[2] += max(0, end - max(start, last[1]))
            last[1] = max(last[1], end)
        else:
            merged.append([start, end, end - start])
    parts = []
    for start, end, _ in merged:
        # Not three for two parts and a local header, nor a small one at the end.
        count = max(1, -(-(end - start - PART // 8) // PART))
        step = -(-(end - start) // count)
        parts += [(at, min(at + step, end)) for at in range(start, end, step)]
    return parts


def _grid(extents: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The same on a grid, so that whoever wants some of a part later has asked for the same part."""
    numbers: set[int] = set()
    for start, nbytes in extents:
        if nbytes:
            numbers.update(range(start // PART, -(-(start + nbytes) // PART)))
    return [(number * PART, min((number + 1) * PART, size)) for number in sorted(numbers)]


class _Cache:
    """Parts of one object as files in a folder of its own, which is that of its URL, size and mark.

    Nothing is ever deleted: a folder that is too large may be, at any time.
    """

    def __init__(self, folder: str | os.PathLike[str], url: str, facts: Facts) -> None:
        if not facts.mark:
            raise UnsupportedError(
                "the store gives no mark of the object's content, by which a cache would know it again"
            )
        name = hashlib.sha256(f"{url}\n{facts.size}\n{facts.mark}".encode("utf-8", "surrogatepass")).hexdigest()
        self._folder = os.path.join(folder, name[:40])
        os.makedirs(self._folder, mode=0o700, exist_ok=True)

    def get(self, start: int, nbytes: int) -> Bytes | None:
        try:
            with open(self._path(start), "rb") as file:
                text = file.read()
        except FileNotFoundError:
            return None
        return text if len(text) == nbytes else None

    def put(self, start: int, text: Bytes) -> None:
        """A disk that is full, or a folder that was deleted, costs nothing but the cache."""
        path = self._path(start)
        temporary = f"{path}.{os.urandom(4).hex()}.tmp"
        with contextlib.suppress(OSError):
            try:
                with open(temporary, "xb") as file:
                    file.write(text)
                os.replace(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise

    def _path(self, start: int) -> str:
        return os.path.join(self._folder, f"{start // PART}")


class _Plan:
    """Parts in file order, some of which are on their way. Belongs to one thread."""

    def __init__(
        self,
        parts: list[tuple[int, int]],
        submit: Callable[[int, int], Future[Bytes]],
        fetch: Callable[[int, int], Bytes],
    ) -> None:
        self._parts = parts
        self._starts = [start for start, _ in parts]
        self._submit = submit
        self._fetch = fetch
        self._coming: dict[int, Future[Bytes]] = {}
        self._here: tuple[int, Bytes] = (-1, b"")
        self.taken = False

    def at(self, offset: int) -> tuple[Bytes, int] | None:
        """The part that an offset lies in, and where; None if it lies in none."""
        number = bisect.bisect_right(self._starts, offset) - 1
        if number < 0 or offset >= self._parts[number][1]:
            return None
        if self._here[0] != number:
            self._here = (-1, b"")  # gone before the next one comes
            self._here = number, self._take(number)
        return self._here[1], offset - self._starts[number]

    def _take(self, number: int) -> Bytes:
        self.taken = True
        if len(self._parts) == 1:
            return self._fetch(*self._parts[0])
        for passed in [each for each in self._coming if each < number]:
            self._coming.pop(passed).cancel()
        for each in range(number, min(number + REQUESTS, len(self._parts))):
            if each not in self._coming:
                self._coming[each] = self._submit(*self._parts[each])
        return self._coming.pop(number).result()

    def drop(self) -> None:
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()


def _whole(text: Bytes, nbytes: int) -> Bytes:
    if len(text) != nbytes:
        raise _AgainError(f"{len(text)} bytes came of {nbytes}")
    return text


# ---------------------------------------------------------------- errors


class _AgainError(Exception):
    """Worth another try."""


def _final(error: Exception, path: str | None) -> Exception:
    """What an error of a library is to those who read: an _AgainError, if it may be different the next time."""
    if isinstance(error, _AgainError):
        return error
    name, status = type(error).__name__, getattr(error, "status", None)
    text = str(error)
    if isinstance(error, FileNotFoundError) or name == "NotFoundError" or status == 404:
        return FileNotFoundError(2, "there is no such object", path)
    if (
        name in ("PermissionDeniedError", "UnauthenticatedError")
        or isinstance(error, PermissionError)
        or status in (401, 403)
    ):
        return PermissionError(13, "the store refuses access: check credentials, or storage_options", path)
    if name in ("PreconditionError", "FileExpired") or status in (412, 416) or "416 Range Not Satisfiable" in text:
        return ChangedError("the object was changed after it was opened", path=path)
    if name in ("NotSupportedError", "NotImplementedError", "InvalidPathError", "UnknownConfigurationKeyError"):
        return UnsupportedError(f"the store cannot read ranges of it ({name})", path=path)
    return _AgainError()


def _secrets_of(url: str, options: Mapping[str, Any]) -> list[str]:
    """Texts that no message may have in it."""
    found = [url] if url != without_secrets(url) else []
    todo: list[Any] = [options]
    while todo:
        each = todo.pop()
        if isinstance(each, Mapping):
            todo += each.values()
        elif isinstance(each, (list, tuple)):
            todo += each
        elif isinstance(each, str) and len(each) > 3 and "://" not in each:
            found.append(each)
    return sorted(found, key=len, reverse=True)


# ---------------------------------------------------------------- stores


def _makers(url: str, options: dict[str, Any]) -> list[Maker]:
    """The stores that may open a URL, the best first."""
    scheme = url.partition("://")[0].lower()
    is_http = scheme in ("http", "https")
    second: Maker = Http if is_http else Fsspec
    if (
        scheme not in BY_OBSTORE
        or _obstore_options(scheme, options) is None
        or (is_http and not PLAIN_URL.fullmatch(url))
    ):
        return [second]
    return [Obstore, second]


def _obstore_options(scheme: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The options of fsspec in obstore's names; None where there is one that it may not know."""
    flat = {**options, **options.get("client_kwargs", {})}
    flat.pop("client_kwargs", None)
    if flat and scheme not in ("s3", "s3a"):
        return None
    if not set(flat) <= set(S3_OPTIONS):
        return None
    return {S3_OPTIONS[name]: value for name, value in flat.items() if value is not None}


class Obstore:
    """By obstore: If-Match with each range, and what comes back is compared, too."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        import obstore.store

        self._obstore: Any = obstore
        scheme, _, rest = url.partition("://")
        host, _, self._key = rest.partition("/")
        given = _obstore_options(scheme.lower(), options) or {}
        plain = scheme.lower() == "http" or str(given.get("endpoint", "")).startswith("http://")
        client = {"timeout": f"{TIMEOUT:.0f}s", "allow_http": plain}
        self._store = self._obstore.store.from_url(
            f"{scheme.lower()}://{host}", client_options=client, retry_config={"max_retries": 0}, **given
        )

    def _get(self, where: Any, facts: Facts | None = None) -> tuple[Facts, Bytes]:
        wanted: dict[str, Any] = {"range": where}
        if facts is not None and facts.mark.startswith('"'):  # a weak one matches nothing (RFC 9110, 13.1.1)
            wanted["if_match"] = facts.mark
        found = self._obstore.get(self._store, self._key, options=wanted)
        meta = found.meta
        now = Facts(meta["size"], meta.get("e_tag") or str(meta.get("last_modified") or ""))
        if facts is not None and now != facts:
            raise RefusedError(ChangedError("the object was changed after it was opened"))
        return now, found.bytes()

    def begin(self) -> tuple[Facts, Bytes, Bytes]:
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(self._get, {"suffix": BLOCK})
            facts, head = self._get((0, BLOCK))
            try:
                tail_facts, tail = end.result()
            except Exception as error:  # Azure has no such range, nor has a server that is no more than it must be
                if type(error).__name__ not in ("NotSupportedError", "GenericError"):
                    raise
                tail_facts, tail = self._get((max(0, facts.size - BLOCK), facts.size), facts)
        if tail_facts != facts:
            raise RefusedError(ChangedError("the object was changed while it was opened"))
        return facts, head, tail

    def get(self, start: int, end: int, facts: Facts) -> Bytes:
        return self._get((start, end), facts)[1]

    def check(self, facts: Facts) -> None:
        """Each range was."""


class Http:
    """By the session of fsspec's HTTP file system: any URL, with a query or not."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        import fsspec.asyn

        self._asyn = fsspec.asyn
        self._fs, _ = fsspec.core.url_to_fs(url, **options)
        self._url = url

    def _get(self, where: str, facts: Facts | None = None) -> tuple[Facts, Bytes]:
        found: tuple[Facts, Bytes] = self._asyn.sync(self._fs.loop, self._ask, where, facts)
        return found

    async def _ask(self, where: str, facts: Facts | None) -> tuple[Facts, Bytes]:
        import aiohttp

        asked = dict(self._fs.kwargs)
        asked["headers"] = {**asked.get("headers", {}), "Range": f"bytes={where}", "Accept-Encoding": "identity"}
        if facts is not None and facts.mark.startswith('"'):
            asked["headers"]["If-Match"] = facts.mark
        asked.setdefault("timeout", aiohttp.ClientTimeout(total=TIMEOUT))
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(self._url), **asked) as answer:
            answer.raise_for_status()
            if answer.status != 206:
                raise RefusedError(UnsupportedError("the server sends whole files only, no ranges: download it"))
            text = await answer.read()
            headers = answer.headers
            size = headers["Content-Range"].rpartition("/")[2]
            if not size.isdecimal():
                raise RefusedError(UnsupportedError("the server does not say how large the object is"))
            now = Facts(int(size), headers.get("ETag") or headers.get("Last-Modified", ""))
        if facts is not None and now != facts:
            raise RefusedError(ChangedError("the object was changed after it was opened"))
        return now, text

    def begin(self) -> tuple[Facts, Bytes, Bytes]:
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(self._get, f"-{BLOCK}")
            facts, head = self._get(f"0-{BLOCK - 1}")
            tail_facts, tail = end.result()
        if tail_facts != facts:
            raise RefusedError(ChangedError("the object was changed while it was opened"))
        return facts, head, tail

    def get(self, start: int, end: int, facts: Facts) -> Bytes:
        return self._get(f"{start}-{end - 1}", facts)[1]

    def check(self, facts: Facts) -> None:
        """Each range was."""


class Fsspec:
    """By fsspec, which has no conditions on reads: the object's facts are asked for once more after them."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        import fsspec

        self._fs, self._key = fsspec.core.url_to_fs(url, **options)

    def _facts(self) -> Facts:
        info = self._fs.info(self._key)
        if info.get("type") == "directory":
            raise RefusedError(IsADirectoryError(21, "is a folder; open a file in it", without_secrets(self._key)))
        if info.get("size") is None:
            raise RefusedError(UnsupportedError("the store does not know the size of the object"))
        marks = (
            info.get(name) for name in ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "updated")
        )
        return Facts(int(info["size"]), str(next((mark for mark in marks if mark), "")))

    def begin(self) -> tuple[Facts, Bytes, Bytes]:
        facts = self._facts()
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(self.get, max(0, facts.size - BLOCK), facts.size, facts)
            head = self.get(0, min(BLOCK, facts.size), facts)
            return facts, head, end.result()

    def get(self, start: int, end: int, facts: Facts) -> Bytes:
        del facts
        return self._fs.cat_file(self._key, start=start, end=end) if end > start else b""

    def check(self, facts: Facts) -> None:
        with contextlib.suppress(AttributeError):
            self._fs.invalidate_cache(self._key)
        if self._facts() != facts:
            raise RefusedError(ChangedError("the object was changed after it was opened"))
