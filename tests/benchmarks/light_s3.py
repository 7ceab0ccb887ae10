"""An S3 server with many equal objects and a round trip's time, that costs next to nothing itself.

Started as ``python -m tests.benchmarks.light_s3 FILE OBJECTS SECONDS``: every object ``bucket/in/<n>.parquet`` has the
content of FILE. Prints its port, and the requests that it had when it is told to stop.
"""

import asyncio
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PAGE = 1000
_HEAD = 'HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: "e"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'


class LightS3:
    def __init__(self, content: bytes, objects: int, delay: float) -> None:
        self._content = content
        self._objects = objects
        self._delay = delay
        self.requests: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(self._delay)
                head = request.decode("latin-1")
                method, target, _ = head.split(" ", 2)
                writer.write(self._list(target) if "list-type=2" in target else self._get(method, head))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _get(self, method: str, head: str) -> bytes:
        self.requests[method] += 1
        wanted = re.search(r"\r\nrange: bytes=(\d+)-(\d*)", head, re.I)
        first = int(wanted[1]) if wanted else 0
        last = min(int(wanted[2]) if wanted and wanted[2] else len(self._content), len(self._content) - 1)
        part = self._content[first : last + 1]
        told = _HEAD.format(status="206 Partial Content" if wanted else "200 OK", length=len(part))
        told += f"Content-Range: bytes {first}-{last}/{len(self._content)}\r\n" if wanted else ""
        return f"{told}\r\n".encode() + (b"" if method == "HEAD" else part)

    def _list(self, target: str) -> bytes:
        self.requests["LIST"] += 1
        asked = parse_qs(urlsplit(target).query)
        start = (
            int(asked.get("continuation-token", ["0"])[0]) if "in" in asked.get("prefix", [""])[0] else self._objects
        )
        end = min(start + PAGE, self._objects)
        more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < self._objects else ""
        keys = "".join(
            f"<Contents><Key>in/{n:06d}.parquet</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;e&quot;</ETag><Size>{len(self._content)}</Size></Contents>"
            for n in range(start, end)
        )
        truncated = "true" if more else "false"
        body = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{keys}</ListBucketResult>".encode()
        return f"{_HEAD.format(status='200 OK', length=len(body))}Content-Type: application/xml\r\n\r\n".encode() + body


async def main(file: str, objects: str, delay: str) -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    state = LightS3(Path(file).read_bytes(), int(objects), float(delay))
    server = await asyncio.start_server(state.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await over.wait()
    print(sum(state.requests.values()), state.requests["LIST"], flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
