"""The page that the demo leaves."""

from tests.demo.page import write_page


def test_what_rows_hold_is_text(tmp_path):
    """Answers of a model are anybody's; numbers are for people."""
    jobs = [("deploy_e", 100.0, 130.0), ("label", 130.0, 142.0)]
    tasks = {"label": {"rows": 12_345, "rows/s": 90.4, "right": "99.0%"}}
    page = write_page(tmp_path / "index.html", jobs, tasks, {"label": [("<script>alert(1)</script>", "a & b")]})

    html = page.read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a &amp; b" in html
    assert "12,345" in html
    assert html.count("<rect") == 2
