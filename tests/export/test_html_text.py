"""The text of the page that draws a graph: it stands alone, and runs its own script only."""

from __future__ import annotations

import base64
import hashlib
import re

from ifr_fast.export.html import explorer_script
from ifr_fast.routes.route_graph import RouteGraph


def test_page_text_is_standalone(hostile: RouteGraph) -> None:
    page = hostile.to_html()
    assert page.count("</script>") == 2
    assert "<!--" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    assert not any(c in page for c in "\u2028\u2029\ud800\u202e")
    title = page.split("<title>")[1].split("</title>")[0]
    assert title.startswith("&lt;script&gt;")


def test_only_the_page_s_own_script_may_run(hostile: RouteGraph) -> None:
    page = hostile.to_html()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_page_without_its_data_is_small(hostile: RouteGraph) -> None:
    page = hostile.to_html()
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert len(page) - len(data) < 150_000
    assert explorer_script().isascii()
