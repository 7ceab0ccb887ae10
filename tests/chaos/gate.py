"""A gate before a dashboard: it asks for a token of its own, which may change, and it may be silent."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

# A client that waits longer has given up by then.
SILENCE_S = 60


class Gate:
    """The gate.

    Attributes:
        port: on loopback.
        token: asked for.
        refused: how many requests came with another one.
    """

    def __init__(self, token):
        self.port = 0
        self.token = token
        self.refused = 0
        self._speaks = threading.Event()
        self._speaks.set()

    def silence(self):
        self._speaks.clear()

    def speak(self):
        self._speaks.set()

    def connection(self, cluster):
        """Return the raylm connection that leads through the gate."""
        return {**cluster.connection(), "host": "127.0.0.1", "port": self.port, "password": self.token}

    def answers(self):
        """Return whether this request has an answer: one that came while the gate was silent has none."""
        if self._speaks.is_set():
            return True
        self._speaks.wait(SILENCE_S)
        return False


@contextmanager
def gate(cluster, token):
    """Stand before a cluster's dashboard."""
    state = Gate(token)
    way = httpx.Client(base_url=cluster.url, headers={"Authorization": f"Bearer {cluster.token}"}, timeout=60)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not state.answers():
                self.close_connection = True
                return
            if self.headers.get("Authorization") != f"Bearer {state.token}":
                state.refused += 1
                self.send_error(401)
                return
            answer = way.request(self.command, self.path, content=body)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("content-type", "text/plain"))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.speak()
        server.shutdown()
        server.server_close()
        thread.join()
        way.close()
