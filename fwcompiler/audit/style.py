"""The style of the audit's page: light and dark by the reader's choice, and fit for paper."""

STYLE = """:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5b6675; --line: #dde2e9;
  --error: #b42318; --error-bg: #fdecea; --warning: #8a5a00; --warning-bg: #fff4d6; --note: #215a9c; --note-bg: #e8f1fc;
  --good: #19703f; --good-bg: #e6f5ec; --public: #c2571a; --restricted: #2f6db5; --asterisk: #7a4bb0; --local: #8b95a3; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12161c; --card: #1a2029; --ink: #e4e9f0; --soft: #98a4b3; --line: #303947;
  --error: #ff8a80; --error-bg: #3a1d1b; --warning: #f5c04d; --warning-bg: #382c10; --note: #86b8f2; --note-bg: #16283f;
  --good: #6fd49a; --good-bg: #14301f; --public: #f0904f; --restricted: #6fa8ea; --asterisk: #b794e6; --local: #7b8796; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 12px; }
p { margin: 0 0 6px; }
.sub, .legend, .none, footer { color: var(--soft); }
.verdict { display: inline-block; margin: 14px 0 4px; padding: 7px 14px; border-radius: 8px; font-weight: 600; }
.verdict.error { background: var(--error-bg); color: var(--error); } .verdict.warning { background: var(--warning-bg);
  color: var(--warning); }
.verdict.note { background: var(--note-bg); color: var(--note); } .verdict.good { background: var(--good-bg); color: var(--good); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin: 18px 0 0; }
.tiles { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 0;
  padding: 0; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }
.tiles b { display: block; font-size: 24px; line-height: 1.25; white-space: nowrap; } .tiles span { color: var(--soft); font-size: 13px; }
.tiles .error b { color: var(--error); } .tiles .warning b { color: var(--warning); } .tiles .good b { color: var(--good); }
.findings { list-style: none; margin: 0; padding: 0; }
.findings li { border-left: 4px solid var(--line); padding: 2px 0 1px 14px; margin: 0 0 16px; break-inside: avoid; }
.findings .error { border-color: var(--error); } .findings .warning { border-color: var(--warning); }
  .findings .note { border-color: var(--note); }
.pill { display: inline-block; min-width: 64px; text-align: center; font-size: 12px; font-weight: 600; padding: 1px 8px;
  border-radius: 10px; margin-right: 6px; }
.error .pill { background: var(--error-bg); color: var(--error); } .warning .pill { background: var(--warning-bg);
  color: var(--warning); }
.note .pill { background: var(--note-bg); color: var(--note); }
code, pre, .where, .date { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
.where { color: var(--soft); overflow-wrap: anywhere; } .remedy b { color: var(--good); font-weight: 600; margin-right: 4px; }
.where { display: flex; gap: 16px; justify-content: space-between; }
.where span:last-child { white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: 7px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { font-size: 13px; border-bottom-width: 2px; } th small { display: block; color: var(--soft); font-weight: 400;
  font-size: 12px; }
tbody th { font-weight: 600; } tr { break-inside: avoid; }
.matrix th:not(:first-child), .matrix td { text-align: center; } .matrix .open { color: var(--public); }
.matrix td { font-size: 17px; line-height: 1.4; } .matrix td.all { color: var(--restricted); } .matrix td.some { color: var(--warning); }
.matrix td.none { color: var(--line); } .everybody { background: var(--paper); } .everybody td.all { color: var(--public); }
td.error { color: var(--error); } td.warning { color: var(--warning); } p.error { color: var(--error); } p.good { color: var(--good); }
.meter { display: inline-block; width: 90px; height: 7px; border-radius: 4px; background: var(--line); margin-left: 8px;
  vertical-align: middle; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--good); } .meter.warning i { background: var(--warning); }
  .meter.error i { background: var(--error); }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; margin: 6px 0 0; }
svg { width: 100%; height: auto; display: block; min-width: 720px; } svg text { fill: var(--ink); font-size: 12px; }
  svg .soft { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } svg .lead { stroke: var(--soft); fill: none; stroke-width: .8; } svg .inside { fill: #fff;
  font-weight: 600; }
svg .public { fill: var(--public); } svg .restricted { fill: var(--restricted); } svg .asterisk { fill: var(--asterisk); }
  svg .local { fill: var(--local); }
footer { margin-top: 22px; font-size: 13px; }
@media (prefers-color-scheme: dark) { svg .inside { fill: #12161c; } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --error: #a00; --warning: #7a4f00;
  --note: #134a8a; --good: #0b5c2f;
  --error-bg: #fff; --warning-bg: #fff; --note-bg: #fff; --good-bg: #fff; --public: #b34a10; --restricted: #24609f;
  --asterisk: #68399e; --local: #777; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; } section, .tiles li { border-radius: 0; } svg { min-width: 0; }
  svg .inside { fill: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } h2 { break-after: avoid; } .wide { overflow: visible; } }
"""
