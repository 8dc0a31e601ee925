"""The links of a built site that lead nowhere: pages, anchors, pictures."""

import html.parser
import pathlib
import urllib.parse


class _Page(html.parser.HTMLParser):
    """Collects the links of a page, and what in it can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name")}
        if tag not in ("link", "base"):
            self.links += [v for k, v in attrs.items() if k in ("href", "src") and v]


def dead_links(site: pathlib.Path) -> list[str]:
    """Return `page: link` for each link within the site that has no target.

    Args:
        site: The folder that MkDocs wrote.
    """
    pages = {p: _Page(p) for p in site.rglob("*.html") if p.name != "404.html"}
    return sorted(
        f"{path.relative_to(site)}: {link}"
        for path, page in pages.items()
        for link in page.links
        if not _leads_somewhere(path, link, pages)
    )


def _leads_somewhere(path, link, pages):
    parts = urllib.parse.urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
    if not parts.path:
        target = path
    elif target.is_dir():
        target = target / "index.html"
    if target not in pages:
        return target.is_file()
    return urllib.parse.unquote(parts.fragment) in pages[target].anchors
