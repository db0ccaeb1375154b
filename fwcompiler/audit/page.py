"""The audit as one page of HTML for people who do not read rules: no script, nothing loaded from elsewhere, everything escaped.

It prints well, and follows the reader's choice of light or dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from fwcompiler import __version__
from fwcompiler.audit.certificates import SOON, VERY_SOON
from fwcompiler.audit.findings import SEVERITIES, meaning
from fwcompiler.audit.style import STYLE
from fwcompiler.audit.svg import drawing

if TYPE_CHECKING:
    from fwcompiler.audit.audit import Audit
    from fwcompiler.audit.certificates import Shown
    from fwcompiler.audit.exposure import Column, Reach, Row
    from fwcompiler.audit.facts import Severity
    from fwcompiler.audit.findings import Issue

_CELL: dict[Reach, tuple[str, str]] = {"all": ("●", "yes"), "some": ("◐", "some"), "none": ("–", "no")}
_YEAR = 365
MOST_LINES = 40


def page(found: Audit) -> str:
    """The whole page."""
    title = f"Firewall audit of {found.host or found.name or found.facts.name}"
    body = "\n".join(
        (
            _head(found, title),
            _tiles(found),
            _section("Who reaches what", _matrix(found)),
            _section("Ports", drawing(found.plan)),
            _section("Findings", _findings(found.issues)),
            _section("Certificates", _certificates(found)),
            _section("Live rules", _drift(found)),
            _section("Not looked at", _list(found.left_out)) if found.left_out else "",
            f"<footer>Made by fwc {escape(__version__)} from {escape(found.path)}. The policy decides; this page only reports.</footer>",
        )
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _worst(found: Audit) -> Severity | None:
    return next((s for s in reversed(SEVERITIES) if found.count(s)), None)


_SENTENCES: dict[Severity | None, str] = {
    "error": "Something has to be done now.",
    "warning": "Nothing is broken, but some things should be put right.",
    "note": "In order. There are remarks.",
    None: "In order. Nothing was found.",
}


def _head(found: Audit, title: str) -> str:
    worst = _worst(found)
    when = f"{found.facts.now:%d %B %Y, %H:%M} UTC"
    sub = (*((found.name,) if found.host and found.name else ()), found.facts.name, when)
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n<p class=sub>{escape(' · '.join(sub))}</p>\n"
        f'<p class="verdict {worst or "good"}">{_SENTENCES[worst]}</p>\n</header>'
    )


def _tiles(found: Audit) -> str:
    drift = found.facts.drift
    rules = (
        ("unknown", "")
        if drift is None
        else ("in sync", "good")
        if drift.in_sync
        else ("not loaded", "error")
        if not drift.loaded
        else ("drifted", "error")
    )
    days = [s.certificate.days_left(found.facts.now) for s in found.certificates]
    soonest = ("–", "") if not days else (f"{min(days)} days", _urgency(min(days)))
    public = sum(column.public for column in found.matrix.columns)
    tiles = [
        (str(found.count("error")), "errors", "error" if found.count("error") else "good"),
        (str(found.count("warning")), "warnings", "warning" if found.count("warning") else "good"),
        (str(found.count("note")), "notes", ""),
        (rules[0], "live rules", rules[1]),
        (soonest[0], "next certificate", soonest[1]),
        (f"{public} of {len(found.matrix.columns)}", "services open to anywhere", ""),
    ]
    cells = "\n".join(f'<li class="{kind}"><b>{escape(value)}</b><span>{escape(label)}</span></li>' for value, label, kind in tiles)
    return f"<ul class=tiles>\n{cells}\n</ul>"


def _findings(issues: Sequence[Issue]) -> str:
    if not issues:
        return "<p class=none>None.</p>"
    return "<ol class=findings>\n" + "\n".join(map(_finding, issues)) + "\n</ol>"


def _finding(issue: Issue) -> str:
    places = [place for place in (issue.where, issue.place if issue.at else "") if place]
    where = escape(" · ".join(places))
    code = f'<span title="{escape(meaning(issue.code))}">{escape(issue.code)}</span>'
    remedy = f"<p class=remedy><b>Remedy</b> {_prose(issue.remedy)}</p>" if issue.remedy else ""
    return (
        f'<li class="{issue.severity}"><p><span class=pill>{issue.severity}</span> {_prose(issue.message)}</p>'
        f"<p class=where><span>{where}</span>{code}</p>{remedy}</li>"
    )


def _prose(text: str) -> str:
    """Escaped text; what stands between backticks is set as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 and i < len(parts) - 1 else part for i, part in enumerate(parts))


