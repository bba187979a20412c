from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flatminima.data import DataError
from flatminima.data.files import DataFile, cache_folder, data_folder, download, locate, verify

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CHECKSUM = f"sha256:{SHA256}"
PATH = "set/file.gz"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no data folder."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.delenv("FLATMINIMA_DATA", raising=False)
    return tmp_path / "cache" / "flatminima"


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that the user names."""
    folder = tmp_path / "named"
    folder.mkdir()
    monkeypatch.setenv("FLATMINIMA_DATA", str(folder))
    return folder


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A web site on this machine, whole, corrupt and broken files on it; and the list of what was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            corrupt = b"\xff" + CONTENT[1:]
            body = {"/whole": CONTENT, "/short": CONTENT[:5000], "/cut": CONTENT[:5000], "/corrupt": corrupt}
            if self.path not in body:
                self.send_error(404)
                return
            self.send_response(200)
            # "/cut" announces more than it sends, as a dropped connection does; "/short" is consistently too short.
            length = len(CONTENT) if self.path == "/cut" else len(body[self.path])
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body[self.path])

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def put(folder: Path, content: bytes = CONTENT, path: str = PATH) -> Path:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


def test_verify_accepts_both_algorithms_and_names_file_and_checksums(tmp_path: Path) -> None:
    file = put(tmp_path)
    verify(file, CHECKSUM)
    verify(file, f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    put(tmp_path, CONTENT[:-1])
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()
    with pytest.raises(DataError, match=rf"file\.gz is corrupt.*10239 bytes.*expected sha256 {SHA256}, found {found}"):
        verify(file, CHECKSUM)


def test_the_named_folder_comes_before_the_cache(named: Path, cache: Path) -> None:
    expected = put(named)
    put(cache)
    assert locate(DataFile(PATH, CHECKSUM)) == expected


def test_the_cache_serves_what_the_named_folder_lacks(named: Path, cache: Path) -> None:
    expected = put(cache)
    assert locate(DataFile(PATH, CHECKSUM)) == expected


def test_of_interchangeable_files_the_named_folder_wins_over_preference(named: Path, cache: Path) -> None:
    second = put(named, path="set/second")
    put(cache)
    assert locate(DataFile(PATH, CHECKSUM), DataFile("set/second", CHECKSUM)) == second
    first = put(named)
    assert locate(DataFile(PATH, CHECKSUM), DataFile("set/second", CHECKSUM)) == first


@pytest.mark.parametrize("content", [b"", CONTENT[:100], b"x" + CONTENT[1:]])
def test_a_wrong_file_in_the_named_folder_is_refused_not_passed_over(
    named: Path, cache: Path, site: tuple[str, list[str]], content: bytes
) -> None:
    put(named, content)
    put(cache)
    with pytest.raises(DataError, match=rf"named.*file\.gz.*expected sha256 {SHA256}, found"):
        locate(DataFile(PATH, CHECKSUM, (f"{site[0]}/whole",)))
    assert site[1] == []


def test_a_wrong_file_in_the_cache_is_refused(cache: Path) -> None:
    put(cache, CONTENT[:100])
    with pytest.raises(DataError, match="delete it and get it again"):
        locate(DataFile(PATH, CHECKSUM))


def test_a_download_happens_once(cache: Path, site: tuple[str, list[str]]) -> None:
    file = DataFile(PATH, CHECKSUM, (f"{site[0]}/whole",))
    for _ in range(2):
        assert locate(file) == cache / PATH
    assert (cache / PATH).read_bytes() == CONTENT
    assert site[1] == ["/whole"]


def test_a_file_address_works_too(tmp_path: Path, cache: Path) -> None:
    source = put(tmp_path / "mirror")
    assert locate(DataFile(PATH, CHECKSUM, (source.as_uri(),))).read_bytes() == CONTENT


@pytest.mark.parametrize("bad", ["short", "cut", "corrupt", "absent"])
def test_a_bad_download_leaves_nothing_behind(cache: Path, site: tuple[str, list[str]], bad: str) -> None:
    with pytest.raises(DataError) as caught:
        locate(DataFile(PATH, CHECKSUM, (f"{site[0]}/{bad}",)))
    assert list((cache / "set").iterdir()) == []
    message = str(caught.value)
    assert f"{site[0]}/{bad}" in message
    assert "FLATMINIMA_DATA" in message
    assert ("404" if bad == "absent" else f"expected sha256 {SHA256}, found ") in message


def test_the_next_mirror_is_tried(cache: Path, site: tuple[str, list[str]]) -> None:
    locate(DataFile(PATH, CHECKSUM, tuple(f"{site[0]}/{name}" for name in ("absent", "cut", "whole", "corrupt"))))
    assert (cache / PATH).read_bytes() == CONTENT
    assert site[1] == ["/absent", "/cut", "/whole"]
    assert list((cache / "set").iterdir()) == [cache / PATH]


def test_downloads_at_the_same_time_do_not_disturb_each_other(cache: Path, site: tuple[str, list[str]]) -> None:
    file = DataFile(PATH, CHECKSUM, (f"{site[0]}/whole",))
    threads = [threading.Thread(target=download, args=(file, cache)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verify(cache / PATH, CHECKSUM)
    assert list((cache / "set").iterdir()) == [cache / PATH]


def test_a_cache_that_cannot_be_made_is_named(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot write to the cache folder"):
        locate(DataFile(PATH, CHECKSUM, ("file:///nowhere",)))


def test_a_file_without_address_says_what_to_do(named: Path) -> None:
    with pytest.raises(DataError, match=r"set/file\.gz not found in the folder .*named.*no automatic download"):
        locate(DataFile(PATH, CHECKSUM))


def test_an_unset_variable_is_named() -> None:
    with pytest.raises(DataError, match="FLATMINIMA_DATA is not set"):
        locate(DataFile(PATH, CHECKSUM))


def test_the_variable_must_name_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMINIMA_DATA", "")
    assert data_folder() is None
    monkeypatch.setenv("FLATMINIMA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere', which is not a folder"):
        locate(DataFile(PATH, CHECKSUM))


def test_the_cache_is_not_made_by_asking_for_it(cache: Path) -> None:
    assert cache_folder() == cache
    assert not cache.exists()
