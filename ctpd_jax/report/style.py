"""The style sheet of report.html: quiet, readable on paper, light and dark by the reader's own preference."""

STYLE = """
:root { --back: #fdfdfb; --ink: #22252a; --soft: #6d727a; --line: #e3e3de; --card: #f5f5f1;
  --c1: #2f6f8f; --c2: #c0703a; --c3: #5b8a4a; --hot: 232 125 44; --cold: 58 134 168; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --ink: #dcdedf; --soft: #8d939b; --line: #2e3237; --card: #1d2024;
    --c1: #6db3d3; --c2: #e0985f; --c3: #8fbf7c; --hot: 236 132 54; --cold: 62 148 188; } }
* { box-sizing: border-box; }
html { background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
body { margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
header p { margin: 0; color: var(--soft); }
h1 { margin: 0; font-size: 2rem; font-weight: 600; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 .25rem; font-size: 1.25rem; font-weight: 600; }
h3 { margin: 2rem 0 .5rem; font-size: 1rem; font-weight: 600; }
small, .note, .legend { color: var(--soft); font-weight: 400; }
small { font-size: .8em; }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
table + .note, .scroll + .note { margin-top: .6rem; }
.note { margin: 0 0 1rem; max-width: 46rem; font-size: .9rem; }
.key { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin: 1.5rem 0; }
.key dt { color: var(--soft); font-size: .85rem; }
.key dd { margin: 0; font-size: 1.6rem; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .4rem 2rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 400; white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; }
.figures td { white-space: nowrap; }
.figures td b { font-weight: 600; }
.spans td, .spans th { padding-right: 1.2rem; overflow-wrap: anywhere; }
.none { color: var(--soft); opacity: .6; }
code { font: .85em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.spans code { display: inline-block; margin: 0 .25rem .15rem 0; padding: 0 .3rem; border: 1px solid var(--line);
  border-radius: 3px; background: var(--card); white-space: pre-wrap; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 9.5px; font-variant-numeric: tabular-nums; }
svg.interval { width: 120px; margin-top: .2rem; }
svg line { stroke: var(--line); stroke-width: 1; }
svg .half { stroke: var(--soft); }
svg .level { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .interval .level { stroke-dasharray: 2 2; }
svg .range { stroke: var(--c1); stroke-width: 3; opacity: .45; stroke-linecap: round; }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.curve1 { stroke: var(--c1); } .curve2 { stroke: var(--c2); } .curve3 { stroke: var(--c3); }
.dot1 { fill: var(--c1); } .dot2 { fill: var(--c2); } .dot3 { fill: var(--c3); }
.key1 { color: var(--c1); } .key2 { color: var(--c2); } .key3 { color: var(--c3); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.25rem 1.5rem; }
figure { margin: 0; max-width: 21rem; display: flex; flex-direction: column; justify-content: space-between; }
figcaption { font-size: .8rem; line-height: 1.35; margin-bottom: .25rem; }
figcaption b { font-weight: 500; display: block; }
.keys { font-variant-numeric: tabular-nums; } .keys span { margin-right: .6rem; white-space: nowrap; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 1.5rem 0 .75rem; padding-left: .9rem;
  border-left: 2px solid var(--line); }
.said b { color: var(--soft); font-weight: 500; margin-right: .5rem; }
.heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2.05; margin: 0 0 .5rem; }
.s { padding: .18em 0; border-radius: 3px; box-shadow: inset 0 0 0 1px rgb(128 128 128 / .28); unicode-bidi: isolate; }
.s:hover { box-shadow: inset 0 0 0 1.5px var(--ink); }
.many { border-bottom: 2px dotted var(--soft); }
.legend { font-size: .85rem; }
.strip { display: inline-block; width: 8rem; height: .7rem; margin-right: .5rem; border-radius: 3px;
  background: linear-gradient(90deg, rgb(var(--cold) / .62), transparent 50%, rgb(var(--hot) / .62)); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1px;
  background: var(--line); border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.cards div { background: var(--back); padding: .7rem .9rem; }
.cards h4 { margin: 0 0 .3rem; font-size: .8rem; font-weight: 500; color: var(--soft); }
.cards p { margin: 0; font-size: .92rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.cards p + p { margin-top: .5rem; padding-top: .5rem; border-top: 1px dotted var(--line); }
details summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
details[open] summary { margin-bottom: .75rem; }
pre { overflow-x: auto; padding: 1rem; border-radius: 6px; background: var(--card); margin: 0;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid-page; } }
"""
