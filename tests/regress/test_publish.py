"""The published pages load nothing from other hosts, and work."""

import base64
import hashlib
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from projecta.regress.site import publish as site
from tests.regress import foreign
from tests.regress.foreign import run

ASSETS = Path(site.__file__).parent / "vendor"


@pytest.fixture
def pages(workplace):
    foreign.make(workplace)
    foreign.commit(workplace, "one")
    assert run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")[0] == 0
    return workplace / ".asv/html"


def test_no_page_loads_from_another_host(pages):
    text = (pages / "history.html").read_text()
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(https?:)?//', text)
    loaded = re.findall(r'(?:src|href)="(vendor/[^"]+)" integrity="([^"]+)"', text)
    assert len(loaded) == len(site.ASSETS)
    for path, integrity in loaded:
        assert site.digest((pages / path).read_bytes()) == integrity
    assert "jquery-3.3.1" in (pages / "vendor/LICENSES.txt").read_text()


def test_publishing_again_changes_nothing(pages):
    before = (pages / "history.html").read_text()
    assert site.make_self_contained(pages) == []
    assert (pages / "history.html").read_text() == before


def test_a_file_that_is_not_shipped_is_refused(tmp_path):
    (tmp_path / "history.html").write_text(
        '<script src="https://example.org/new.js" integrity="sha256-x"></script>'
    )
    with pytest.raises(ValueError, match=r"asv's page loads new\.js, which projecta does not ship"):
        site.make_self_contained(tmp_path)
    (tmp_path / "history.html").write_text('<script src="https://example.org/new.js"></script>')
    with pytest.raises(ValueError, match="which projecta does not ship"):
        site.make_self_contained(tmp_path)


def test_shipped_files_match_the_digests_of_asv():
    import asv

    page = (Path(asv.__file__).parent / "www/index.html").read_text()
    digests = dict(re.findall(r'"https?://[^"]*?/([^"/]+)"\s+integrity="([^"]+)"', page))
    assert set(digests) == set(site.ASSETS)
    same = set()
    for name, digest in digests.items():
        kind, _, value = digest.partition("-")
        data = (ASSETS / site.ASSETS[name]).read_bytes()
        if base64.b64encode(hashlib.new(kind, data).digest()).decode() == value:
            same.add(name)
    assert same == {
        "jquery-3.3.1.min.js", "jquery.flot.orderBars.js", "md5.min.js", "bootstrap.min.js", "bootstrap.min.css"
    }  # fmt: skip  # Flot is shipped as in its package, not minified; the sorter is projecta's


def test_both_previews_serve_the_site(pages):
    """`projecta preview` and `asv preview`."""
    from projecta.regress.project.config import asv_command

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = pages.parents[1]
    ours = foreign.start(root, "preview", "--port", "0")
    theirs = subprocess.Popen(
        asv_command(root, "preview", "--port", str(port)),
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = ours.stdout.readline().split()[0]
        for place in (address, f"http://127.0.0.1:{port}/"):
            for page in (
                "index.html",
                "history.html",
                "page.css",
                "graphs/summary/suite.Sleep.time_sleep.json",
            ):
                assert _get(place + page).status == 200
    finally:
        for process in (ours, theirs):
            process.kill()
            process.communicate()


def _get(address):
    """The response; waits until the server is up."""
    limit = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(address) as answer:
                return answer
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)
