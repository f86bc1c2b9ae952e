"""Makes asv's pages self-contained: what they load from elsewhere comes from `assets`, which is shipped.

asv's index.html names scripts and styles of four hosts. Each is copied beside the page, and the page names
the copy, with the digest of what was copied: no request leaves the host, and a copy that was changed does not
run.
"""

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path

from projecta._checks import fail

FOLDER = "vendor"
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
_TAG = re.compile(r'(src|href)="https?://[^"]*?/([^"/]+)"\s+integrity="[^"]+"(\s+crossorigin="[^"]*")?')
_LOADED = re.compile(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="(https?:)?//[^"]*"')


def make_self_contained(folder: Path) -> list[Path]:
    """Rewrite asv's index.html in `folder`, and put what it loads beside it; return the copies.

    Raises:
        ValueError: the page loads something that is not shipped: this asv is not the one that projecta knows.
    """
    page = folder / "index.html"
    copied: dict[str, Path] = {}

    def local(match: re.Match[str]) -> str:
        attribute, name = match[1], match[2]
        if name not in ASSETS:
            fail("projecta publish", "asv's index.html", "load what projecta ships", name)
        data = files("projecta.regress").joinpath("assets", ASSETS[name]).read_bytes()
        target = folder / FOLDER / ASSETS[name]
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
        copied[name] = target
        return f'{attribute}="{FOLDER}/{ASSETS[name]}" integrity="{digest(data)}"'

    text = _TAG.sub(local, page.read_text(encoding="utf-8"))
    left = _LOADED.search(text)
    if left is not None:
        fail("projecta publish", "asv's index.html", "load what projecta ships", left[0])
    if copied:
        licences = folder / FOLDER / "LICENSES.txt"
        licences.write_bytes(files("projecta.regress").joinpath("assets", "LICENSES.txt").read_bytes())
    page.write_text(text, encoding="utf-8")
    return list(copied.values())


def digest(data: bytes) -> str:
    """As the `integrity` of a page writes it.

    >>> digest(b"")[:20]
    'sha384-OLBgp1GsljhM2'
    """
    return "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()
