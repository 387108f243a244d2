"""Blocks of text, tables and figures, rendered as one self-contained page of HTML and as Markdown."""

import base64
import html

from mamba2.study import figures


class Page:
    """Blocks in order."""

    def __init__(self) -> None:
        self._blocks: list[tuple] = []
        self.figures: dict[str, bytes] = {}

    def heading(self, text: str, level: int = 2) -> None:
        self._blocks.append(("heading", text, level))

    def text(self, text: str) -> None:
        self._blocks.append(("text", text))

    def items(self, texts: list[str]) -> None:
        self._blocks.append(("items", texts))

    def table(self, header: list[str], rows: list[list[str]], note: str = "") -> None:
        self._blocks.append(("table", header, rows, note))

    def figure(self, name: str, figure, shows: str, source: str) -> None:
        self.figures[name] = figures.png(figure)
        self._blocks.append(("figure", name, shows, source))

    def markdown(self) -> str:
        parts = []
        for kind, *block in self._blocks:
            if kind == "heading":
                parts.append(f"{'#' * block[1]} {block[0]}")
            elif kind == "text":
                parts.append(block[0])
            elif kind == "items":
                parts.append("\n".join(f"- {text}" for text in block[0]))
            elif kind == "table":
                header, rows, note = block
                lines = [header, ["---"] * len(header), *rows]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + (f"\n\n{note}" if note else ""))
            else:
                name, shows, source = block
                parts.append(f"![{name}](figures/{name}.png)\n\n{shows} From {source}.")
        return "\n\n".join(parts) + "\n"

    def html(self, title: str) -> str:
        e, parts = html.escape, []
        for kind, *block in self._blocks:
            if kind == "heading":
                parts.append(f"<h{block[1]}>{e(block[0])}</h{block[1]}>")
            elif kind == "text":
                parts.append(f"<p>{e(block[0])}</p>")
            elif kind == "items":
                parts.append("<ul>" + "".join(f"<li>{e(text)}</li>" for text in block[0]) + "</ul>")
            elif kind == "table":
                header, rows, note = block
                head = "".join(f"<th>{e(cell)}</th>" for cell in header)
                body = "".join("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
                parts.append(f"<table><tr>{head}</tr>{body}</table>" + (f"<p class=note>{e(note)}</p>" if note else ""))
            else:
                name, shows, source = block
                data = base64.b64encode(self.figures[name]).decode()
                caption = f"<figcaption>{e(shows)} <span class=note>From {e(source)}.</span></figcaption>"
                image = f'<img alt="{e(name)}" src="data:image/png;base64,{data}">'
                parts.append(f"<figure>{image}{caption}</figure>")
        head = f'<meta charset="utf-8"><title>{e(title)}</title><style>{STYLE}</style>'
        return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: right } td:first-child, th:first-child { text-align: left }
td:not(:first-child) { white-space: nowrap } td:first-child { overflow-wrap: anywhere; min-width: 9em }
table { display: block; overflow-x: auto } p, li, figcaption { overflow-wrap: anywhere } figure { margin: 1.5em 0 } img { max-width: 100% } figcaption { max-width: 60em } .note { color: #666; font-size: 13px }
"""  # noqa: E501
