"""Images of rows: what they hold or name becomes part of the request, and nothing else is fetched."""

import asyncio
import base64
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Barrier, Thread

import fsspec
import pyarrow as pa
import pytest

from airflow_provider_raylm.cluster.batch.exchange import Answer, RowError
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.rows import EngineTraits, compile_step, images
from airflow_provider_raylm.cluster.batch.rows.images import image_address
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer
from airflow_provider_raylm.errors import BatchError, SpecError
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, Media, Step

CONTENT = b"not really an image"
INLINE = f"data:application/octet-stream;base64,{base64.b64encode(CONTENT).decode()}"
PART = {"type": "image_url", "image_url": {"url": "${photo}"}}


class Server(BaseHTTPRequestHandler):
    """Has one image, one that moved, one that is there from the third time on, and one that never ends."""

    asked = 0

    def do_GET(self):
        type(self).asked += 1
        status = {"/moved": 302, "/gone": 404}.get(self.path, 200)
        status = 503 if self.path == "/busy" and type(self).asked < 3 else status
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/photo")
        self.end_headers()
        with suppress(OSError):
            while self.path == "/dripping":
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        self.wfile.write(CONTENT if status == 200 else b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """Address of a web server that is not patient, and whose own time does not matter."""
    monkeypatch.setattr(images, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(Server, "asked", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("value", [CONTENT, {"bytes": CONTENT, "path": None}, INLINE])
def test_an_image_that_a_row_holds_needs_no_permission(value):
    """As bytes, as Hugging Face's datasets have it, or inline."""
    assert image_address(value, Media()) == INLINE


def test_an_image_is_read_where_rows_may_name_it(tmp_path, site):
    """On a storage, in a folder, or on a web server, which may be busy at first."""
    (tmp_path / "photo").write_bytes(CONTENT)
    with fsspec.open("memory://bucket/photo", "wb") as file:
        file.write(CONTENT)
    media = Media(allowed=[str(tmp_path), "memory://bucket/", site])

    for address in (f"{tmp_path}/photo", "memory://bucket/photo", f"{site}/photo", f"{site}/busy"):
        assert image_address(address, media) == INLINE


@pytest.mark.parametrize(
    ("allowed", "address"),
    [
        ([], "https://img.test/a"),
        (["https://img.test"], "https://img.test.evil/a"),
        (["https://img.test"], "https://img.test@evil/a"),
        (["https://img.test"], "https://img.test:8443/a"),
        (["https://img.test"], "http://img.test/a"),
        (["https://img.test/public"], "https://img.test/publicity/a"),
        (["https://img.test/public"], "https://img.test/public/../private"),
        (["https://img.test/public"], "https://img.test/public/%2e%2e/private"),
        (["https://img.test/public"], "https://img.test/public/%252E./private"),
        (["https://img.test/public"], "https://img.test/public%2f..%2fprivate"),
        (["https://img.test/public"], "https://img.test/public/..\\private"),
        (["https://img.test/public"], "https://img.test/public/a%5c..%5c..%5cprivate"),
        (["s3://photos/"], "s3://other/a"),
        (["s3://photos/in"], "s3://photos/in?/../out"),
        (["s3://photos/"], "simplecache::s3://photos/a"),
        (["/data"], "/data/../etc/passwd"),
        (["/data"], "/data/a?/../../etc/passwd"),
        (["/data"], "file:///data/a#/../../etc/passwd"),
        (["/data"], "file://etc/../data/a"),
        (["/data"], "file:///etc/passwd"),
        (["file:/data"], "file:a"),
        (["s3://photos/"], " s3://photos/a"),
        (["s3://photos/"], "s\t3://photos/a"),
        (["https://img.test"], "/etc/passwd"),
        (["https://img.test"], "https://[broken/a"),
    ],
)
def test_what_a_row_may_not_name_is_not_fetched(allowed, address):
    """However near it is to what it may."""
    with pytest.raises(RowError, match=r"media\.allowed"):
        image_address(address, Media(allowed=allowed))


def test_a_link_does_not_lead_out_of_a_folder(tmp_path):
    """Where it leads is what counts."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(CONTENT)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")

    with pytest.raises(RowError, match=r"media\.allowed"):
        image_address(f"{tmp_path}/in/link", Media(allowed=[f"{tmp_path}/in"]))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "neither bytes nor an address, but int"),
        (b"x" * 101, "more than 100 bytes"),
        (f"data:image/png;base64,{'A' * 200}", "more than 100 bytes"),
        ("memory://bucket/none", "there is no memory://bucket/none"),
        ("memory://bucket/large", "more than 100 bytes"),
        ("{site}/moved", "answered 302"),
        ("{site}/gone", "answered 404"),
        ("http://127.0.0.1:1/none", "ConnectError"),
    ],
)
def test_a_bad_image_is_its_rows_fault(site, value, words):
    """Also one whose server sends it elsewhere, where nobody has allowed."""
    with fsspec.open("memory://bucket/large", "wb") as file:
        file.write(b"x" * 101)
    media = Media(allowed=["memory://bucket", site, "http://127.0.0.1:1"], max_bytes=100)

    with pytest.raises(RowError, match=words) as error:
        image_address(value.format(site=site) if isinstance(value, str) else value, media)
    assert error.value.refusal.reason == "invalid_image"


def test_an_image_that_never_ends_is_given_up(site, monkeypatch):
    """However small it stays: a byte now and then keeps every other time from running out."""
    monkeypatch.setattr(images, "DOWNLOAD_S", 0.2)

    with pytest.raises(RowError, match="did not come within 0.2 s"):
        image_address(f"{site}/dripping", Media(allowed=[site]))


def test_a_name_of_no_file_is_its_rows_fault(tmp_path):
    """A folder, what would lie below a file, a name that is too long, a bucket: other rows have their images."""
    (tmp_path / "photo").write_bytes(CONTENT)
    media = Media(allowed=[str(tmp_path), "s3://photos"])

    for address, words in (
        (str(tmp_path), "is a folder, and no file"),
        (f"{tmp_path}/photo/b", "there is no"),
        (f"{tmp_path}/{'x' * 300}", "File name too long"),
        ("s3://photos", "is a bucket, and no file"),
    ):
        with pytest.raises(RowError, match=words) as error:
            image_address(address, media)
        assert error.value.refusal.reason == "invalid_image"


def test_the_case_of_a_scheme_does_not_matter(tmp_path, site):
    """As in any address."""
    (tmp_path / "photo").write_bytes(CONTENT)
    media = Media(allowed=[str(tmp_path), site])

    assert image_address(f"{site.replace('http', 'HTTP')}/photo", media) == INLINE
    assert image_address(f"FILE://{tmp_path}/photo", media) == INLINE


def test_a_storage_that_refuses_is_no_rows_fault(tmp_path, monkeypatch):
    """Else all rows would go to the quarantine while a credential is missing."""

    def refuse(place):
        raise PermissionError("no credentials")

    monkeypatch.setattr(images.Place, "open", refuse)

    with pytest.raises(BatchError, match=r"cannot read the image .*storage_conn_id"):
        image_address(f"{tmp_path}/photo", Media(allowed=[str(tmp_path)]))


def test_authors_and_rows_put_images_into_a_chat():
    """By OpenAI's names; a row's turns may have them by Hugging Face's, too."""
    content = [{"type": "text", "text": "What is on ${name}?"}, PART]
    step = Step(messages=[{"role": "user", "content": content}, "${talk}"])
    turns = [
        {"role": "user", "content": [{"type": "image", "image": CONTENT}, {"type": "image_url", "image_url": INLINE}]}
    ]

    asked = compile_step(step, EngineTraits("m")).request({"name": "it", "photo": CONTENT, "talk": turns}).content

    image = {"type": "image_url", "image_url": {"url": INLINE}}
    assert asked == [
        {"role": "user", "content": [{"type": "text", "text": "What is on it?"}, image]},
        {"role": "user", "content": [image, image]},
    ]
    assert step.columns_used == {"name", "photo", "talk"}


def test_images_of_a_block_are_fetched_side_by_side(monkeypatch):
    """And a row without its image fails alone, in its place."""
    together = Barrier(3)

    def fetch(address, media):
        together.wait(10)
        if address.endswith("b"):
            raise RowError("invalid_image", "gone")
        return CONTENT

    async def ask(question, requests, near):
        return [Answer("yes", "stop", 1, 1) for _ in requests]

    monkeypatch.setattr(images, "_read", fetch)
    spec = BatchSpec(source="in", output="out", messages=[{"role": "user", "content": [PART]}])
    table = pa.table({"photo": ["s3://p/a", "s3://p/b", "s3://p/c"], ROW_ID: ["0", "1", "2"]})
    engine = EngineTraits("m", media=Media(allowed=["s3://p"]))

    came = asyncio.run(BlockAnswerer(spec, engine, ask).answer(table, "block"))

    assert came.rows["photo"].to_pylist() == ["s3://p/a", "s3://p/c"]
    assert came.failed["photo"].to_pylist() == ["s3://p/b"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"media": {"allowed": ["img.test"]}}, r"allowed: 'img.test' is no beginning of an address"),
        ({"media": {"allowed": ["https:///photos"]}}, "no beginning of an address"),
        ({"engine_kwargs": {"allowed_media_domains": ["x"]}}, r"set EngineSpec\.media instead"),
    ],
)
def test_what_may_be_named_is_an_address(fields, words):
    """And is said in one place."""
    with pytest.raises(SpecError, match=words):
        EngineSpec(name="e", model="m", **fields)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "audio", "audio": "x"}, "messages"),
        ({"type": "image_url", "image_url": {"uri": "x"}}, r"image_url\.uri"),
        ({"type": "text"}, r"text"),
    ],
)
def test_a_part_that_is_none_is_named(part, words):
    """Before anything runs."""
    with pytest.raises(SpecError, match=words):
        Step(messages=[{"role": "user", "content": [part]}])