def _matrix(found: Audit) -> str:
    if not found.matrix.columns:
        return "<p class=none>The policy opens nothing.</p>"
    head = "".join(map(_column, found.matrix.columns))
    rows = "\n".join(map(_row, found.matrix.rows))
    legend = "● every address of the group · ◐ some of them · – none. Services with a coloured head are open to anywhere."
    return (
        f"<div class=wide><table class=matrix>\n<thead><tr><th scope=col>Who</th>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n<p class=legend>{legend}</p>{_exposed(found)}"
    )


def _column(column: Column) -> str:
    kind = ' class="open"' if column.public else ""
    return f"<th scope=col{kind}>{escape(column.label)}<small>{escape(', '.join(column.service.port_texts()))}</small></th>"


def _row(row: Row) -> str:
    cells = "".join(
        f'<td class="{cell}"><span title="{_CELL[cell][1]}" aria-label="{_CELL[cell][1]}">{_CELL[cell][0]}</span></td>'
        for cell in row.cells
    )
    kind = ' class="everybody"' if row.who == "anywhere" else ""
    return f"<tr{kind}><th scope=row>{escape(row.who)}<small>{escape(row.size)}</small></th>{cells}</tr>"


def _exposed(found: Audit) -> str:
    """Reasons for what is open though it is not public by nature."""
    reasons = [f"<b>{escape(c.label)}</b>: {escape(c.service.expose)}" for c in found.matrix.columns if c.service.expose and c.public]
    return f"<p>Open to anywhere for a reason: {'; '.join(reasons)}.</p>" if reasons else ""


def _urgency(days: int) -> str:
    return "error" if days <= VERY_SOON.days else "warning" if days <= SOON.days else "good"


def _certificates(found: Audit) -> str:
    if not found.certificates:
        return "<p class=none>None were read.</p>"
    rows = "\n".join(_certificate(each, each.certificate.days_left(found.facts.now)) for each in found.certificates)
    head = (
        "<th scope=col>Where</th><th scope=col>Names</th><th scope=col>Issued by</th><th scope=col>Expires</th><th scope=col>Days left</th>"
    )
    return f"<div class=wide><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"


def _certificate(shown: Shown, days: int) -> str:
    found = shown.certificate
    issuer = "itself" if found.self_signed else found.issuer
    percent = max(0, min(100, days * 100 // _YEAR))
    meter = f'<span class="meter {_urgency(days)}"><i style="width:{percent}%"></i></span>'
    names = ", ".join(found.names[:6]) or found.subject
    return (
        f"<tr><th scope=row>{escape(shown.place)}</th><td>{escape(names)}</td><td>{escape(issuer)}</td>"
        f'<td class=date>{found.not_after:%Y-%m-%d}</td><td class="{_urgency(days)}">{days} {meter}</td></tr>'
    )


def _drift(found: Audit) -> str:
    drift = found.facts.drift
    if drift is None:
        return "<p class=none>They could not be read.</p>"
    if drift.in_sync:
        return "<p class=good>The kernel holds exactly this policy.</p>"
    if not drift.loaded:
        return "<p class=error>No rules of this policy are loaded.</p>"
    access = f"<p>An apply would change who reaches what:</p>{_list(drift.access)}" if drift.access else ""
    return f"{access}<p>It would send to the kernel:</p>\n<pre>{chr(10).join(_lines(drift.changes))}</pre>"


def _lines(lines: Sequence[str]) -> Iterator[str]:
    yield from (escape(line) for line in lines[:MOST_LINES])
    if len(lines) > MOST_LINES:
        yield f"and {len(lines) - MOST_LINES} more lines"


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{line}</li>" for line in _lines(lines)) + "\n</ul>"
