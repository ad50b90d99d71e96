"""A stand-in for Cloud Storage: the part of its JSON API that gcsfs, TensorStore and Orbax use.

The clients are the real ones, pointed here by environment variables (`environment`). Objects are
kept in memory, one dictionary for all buckets: an object is replaced as a whole, nothing can be
appended to, and there are no directories, no renames and no locks.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c


class BucketServer(ThreadingHTTPServer):
    """Serves `objects`, {(bucket, name): (bytes, generation)}, on a free port of this machine."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = {}
        self.uploads = {}  # resumable uploads under way: id -> (bucket, name, bytearray)
        self.generation = 1
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def names(self, prefix=""):
        """Sorted 'bucket/name' of all objects."""
        found = (f"{bucket}/{name}" for bucket, name in list(self.objects))
        return sorted(name for name in found if name.startswith(prefix))

    def environment(self, cache):
        """What points a program's clients here; local copies are kept below `cache`."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCE_METADATA_ROOT": f"127.0.0.1:{self.server_port}",  # answers that it is none
            "GOOGLE_CLOUD_PROJECT": "nobody",
            "FSSPEC_GCS": '{"token": "anon"}',
            "FSSPEC_GS": '{"token": "anon"}',
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask over gRPC
            "GPTLAB_BUCKET_CACHE": str(cache),
        }

    def put(self, bucket, name, data, match):
        """Stores an object unless its generation isn't `match`; returns its metadata or None."""
        with self.lock:
            have = self.objects.get((bucket, name), (b"", 0))[1]
            if match is not None and int(match) != have:
                return None
            self.generation += 1
            self.objects[bucket, name] = (bytes(data), self.generation)
        return self.metadata(bucket, name)

    def metadata(self, bucket, name):
        data, generation = self.objects[bucket, name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        crc = base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "etag": f"e{generation}",
            "md5Hash": md5, "crc32c": crc, "timeCreated": time, "updated": time,
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BucketServer

    def log_message(self, *arguments):
        pass

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, BrokenPipeError):
            pass  # a client that was killed

    def _parts(self):
        parsed = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parsed.query))
        path = parsed.path.split("/storage/v1/b/", 1)
        if len(path) < 2:
            return None, None, query
        bucket, _, rest = path[1].partition("/o")
        return bucket, urllib.parse.unquote(rest.removeprefix("/")), query

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, code, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code=404):
        self._send(code, {"error": {"code": code, "message": "No such object"}})

    def do_GET(self):
        bucket, name, query = self._parts()
        if bucket is None:
            self._missing()
        elif name == "" and self.path.split("?")[0].endswith("/o"):
            self._list(bucket, query)
        elif name == "":
            self._send(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
        elif (bucket, name) not in self.server.objects:
            self._missing()
        elif query.get("alt") == "media":
            self._media(bucket, name, query)
        else:
            self._send(200, self.server.metadata(bucket, name), Content_Type="application/json")

    do_HEAD = do_GET  # noqa: N815

    def _media(self, bucket, name, query):
        data, generation = self.server.objects[bucket, name]
        headers = {
            "ETag": f"e{generation}", "X_Goog_Generation": str(generation),
            "Content_Type": "application/octet-stream",
        }  # fmt: skip
        if query.get("ifGenerationNotMatch") == str(generation):
            self._send(304)
            return
        wanted = self.headers.get("Range")
        if not wanted:
            self._send(200, data, **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1 if first and last else len(data), len(data))
        if begin >= len(data):
            self._send(416)
            return
        headers["Content_Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._send(206, data[begin:end], **headers)

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for own, name in sorted(list(self.server.objects)):
            if own != bucket or not name.startswith(prefix):
                continue
            if not query.get("startOffset", "") <= name < query.get("endOffset", chr(0x10FFFF)):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.server.metadata(bucket, name))
        found = {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
        self._send(200, found, Content_Type="application/json")

    def do_POST(self):
        bucket, name, query = self._parts()
        body = self._body()
        if "upload_id" in query:
            self._continue(query, body)
            return
        if bucket is None:
            self._missing()
            return
        if found := re.fullmatch(r"(.+)/(moveTo|(?:rewriteTo|copyTo)/b/([^/]+))/o/(.+)", name):
            source, how, other, target = found.groups()
            data = self.server.objects.get((bucket, source))
            if data is None:
                self._missing()
                return
            made = self.server.put(other or bucket, target, data[0], None)
            if how == "moveTo":
                del self.server.objects[bucket, source]
                self._stored(made)
            else:
                self._send(200, {"done": True, "resource": made, "totalBytesRewritten": "0"})
            return
        match = query.get("ifGenerationMatch")
        kind = query.get("uploadType")
        if kind == "resumable":
            key = uuid.uuid4().hex
            name = query.get("name") or json.loads(body)["name"]
            self.server.uploads[key] = (bucket, name, bytearray(), match)
            host = f"http://127.0.0.1:{self.server.server_port}"
            place = f"{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            self._send(200, Location=place)
            return
        if kind == "multipart":
            boundary = self.headers["Content-Type"].split("boundary=")[1].strip("'\"").encode()
            parts = body.split(b"--" + boundary)[1:-1]
            head, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            name, body = json.loads(head)["name"], re.sub(rb"\r?\n\Z", b"", data)
        elif kind == "media":
            name = query["name"]
        else:  # a call that is not known here: without an answer clients try for a minute
            self._missing(400)
            return
        self._stored(self.server.put(bucket, name, body, match))

    def do_PUT(self):
        self._continue(self._parts()[2], self._body())

    def _continue(self, query, body):
        """A chunk of a resumable upload; which chunk is the last one its Content-Range says."""
        bucket, name, data, match = self.server.uploads[query["upload_id"]]
        data += body
        if self.headers.get("Content-Range", "bytes 0-0/0").endswith("/*"):
            self._send(308, Range=f"bytes=0-{len(data) - 1}")
        else:
            del self.server.uploads[query["upload_id"]]
            self._stored(self.server.put(bucket, name, data, match))

    def _stored(self, made):
        if made is None:
            self._missing(412)
        else:
            self._send(200, made, Content_Type="application/json")

    def do_DELETE(self):
        bucket, name, _ = self._parts()
        with self.server.lock:
            gone = self.server.objects.pop((bucket, name), None)
        if gone is None:
            self._missing()
        else:
            self._send(204)
