"""The HTTP interface, in this process: answers equal those of the index, and what an attacker sends is refused."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_image
from PIL import Image
from served_index import InProcess, encoded, make_index, make_run, png_that_claims

from ray_dmml import UserError, load_cohort, load_index, remove_rows, update_index

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")

from starlette.testclient import TestClient

from ray_dmml.serve.answers import Query, RequestError, Result
from ray_dmml.serve.app import build_app
from ray_dmml.serve.searcher import Searcher
from ray_dmml.serve.settings import LOOPBACK, ServeSettings, hashed

QUERY = "class07/2.png"


class Served:
    """The folders of a service, and a client of it."""

    def __init__(self, images: Path, run: Path, folders: dict[str, Path], **limits: Any) -> None:
        self.images, self.run, self.folders, self.limits = images, run, folders, limits
        settings = ServeSettings(indexes=[str(folder) for folder in folders.values()], **limits)
        self.backend = InProcess(settings)
        self.app = build_app(self.backend, settings)
        self.client = TestClient(self.app, base_url="http://localhost")

    def limited(self, **limits: Any) -> TestClient:
        """A client of a service with the same indexes and other limits."""
        settings = ServeSettings(indexes=[str(folder) for folder in self.folders.values()], **limits)
        return TestClient(build_app(self.backend, settings), base_url="http://localhost")

    def search(self, path: str = QUERY, **parameters: Any) -> Any:
        """Sends an image of the folder as the body."""
        return self.client.post("/search", content=(self.images / path).read_bytes(), params=parameters)


@pytest.fixture(scope="module")
def served(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    run = make_run(image_folder, folder / "run")
    names = ("ensemble", "peer0")
    return Served(image_folder, run, {name: make_index(run, image_folder, folder / name, name) for name in names})


def matches(answer: Any, number: int = 0) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["results"][number]["matches"]
    return found


# --- answers --------------------------------------------------------------------------------


def test_an_image_is_searched_as_the_index_does(served: Served) -> None:
    """A body, a form, and every peer and the ensemble: ids and similarities are those of ImageIndex.search."""
    cohort = load_cohort(served.run)
    file = served.images / QUERY
    answer = served.search(k=7, index=["peer0", "ensemble"])
    assert [result["index"] for result in answer.json()["results"]] == ["peer0", "ensemble"]
    for number, (name, model) in enumerate([("peer0", cohort.peers["peer0"]), ("ensemble", cohort)]):
        index = load_index(served.folders[name])
        similarities, ids = index.search(model.embed_files([file]), 7)
        found = matches(answer, number)
        assert [match["id"] for match in found] == ids[0].tolist()
        assert [match["path"] for match in found] == index.paths(ids[0])
        np.testing.assert_allclose([match["similarity"] for match in found], similarities[0], atol=1e-5)
        assert [match["rank"] for match in found] == [*range(1, 8)]
    form = served.client.post(
        "/search", files={"image": file.read_bytes()}, data={"k": "7", "index": ["peer0", "ensemble"]}
    )
    assert form.json() == answer.json()


def test_an_image_of_the_index(served: Served) -> None:
    """By path or id, without itself, in every index; it comes with its picture."""
    index = load_index(served.folders["ensemble"])
    own = index.id_of(QUERY)
    by_path = served.client.post("/search", json={"path": QUERY, "k": 4, "index": ["ensemble", "peer0"]})
    by_id = served.client.post("/search", json={"id": own, "k": 4, "index": ["ensemble", "peer0"]})
    assert by_path.json() == by_id.json()
    similarities, ids = index.search(index.vector(own)[None], 5)
    assert ids[0, 0] == own and [match["id"] for match in matches(by_path)] == ids[0, 1:].tolist()
    np.testing.assert_allclose([match["similarity"] for match in matches(by_path)], similarities[0, 1:], atol=1e-6)
    query = by_path.json()["results"][1]["query"]
    assert query["path"] == QUERY
    picture = served.client.get("/" + query["picture"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(picture.content)).size == (24, 24)


@pytest.mark.parametrize("prefix", ["class03/", "class0", "class03/1", "class99/", "%"])
def test_a_filter_is_a_prefix(served: Served, prefix: str) -> None:
    """As if the others were sorted out afterwards; also where fewer than k are left."""
    everything = matches(served.search(k=80))
    expected = [match["path"] for match in everything if match["path"].startswith(prefix)][:8]
    assert [match["path"] for match in matches(served.search(k=8, filter=prefix))] == expected


def test_an_embedding(served: Served) -> None:
    """It is that of embed_files, with the hash of its model."""
    model = load_cohort(served.run).peers["peer0"]
    answer = served.client.post("/embed?index=peer0", content=(served.images / QUERY).read_bytes()).json()
    assert (answer["index"], answer["model"]) == ("peer0", model.fingerprint)
    np.testing.assert_allclose(answer["embedding"], model.embed_files(served.images / QUERY)[0], atol=1e-5)
    assert len(served.client.post("/embed", content=encoded("JPEG")).json()["embedding"]) == 32


def test_queries_together_are_as_alone(served: Served) -> None:
    """A batch of unlike queries, some of which are refused."""
    searcher = served.backend.searcher
    image = searcher.decode(encoded("PNG"))
    queries = [
        Query(image=image, k=3),
        Query(path="nowhere.png"),
        Query(("peer0",), path=QUERY, k=5),
        Query(("peer0", "ensemble"), image=searcher.decode(encoded("PNG", seed=1)), prefix="class1"),
        Query(("nobody",), image=image),
        Query(("ensemble",), image=image, k=2),
    ]
    together = searcher.answer(queries)
    for query, answer in zip(queries, together, strict=True):
        [alone] = searcher.answer([query])
        if isinstance(alone, Exception):
            assert str(answer) == str(alone)
            continue
        assert not isinstance(answer, Exception)
        for one, other in zip(answer, alone, strict=True):
            assert [match.id for match in one.matches] == [match.id for match in other.matches]
            ours, theirs = ([match.similarity for match in result.matches] for result in (one, other))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_is_there(served: Served) -> None:
    """The list of indexes, the health, the description of the interface, and the page, which loads nothing else."""
    info = served.client.get("/indexes").json()
    assert [(index["name"], index["num_images"]) for index in info["indexes"]] == [("ensemble", 80), ("peer0", 80)]
    assert info["indexes"][0]["folders"] == [f"class{number:02d}/" for number in range(16)]
    for index in info["indexes"]:
        assert len(index["examples"]) == 14 and index["examples"][-1]["path"] == "class15/4.png"
        assert served.client.get("/" + index["examples"][3]["picture"]).status_code == 200
    assert served.client.get("/healthz").json() == {"status": "ok"}
    described = served.client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/search", "/embed", "/images/{index}/{id}", "/indexes", "/healthz"}
    bodies = described["paths"]["/search"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"image/*", "application/octet-stream", "multipart/form-data", "application/json"}
    parameters = {
        path: [one["name"] for one in described["paths"][path]["post"]["parameters"]] for path in ("/search", "/embed")
    }
    assert parameters == {"/search": ["k", "filter", "index"], "/embed": ["index"]}
    page = served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for address in ("/", "/page.css", "/page.js"):
        answer = served.client.get(address)
        assert answer.status_code == 200 and "http://" not in answer.text and "https://" not in answer.text
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_an_index_that_changes(
    image_folder: Path, tmp_path: Path, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """It is used once it is loaded; what is damaged or of another model is not."""
    folder = make_index(served.run, image_folder, tmp_path / "index", "peer0", leave_out=[QUERY])
    searcher = Searcher([str(folder)])
    query = Query(image=searcher.decode((image_folder / QUERY).read_bytes()), k=80)

    def paths() -> list[str]:
        [answer] = searcher.answer([query])
        assert not isinstance(answer, Exception)
        return [match.path for match in answer[0].matches]

    assert not searcher.reload_changed() and QUERY not in paths()
    update_index(folder)
    assert QUERY not in paths() and searcher.reload_changed() and paths()[0] == QUERY
    remove_rows(folder, [QUERY])
    assert searcher.reload_changed() and not searcher.reload_changed() and QUERY not in paths()
    before = (folder / "index.json").read_text()
    for damaged in ("{", before.replace(load_index(folder).model, "b" * 64)):
        (folder / "index.json").write_text(damaged)
        assert not searcher.reload_changed() and len(paths()) == 79
    (folder / "index.json").unlink()
    for _ in range(3):  # it is looked at each second
        assert not searcher.reload_changed() and len(paths()) == 79
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.partition(": ")[0] for message in messages] == ["the index peer0 is not reloaded"] * 3
    (folder / "index.json").write_text(before)
    update_index(folder)
    assert searcher.reload_changed()


# --- what is refused ------------------------------------------------------------------------


def assert_refused(answer: Any, status: int, message: str) -> None:
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"], answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "the image is empty"),
        (SVG, 415, "it is not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "it is not an image in a known format"),
        (b"<html><script>alert(1)</script></html>", 415, "it is not an image in a known format"),
        (encoded("PNG")[:-400], 422, "the image cannot be decoded"),
        (png_that_claims(40_000, 40_000), 413, "the image has too many pixels; at most 50,000,000 are decoded"),
        (png_that_claims(9_000, 9_000), 413, "the image has too many pixels"),
        (png_that_claims(5_000, 5_000), 422, "the image cannot be decoded"),
    ],
    ids=["empty", "SVG", "EPS", "HTML", "cut off", "huge bomb", "bomb", "missing pixels"],
)
def test_a_body_that_is_no_image(served: Served, content: bytes, status: int, message: str) -> None:
    for kind in ("image/svg+xml", "image/jpeg"):
        assert_refused(served.client.post("/search", content=content, headers={"Content-Type": kind}), status, message)
    assert_refused(served.client.post("/embed", files={"image": content}), status, message)


def test_a_polyglot_is_the_image_that_it_is(served: Served, tmp_path: Path) -> None:
    """A script behind a JPEG changes nothing, and a picture of the gallery is a new file without it."""
    jpeg, script = encoded("JPEG"), b"<script>alert(1)</script>PK\x03\x04"
    plain, polyglot = (served.client.post("/search", content=content) for content in (jpeg, jpeg + script))
    assert matches(plain) == matches(polyglot)
    shutil.copytree(served.images, tmp_path / "images")
    (tmp_path / "images" / QUERY).write_bytes(jpeg + script)
    folder = make_index(served.run, tmp_path / "images", tmp_path / "index", "peer0")
    picture = Searcher([str(folder)]).picture("peer0", load_index(folder).id_of(QUERY), "small")
    assert picture.startswith(b"\xff\xd8\xff") and picture.endswith(b"\xff\xd9") and b"script" not in picture


@pytest.mark.parametrize(
    ("json", "message"),
    [
        ({}, "give an image, or either the path or the id of one"),
        ({"path": QUERY, "id": 1}, "give an image, or either the path or the id of one"),
        ({"path": QUERY, "k": 0}, "k: "),
        ({"path": QUERY, "k": 1001}, "k: "),
        ({"path": QUERY, "size": 4}, "size: "),
        ({"id": 2**63}, "id: "),
        ({"id": -1}, "id: "),
        ([], "Input should be an object"),
    ],
)
def test_json_that_is_not_understood(served: Served, json: Any, message: str) -> None:
    assert_refused(served.client.post("/search", json=json), 422, message)


def test_an_image_as_curl_sends_it(served: Served) -> None:
    """`curl --data-binary @FILE` calls every file a form."""
    image, headers = encoded("PNG"), {"Content-Type": "application/x-www-form-urlencoded"}
    sent = served.client.post("/search?k=3", content=image, headers=headers)
    assert matches(sent) == matches(served.client.post("/search?k=3", content=image))
    assert_refused(served.client.post("/search", data={"k": "3"}), 415, "it is not an image in a known format")


def test_other_requests_that_are_not_understood(served: Served) -> None:
    post, image = served.client.post, encoded("PNG")
    assert_refused(post("/search", content=image, headers={"Content-Type": "text/plain"}), 415, "send an image")
    assert_refused(post("/search?path=a", content=image), 422, "give an image, or the path or id of one, not both")
    assert_refused(post("/search?k=many", content=image), 422, "k: ")
    assert_refused(post("/search?index=nobody", content=image), 404, "there is no index 'nobody'; there are ensemble")
    assert_refused(post("/search", data={"image": "text"}, files={"other": image}), 422, "no file in the field 'image'")
    assert_refused(post("/search", files=[("image", image), ("image", image)]), 400, "Too many files")
    headers = {"Content-Type": "multipart/form-data"}
    assert post("/search", content=image, headers=headers).status_code == 400
    assert_refused(post("/embed", json={"path": QUERY}), 422, "give one image")
    for parameters in ("k=5", "filter=class0", "index=peer0&index=ensemble"):
        assert_refused(post(f"/embed?{parameters}", content=image), 422, "give one image, and at most one index")
    assert served.client.get("/search").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "class07/../class07/2.png",
        "..\\..\\secret",
        "class07/2.png\0",
        "file:///etc/passwd",
    ],
)
def test_only_images_of_the_index(served: Served, path: str) -> None:
    """A path is compared with those of the index, and never opened. No answer names a folder of the server."""
    answer = served.client.post("/search", json={"path": path})
    assert_refused(answer, 404, "is not in the index")
    assert str(served.images) not in answer.text and str(served.folders["ensemble"]) not in answer.text


@pytest.mark.parametrize(
    "address", ["ensemble/80", "ensemble/9999999999", "nobody/0", "ensemble/-1", "ensemble/..%2f0"]
)
def test_only_pictures_of_the_index(served: Served, address: str) -> None:
    answer = served.client.get(f"/images/{address}")
    assert answer.status_code in (404, 422) and str(served.images.parent) not in answer.text


@pytest.mark.parametrize(
    "address", ["/page/../app.py", "/..%2fapp.py", "/images/../../../etc/passwd", "/static/app.py"]
)
def test_there_are_no_other_files(served: Served, address: str) -> None:
    assert served.client.get(address).status_code in (404, 405)


def test_a_lost_file_has_no_picture(served: Served, image_folder: Path, tmp_path: Path) -> None:
    """The answer does not say where it was."""
    images = tmp_path / "photos"
    shutil.copytree(image_folder, images)
    folder = make_index(served.run, images, tmp_path / "index", "peer0")
    client = Served(images, served.run, {"peer0": folder}).client
    (images / QUERY).write_bytes(SVG)
    shutil.rmtree(images / "class00")
    for path in (QUERY, "class00/0.png"):
        answer = client.get(f"/images/peer0/{load_index(folder).id_of(path)}")
        assert_refused(answer, 404, "the image has no picture here")
        assert str(tmp_path) not in answer.text


def test_pictures_are_small(served: Served, tmp_path: Path) -> None:
    """At most 256 or 1024 px, upright, and without the metadata of the file."""
    write_image(tmp_path / "photos/class0/a.png", np.random.default_rng(0), 1)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    Image.open(served.images / QUERY).resize((1600, 800)).save(tmp_path / "photos/class0/b.jpg", exif=exif)
    folder = make_index(served.run, tmp_path / "photos", tmp_path / "index", "peer0")
    client = Served(tmp_path / "photos", served.run, {"peer0": folder}).client
    own = load_index(folder).id_of("class0/b.jpg")
    for size, expected in (("small", (128, 256)), ("large", (512, 1024))):
        answer = client.get(f"/images/peer0/{own}?size={size}")
        assert Image.open(io.BytesIO(answer.content)).size == expected and b"secret" not in answer.content
    assert client.get(f"/images/peer0/{own}?size=9999").status_code == 422


def test_a_token(served: Served) -> None:
    """Without it there is the page, the health and the description of the interface, and nothing else."""
    client = served.limited(token_sha256=hashed("open sesame"))
    requests: list[tuple[str, str]] = [("POST", "/search"), ("POST", "/embed"), ("GET", "/indexes")]
    requests += [("GET", "/images/ensemble/0"), ("GET", "/nowhere")]
    for method, address in requests:
        for header in (
            None,
            "Bearer open sesam",
            "Bearer ",
            "Basic open sesame",
            "open sesame",
            "Bearer öpen".encode(),
        ):
            answer = client.request(method, address, headers={} if header is None else {"Authorization": header})
            assert_refused(answer, 401, "a bearer token is needed")
            assert answer.headers["www-authenticate"] == "Bearer"
    for address in ("/", "/page.js", "/page.css", "/healthz", "/openapi.json"):
        assert client.get(address).status_code == 200
    for header in ("Bearer open sesame", "bearer open sesame"):
        assert client.get("/indexes", headers={"Authorization": header}).status_code == 200


def test_other_web_pages_and_names(served: Served) -> None:
    """A page elsewhere may not search, also if its name leads to this machine."""
    client = served.limited(allowed_hosts=list(LOOPBACK))
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"):
        assert client.get("/indexes", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", ""):
        assert_refused(client.get("/", headers={"Host": host}), 421, "this server has another name")
    for site in ("cross-site", "same-site"):
        answer = client.post("/search", content=encoded("PNG"), headers={"Sec-Fetch-Site": site})
        assert_refused(answer, 403, "other web pages may not search")
    answer = client.options(
        "/search", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


# --- size, time and number ------------------------------------------------------------------


Chunks = Iterator[tuple[float, bytes]]


async def send_slowly(app: Any, chunks: Chunks, headers: dict[str, str]) -> tuple[int, int]:
    """The status of the answer to a body that is sent in chunks, each after some seconds, and the bytes taken of it."""
    taken, status = 0, 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        pause, chunk = next(chunks)
        await asyncio.sleep(pause)
        taken += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/search",
        "raw_path": b"/search",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in ({"host": "localhost"} | headers).items()],
    }
    await app(scope, receive, send)
    return status, taken


def endless(pause: float, size: int) -> Chunks:
    while True:
        yield pause, bytes(size)


def test_a_large_upload_is_cut_off(served: Served) -> None:
    """By its length before a byte is read, or else when the limit is reached."""
    size = {"content-length": str(2 * 2**30), "content-type": "image/png"}
    assert asyncio.run(send_slowly(served.app, endless(0, 2**20), size)) == (413, 0)
    status, taken = asyncio.run(send_slowly(served.app, endless(0, 2**20), {"transfer-encoding": "chunked"}))
    assert status == 413 and 20 * 10**6 < taken < 21 * 2**20
    client = served.limited(max_upload_bytes=1000)
    answer = client.post("/search", files={"image": bytes(1000)})
    assert_refused(answer, 413, "at most 1,000 bytes are read")
    assert answer.headers["connection"] == "close"
    assert client.post("/search", content=bytes(1000)).status_code == 415


def test_a_slow_client_is_cut_off(served: Served) -> None:
    app = served.limited(upload_timeout_s=0.2).app
    assert asyncio.run(send_slowly(app, endless(0.05, 1), {}))[0] == 408
    assert asyncio.run(send_slowly(app, endless(100, 1), {}))[0] == 408


def test_too_many_at_the_same_time(served: Served) -> None:
    """Requests beyond the limit get 503 and a Retry-After; the place of one that has ended is free."""
    app = served.limited(max_concurrent=3, upload_timeout_s=0.5).app

    async def all_of_them() -> list[tuple[int, int]]:
        return await asyncio.gather(*(send_slowly(app, endless(0.1, 1), {}) for _ in range(20)))

    statuses = [status for status, _ in asyncio.run(all_of_them())]
    assert sorted(statuses) == [408] * 3 + [503] * 17
    client = TestClient(app, base_url="http://localhost")
    assert client.post("/search", content=encoded("PNG")).status_code == 200
    none = served.limited(max_concurrent=1)
    blocked = block(none.app)
    answer = blocked(lambda: none.get("/indexes"))
    assert_refused(answer, 503, "too many requests at the same time")
    assert answer.headers["retry-after"] == "1"


def block(app: Any) -> Callable[[Callable[[], Any]], Any]:
    """Calls a function while another client sends its image."""

    def call(function: Callable[[], Any]) -> Any:
        async def both() -> Any:
            other = asyncio.create_task(send_slowly(app, endless(0.1, 1), {}))
            await asyncio.sleep(0.05)
            answer = await asyncio.to_thread(function)
            other.cancel()
            return answer

        return asyncio.run(both())

    return call


class WithoutReplicas(InProcess):
    """No replica answers, and those that worked on a search have died."""

    async def search(self, image: bytes | None, query: Query) -> list[Result]:
        raise RequestError(503, "the replicas that worked on this request have died")

    async def describe(self) -> list[dict[str, Any]]:
        return await asyncio.get_running_loop().create_future()


def test_replicas_that_are_gone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is not healthy. An image that may have ended replicas is not asked for again."""
    monkeypatch.setattr("ray_dmml.serve.app.HEALTH_TIMEOUT_S", 0.1)
    settings = ServeSettings(indexes=[str(served.folders["peer0"])])
    client = TestClient(build_app(WithoutReplicas(settings), settings), base_url="http://localhost")
    assert_refused(client.get("/healthz"), 503, "no replica answers")
    answer = client.post("/search", content=encoded("PNG"))
    assert_refused(answer, 503, "the replicas that worked on this request have died")
    assert "retry-after" not in answer.headers


# --- a service that cannot start ------------------------------------------------------------


def test_indexes_that_do_not_go_together(served: Served, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an index"):
        Searcher([str(tmp_path)])
    other = make_index(make_run(image_folder, tmp_path / "run", seed=1), image_folder, tmp_path / "other", "peer1")
    with pytest.raises(UserError, match="were embedded by another run than those of"):
        Searcher([str(served.folders["peer0"]), str(other)])
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(UserError, match=r"is not there; give its folder \(--run\)"):
        Searcher([str(other)])
    assert Searcher([str(other)], str(tmp_path / "moved")).describe()[0]["name"] == "peer1"
    with pytest.raises(UserError, match=r"embedded by another model than peer1 of"):
        Searcher([str(other)], str(served.run))
    copy = shutil.copytree(served.folders["peer0"], tmp_path / "copy")
    both = Searcher([str(served.folders["peer0"]), str(copy)])
    assert [index["name"] for index in both.describe()] == ["peer0", "copy"]
    with pytest.raises(UserError, match="two of the indexes are of one peer, and their folders have the same name"):
        Searcher([str(copy), str(copy)])
