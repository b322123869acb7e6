"""Sphinx's roles in docstrings, ``:class:`X```, as plain code."""

import re


def on_page_content(html, **kwargs):
    """Return the page without them."""
    return re.sub(r":(?:class|func|meth|mod|data|attr):<code>~?([^<]*)</code>", r"<code>\1</code>", html)
