"""The page at /marith/ of a real server, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import browser

pytestmark = pytest.mark.skipif(browser.binary() is None, reason=browser.NEEDS)


def test_two_formulas_side_by_side(url: str, tmp_path: Path) -> None:
    with browser.open_tab(f"{url}/marith/", tmp_path) as tab:
        tab.wait_for("document.querySelector('.pane .formula').value !== ''")
        assert tab.evaluate("document.querySelector('.pane .preset').value") == "preadd"
        assert tab.evaluate("document.querySelectorAll('.pane:first-child .dials input').length") == 1
        tab.wait_for("document.querySelector('.pane .note').textContent.includes('2 rows')")

        # A slider turns the preset's parameter, and the request with it.
        tab.evaluate(
            "(() => { const dial = document.querySelector('.pane .dials input');"
            " dial.value = 0.3; dial.oninput(); })()"
        )
        assert tab.evaluate("panes[0].request()")["parameters"] == {"strength": 0.3}

        tab.evaluate("document.getElementById('tokens').value = 12")
        tab.evaluate("document.getElementById('compare').click()")
        tab.evaluate("document.getElementById('write').click()")
        tab.wait_for("document.body.dataset.written === 'yes'")
        for pane in (0, 1):
            spans = f"[...panes[{pane}].text.querySelectorAll('.token')]"
            tokens = tab.evaluate(f"{spans}.map(token => [token.textContent, token.dataset.winner])")
            text = tab.evaluate(f"panes[{pane}].text.textContent")
            assert "".join(token for token, _ in tokens) == text != ""
            assert {winner for _, winner in tokens} <= {"base", "toxic", ""}
            assert any(winner for _, winner in tokens)
            assert "tokens written" in tab.evaluate(f"panes[{pane}].cost.textContent")

        # A mistake is told with its place, and nothing breaks.
        tab.evaluate(
            "(() => { const f = document.querySelector('.pane .formula');"
            " f.value = 'base - *toxic'; f.oninput(); })()"
        )
        tab.wait_for("document.querySelector('.pane .note.fault')?.textContent.includes('column 8')")
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        assert tab.errors == []
        loaded = tab.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(url) for name in loaded), "nothing comes from elsewhere"
