"""What users write is shown as they wrote it, by a Markdown renderer that we did not write."""

import html

import pytest
from markdown_it import MarkdownIt

from dopsd_jax.core.markdown import code, fenced, plain

TEXTS = [
    "a cat", "a | b ](x) <script>alert(1)</script> # h *x* _y_ [l](http://e) ![i](j)", "`c`",
    "``", "a ``` b", "\\*x\\*", "&amp; &lt;b>", "~~no~~ $x$", "猫 größe", "`", "a\\`b",
]


def rendered(text):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_users_acts_as_no_markdown(text):
    shown = html.escape(text)
    assert rendered(f"Of {plain(text)}.") == f"<p>Of {shown}.</p>\n"
    assert rendered(f"Of {code(text)}.") == f"<p>Of <code>{shown}</code>.</p>\n"
    lines = f"x\n{text}\n```\ny"
    assert rendered(fenced(lines, "python")) == (
        f'<pre><code class="language-python">{html.escape(lines)}\n</code></pre>\n'
    )


def test_a_text_of_several_lines_is_no_heading():
    assert rendered(f"Of {plain('x' + chr(10) + '---' + chr(10) + 'y')}.") == "<p>Of x --- y.</p>\n"
