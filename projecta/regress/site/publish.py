"""The site: asv's pages, made self-contained, behind a start page.

asv's index.html, here history.html, names scripts and styles of four hosts. Each is in `vendor`, which is
shipped, and is copied beside the page; the page names the copy, with the digest of what was copied: no
request leaves the host, and a copy that was changed does not run.
"""

import base64
import functools
import hashlib
import re
import subprocess
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

from projecta.regress.errors import cannot
from projecta.regress.project.config import Project, asv_command, gate_pattern
from projecta.regress.project.git import list_history
from projecta.regress.site.page import write_pages

FOLDER, HISTORY = "vendor", "history.html"
ASSETS = {  # how the address ends: the file
    "jquery-3.3.1.min.js": "jquery.min.js",
    "jquery.flot.min.js": "jquery.flot.js",
    "jquery.flot.time.min.js": "jquery.flot.time.js",
    "jquery.flot.selection.min.js": "jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "jquery.flot.orderBars.js",
    "stupidtable.min.js": "tablesort.js",
    "md5.min.js": "md5.min.js",
    "bootstrap.min.js": "bootstrap.min.js",
    "bootstrap.min.css": "bootstrap.min.css",
}
_REMEDY = "Install the asv that `projecta[gate]` names."
_TAG = re.compile(r'(src|href)="https?://[^"]*?/([^"/]+)"\s+integrity="[^"]+"(\s+crossorigin="[^"]*")?')
_LOADED = re.compile(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="(https?:)?//[^"]*"')


def publish(project: Project) -> Path:
    """Write the whole site; return its folder. ValueError if asv cannot write its pages."""
    root, folder = project.folder, project.folder / project.config.html_dir
    done = subprocess.run(asv_command(root, "publish"), cwd=root, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        cannot("write the pages", f"asv publish failed: {lines[-1]}")
    (folder / "index.html").replace(folder / HISTORY)
    make_self_contained(folder)
    write_pages(project, folder, list_history(project.repository), gate_pattern(root))
    return folder


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the pages for this machine alone; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Quiet, directory=str(folder)))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""


def make_self_contained(folder: Path) -> list[Path]:
    """Rewrite asv's page in `folder`, and put what it loads beside it; return the copies.

    Raises:
        ValueError: the page loads something that is not shipped: this asv is not the one that projecta knows.
    """
    page = folder / HISTORY
    copied: dict[str, Path] = {}

    def local(match: re.Match[str]) -> str:
        attribute, name = match[1], match[2]
        if name not in ASSETS:
            cannot("write the pages", f"asv's page loads {name}, which projecta does not ship", _REMEDY)
        data = files("projecta.regress").joinpath("site", "vendor", ASSETS[name]).read_bytes()
        target = folder / FOLDER / ASSETS[name]
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
        copied[name] = target
        return f'{attribute}="{FOLDER}/{ASSETS[name]}" integrity="{digest(data)}"'

    text = _TAG.sub(local, page.read_text(encoding="utf-8"))
    left = _LOADED.search(text)
    if left is not None:
        cannot("write the pages", f"asv's page loads {left[0]}, which projecta does not ship", _REMEDY)
    if copied:
        licences = folder / FOLDER / "LICENSES.txt"
        licences.write_bytes(
            files("projecta.regress").joinpath("site", "vendor", "LICENSES.txt").read_bytes()
        )
    page.write_text(text, encoding="utf-8")
    return list(copied.values())


def digest(data: bytes) -> str:
    """The digest in the form of the attribute `integrity`.

    >>> digest(b"")[:20]
    'sha384-OLBgp1GsljhM2'
    """
    return "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()
