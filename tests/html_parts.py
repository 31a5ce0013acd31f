"""Reading a page as a browser would, for the tests of pages."""

import html.parser

VOID = {"meta", "img", "source", "link", "br", "input"}


class Page(html.parser.HTMLParser):
    """Tags, addresses, the text of each element by its tag, and rows of tables.

    Attributes:
        tags: All tags, in order.
        addresses: Everything that a browser would load.
        texts: Tag to the text of each such element, that of its children included.
        rows: Text of the cells of each row of each table.
        events: Names of attributes that could run a script.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts, self.rows, self.events = [], [], {}, [], []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href", "action", "data")]
        self.events += [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self._open.append((tag, []))
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        last, pieces = self._open.pop()
        assert last == tag, f"</{tag}> closes <{last}>"
        # A browser drops the first line feed of a pre.
        text = "".join(pieces)
        text = text.removeprefix("\n") if tag == "pre" else text
        self.texts.setdefault(tag, []).append(text)
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join(text.split()))

    def handle_data(self, data):
        for _, pieces in self._open:
            pieces.append(data)
