"""A Google Cloud Storage server on this machine that can simulate failures.

The server is `gcp-storage-emulator`, with three additions: several requests at a time, the header `x-goog-generation`
and the precondition `ifGenerationMatch`, which TensorStore needs.
"""

import functools
import http.server
import re
import threading
import time
import urllib.parse
from collections.abc import Callable

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

OBJECT = re.compile(r'.*/b/([^/]+)/o/([^/?]+)')
Fault = Callable[['Handler'], bool]


class Handler(emulator.RequestHandler):
    """Answers one request, unless `Bucket.fault` has answered it and returned True."""

    def __init__(self, bucket: 'Bucket', *arguments: object):
        self._bucket, self._generation = bucket, '0'
        super().__init__(bucket.storage, *arguments)

    def answer(self, method: str) -> None:
        self._bucket.requests += 1
        if self._bucket.fault and self._bucket.fault(self):
            return
        with self._bucket.lock:
            found = OBJECT.match(self.path)
            self._generation = self._find(*map(urllib.parse.unquote, found.groups())) if found else '0'
            query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
            if method == 'POST' and 'ifGenerationMatch' in query and 'name' in query:
                bucket = re.match(r'.*/b/([^/]+)/o', self.path)[1]
                if self._find(bucket, query['name'][0]) != query['ifGenerationMatch'][0]:
                    self.fail(412)
                    return
            emulator.Router(self).handle(method)

    def _find(self, bucket: str, name: str) -> str:
        try:
            return self.storage.get_file_obj(bucket, name)['generation']
        except NotFound:
            return '0'

    def fail(self, status: int) -> None:
        """Answers with an error status, after the body of the request was read."""
        emulator._read_raw_data(self)
        self.send_response(status)
        self.send_header('Content-Length', '0')
        self.end_headers()

    def end_headers(self) -> None:
        if self.command == 'GET' and self._generation != '0':
            self.send_header('x-goog-generation', self._generation)
        super().end_headers()

    do_GET = functools.partialmethod(answer, 'GET')  # noqa: N815
    do_POST = functools.partialmethod(answer, 'POST')  # noqa: N815
    do_PUT = functools.partialmethod(answer, 'PUT')  # noqa: N815
    do_PATCH = functools.partialmethod(answer, 'PATCH')  # noqa: N815
    do_DELETE = functools.partialmethod(answer, 'DELETE')  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Bucket:
    """The running server with one bucket, `bucket`. Use as a context manager.

    Attributes:
        fault: a function that is called with each request before it is answered, or None.
        requests: number of requests so far.
        environment: the variables with which gcsfs, google-cloud-storage and TensorStore find the server.
    """

    def __init__(self):
        self.storage, self.lock = Storage(use_memory_fs=True), threading.Lock()
        self.fault: Fault | None = None
        self.requests = 0
        buckets.create_bucket('bucket', self.storage)
        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, self))
        url = f'http://127.0.0.1:{self._server.server_address[1]}'
        self.environment = {
            'STORAGE_EMULATOR_HOST': url,  # gcsfs and google-cloud-storage
            'TENSORSTORE_GCS_HTTP_URL': url,
            'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',  # TensorStore
            'GOOGLE_CLOUD_PROJECT': 'test',
            'NO_GCE_CHECK': 'true',  # google-auth otherwise looks for a metadata server
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # asks for the type of the bucket, which needs a login
        }

    def __enter__(self) -> 'Bucket':
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def names(self) -> list[str]:
        """The names of all objects."""
        with self.lock:
            return list(self.storage.objects.get('bucket', {}))

    def read(self, name: str) -> bytes:
        """The content of an object."""
        return self.storage.get_file('bucket', name)


def every(count: int, fault: Callable[[Handler], bool]) -> Fault:
    """Applies a fault to every `count`-th request."""
    number = 0

    def apply(handler: Handler) -> bool:
        nonlocal number
        number += 1
        return number % count == 0 and fault(handler)

    return apply


def unavailable(handler: Handler) -> bool:
    """Answers with status 503."""
    handler.fail(503)
    return True


def slow(_handler: Handler) -> bool:
    """Waits for a second before the answer."""
    time.sleep(1)
    return False


def broken(handler: Handler) -> bool:
    """Closes the connection without an answer."""
    emulator._read_raw_data(handler)
    handler.connection.close()
    handler.wfile = handler.rfile  # http.server flushes it
    return True


def forbidden(handler: Handler) -> bool:
    """Answers with status 403 to everything that changes the bucket."""
    if handler.command == 'GET':
        return False
    handler.fail(403)
    return True
