"""The style sheet of the report page. Every colour is a variable; dark mode and print set them anew."""

STYLE = """\
:root {
  --paper: #ffffff; --wash: #f6f4f1; --ink: #1c1e21; --muted: #62666d; --line: #e2dfda; --accent: #a8501f;
  --good: #2c6e49; --bad: #a4262c;
  --s1: #a8501f; --s2: #1f6f8b; --s3: #5b7a2a; --s4: #7b4b94; --s5: #b8862b; --s6: #3d5a99; --s7:
  #a33b62; --s8: #5a6470;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --wash: #1f2226; --ink: #e9e7e3; --muted: #a2a5ab; --line: #34383d; --accent: #e39563;
    --good: #7cc79b; --bad: #f08a87;
    --s1: #e39563; --s2: #63b4cf; --s3: #a5c46b; --s4: #c39adb; --s5: #e3bd6c; --s6: #8fabe8; --s7:
    #e88aab; --s8: #aab2bd;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 64px; }
h1, h2, h3, p, li, dd, figcaption { overflow-wrap: anywhere; }
header { border-bottom: 1px solid var(--line); padding-bottom: 20px; }
.kicker { margin: 0; color: var(--accent); font-size: 13px; font-weight: 600; }
h1 { margin: 4px 0 8px; font-size: 28px; line-height: 1.2; font-weight: 650; text-wrap: balance; }
.facts { margin: 0; color: var(--muted); }
.facts b { color: var(--ink); font-weight: 600; }
.facts span { margin: 0 4px; color: var(--line); }
section { margin-top: 40px; }
h2 { margin: 0 0 12px; font-size: 17px; font-weight: 650; }
h3 { margin: 20px 0 8px; font-size: 15px; font-weight: 600; }
.small, small { color: var(--muted); font-size: 12.5px; }
.small { margin: 8px 0 0; }
.name { display: block; max-width: 24ch; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }

.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.family, .plain { width: 100%; }
.family th, .family td, .plain th, .plain td { padding: 9px 10px; text-align: right; white-space: nowrap; }
.family tbody tr, .plain tbody tr { border-top: 1px solid var(--line); }
.family thead th, .plain thead th {
  color: var(--muted); font-size: 13px; font-weight: 500; padding-block: 6px;
}
.family th:first-child, .plain th:first-child, .plain td:first-child, .plain .words { text-align: left; }
.family th:first-child {
  position: sticky; left: 0; background: var(--paper); padding-left: 0; font-weight: 600;
}
.family td { vertical-align: top; }
.family td small, .family th small { display: block; font-weight: 400; }
.family th small .name { max-width: 28ch; }
.family .best { font-weight: 700; }
.family .ensemble { background: var(--wash); }
.family .ensemble th:first-child { background: var(--wash); padding-left: 8px; }
.family .base td { color: var(--muted); }
.plain .words { white-space: normal; overflow-wrap: anywhere; min-width: 8ch; }
.bar {
  display: inline-block; width: 56px; height: 7px; margin-right: 8px; background: var(--line);
  border-radius: 2px; vertical-align: 1px;
}
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 2px; }

.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 32px;
}
.plot { margin: 0; min-width: 0; max-width: 660px; }
.plot figcaption { margin-bottom: 8px; font-weight: 600; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible; }
.plot svg text { font-family: var(--sans) !important; }
.plot svg * { stroke-linejoin: round; }
.picture img {
  max-width: 100%; min-width: min(100%, 256px); height: auto; image-rendering: pixelated;
  border: 1px solid var(--line);
}
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0 0; padding: 0; list-style: none;
  font-size: 13px;
}
.legend li { display: flex; align-items: center; gap: 6px; min-width: 0; }
.legend i { flex: none; width: 18px; border-top: 2.5px solid; border-width: 2.5px 0 0; }
.heat th, .heat td { padding: 9px 10px; font-size: 13px; font-weight: 500; text-align: center; }
.heat tbody th { text-align: left; padding-left: 0; color: var(--muted); }
.heat thead th { color: var(--muted); }
.heat tbody td {
  background: color-mix(in srgb, var(--accent) var(--heat), var(--paper)); border: 2px solid
  var(--paper); min-width: 58px;
}
.heat .name { max-width: 14ch; margin-inline: auto; }
.heat tbody .name { margin: 0; }

.facts-grid {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 200px), 1fr)); gap: 16px
  24px; margin: 0;
}
.facts-grid dt { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.facts-grid dd { margin: 0; font-weight: 550; font-variant-numeric: tabular-nums; }
.claims { margin: 0; padding: 0; list-style: none; }
.claims li { display: flex; gap: 16px; padding: 12px 0; border-top: 1px solid var(--line); }
.claims b { flex: none; width: 116px; font-weight: 650; }
.claims .holds b { color: var(--good); }
.claims .fails b { color: var(--bad); }
.claims div { min-width: 0; }
.claims small { display: block; font-variant-numeric: tabular-nums; }
pre {
  margin: 0; padding: 14px 16px; background: var(--wash); border-radius: 6px; font: 13.5px/1.5
  var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; user-select: all;
}
.notes { margin: 0; padding-left: 18px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

@media (max-width: 600px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 23px; }
  .name, .family th small .name { max-width: 16ch; }
  .claims li { display: block; }
}
@media print {
  :root {
    --paper: #ffffff; --wash: #f6f4f1; --ink: #000000; --muted: #444444; --line: #cccccc; --accent:
    #a8501f; --good: #2c6e49; --bad: #a4262c;
    --s1: #a8501f; --s2: #1f6f8b; --s3: #5b7a2a; --s4: #7b4b94; --s5: #b8862b; --s6: #3d5a99; --s7:
    #a33b62; --s8: #5a6470;
  }
  @page { margin: 14mm; }
  body { font-size: 10.5pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .family { font-size: 8.5pt; }
  .family th, .family td { padding: 5px 4px; }
  .bar { width: 32px; }
  .scroll { overflow: visible; }
  .figures { grid-template-columns: 1fr 1fr; gap: 20px; }
  figure, .claims li, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
