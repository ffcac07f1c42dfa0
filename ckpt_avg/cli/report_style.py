"""The style of a report as a page: light, dark, narrow, printed. The colours are those of Okabe and Ito."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --box: #f6f7f9; --text: #1b1f24; --soft: #57606a; --rule: #d0d7de; --grid: #e4e8ec;
  --blue: #0072b2; --orange: #c47600; --red: #c44e00; --green: #00805f; --grey: #6b7480;
  --good: #00664b; --bad: #a33c00; --link: #005a8f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --box: #1d2127; --text: #e8ebee; --soft: #a4adb7; --rule: #3a424b; --grid: #2b3138;
    --blue: #56b4e9; --orange: #e69f00; --red: #ff8a4c; --green: #2fc79b; --grey: #98a2ad;
    --good: #3fd1a7; --bad: #ff9a63; --link: #7cc4f0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 4px; }
p { margin: 6px 0 12px; }
.soft, figcaption { color: var(--soft); }
figcaption strong { color: var(--text); display: block; font-size: 1rem; }
figcaption { font-size: 0.875rem; margin-bottom: 8px; }
code, .words { font: 0.875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.words { display: block; background: var(--box); padding: 10px 12px; border-radius: 6px; white-space: pre-wrap; }
.answers {
  display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr));
  margin: 20px 0 8px;
}
.answer {
  background: var(--box); border: 1px solid var(--rule); border-left: 6px solid var(--grey);
  border-radius: 8px; padding: 14px 16px;
}
.answer.good { border-left-color: var(--green); }
.answer.bad { border-left-color: var(--red); }
.answer h2 { all: unset; display: block; font-size: 0.875rem; color: var(--soft); }
.answer .verdict { font-size: 1.35rem; font-weight: 650; line-height: 1.3; margin: 2px 0 6px; }
.answer.good .verdict, .met { color: var(--good); }
.answer.bad .verdict, .unmet { color: var(--bad); }
.answer p, .answer ul { margin: 4px 0; font-size: 0.9375rem; }
.met, .unmet { font-weight: 650; }
ul { padding-left: 20px; }
.charts {
  display: grid; gap: 22px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr));
  align-items: start;
}
.charts > * { min-width: 0; max-width: 560px; }
@media (min-width: 900px) { .charts.beside { grid-template-columns: 2fr 3fr; } .charts.beside > * { max-width: none; } }
figure { margin: 0 0 14px; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.8125rem; color: var(--soft); margin-top: 4px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.key { width: 24px; height: 14px; flex: none; }
svg text { fill: var(--soft); font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg text { paint-order: stroke; stroke: var(--page); stroke-width: 3px; stroke-linejoin: round; }
svg .name { fill: var(--text); }
svg .value { fill: var(--text); font-variant-numeric: tabular-nums; }
svg .axis { font-size: 12px; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .frame { fill: none; stroke: var(--rule); }
svg .unknown { fill: none; }
svg .blue { fill: var(--blue); }
svg .orange { fill: var(--orange); }
svg .red { fill: var(--red); }
svg .green { fill: var(--green); }
svg .grey { fill: var(--grey); }
svg line.blue, svg polyline.blue, svg .hollow.blue { stroke: var(--blue); }
svg line.orange, svg polyline.orange, svg .hollow.orange { stroke: var(--orange); }
svg line.red, svg polyline.red, svg .cross.red, svg .hollow.red, svg line.limit { stroke: var(--red); }
svg line.green, svg polyline.green, svg .hollow.green { stroke: var(--green); }
svg line.grey, svg polyline.grey, svg .hollow.grey { stroke: var(--grey); }
svg .star, svg .dot { stroke: var(--page); stroke-width: 1; }
svg .hollow { fill: var(--page); stroke-width: 1.6; }
svg .cross { fill: none; stroke-width: 2.6; }
svg line.limit { stroke-width: 2; }
svg .faint { fill-opacity: 0.35; }
svg .tick { stroke-width: 1.4; stroke-opacity: 0.7; }
svg .solid, svg .dashed { fill: none; stroke-width: 1.6; }
svg .dashed { stroke-dasharray: 5 4; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; margin: 0 0 18px; max-width: 100%; }
.scroll.long { max-height: 26rem; overflow-y: auto; }
.scroll:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; overflow-wrap: normal; }
caption { text-align: left; padding: 8px 12px; color: var(--soft); caption-side: top; }
th, td {
  padding: 6px 12px; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top;
  white-space: nowrap;
}
td.text, th.text { white-space: normal; min-width: 11rem; max-width: 34rem; overflow-wrap: anywhere; }
thead th { background: var(--box); position: sticky; top: 0; font-weight: 650; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; white-space: normal; min-width: 7rem; max-width: 26rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.best > * { color: var(--good); font-weight: 650; }
tr.far > * { color: var(--bad); font-weight: 650; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: 6px 18px; margin: 0 0 16px; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; margin: 0; padding: 0; font-size: 0.9375rem; }
footer { color: var(--soft); font-size: 0.875rem; margin-top: 40px; padding-bottom: 32px; }
@media (max-width: 500px) {
  main, header, footer { padding: 0 14px; }
  header { padding-top: 18px; }
  h1 { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print {
  :root {
    --page: #ffffff; --box: #ffffff; --text: #000000; --soft: #444444; --rule: #999999; --grid: #dddddd;
    --blue: #0072b2; --orange: #c47600; --red: #c44e00; --green: #00805f;
    --grey: #666666; --good: #00664b; --bad: #a33c00;
  }
  body { font-size: 10.5pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main, header, footer { max-width: none; padding: 0; }
  nav { display: none; }
  h2, caption, thead { break-after: avoid; }
  h2 { margin-top: 24px; }
  tr, .answer { break-inside: avoid; }
  .answers { grid-template-columns: repeat(3, 1fr); }
  .charts { grid-template-columns: repeat(2, 1fr); }
  .charts.beside { grid-template-columns: 1fr; }
  .charts.beside figure { max-width: 60%; }
  td.text, th.text, tbody th { min-width: 0; overflow-wrap: anywhere; }
  .scroll, .scroll.long { overflow: visible; max-height: none; border: 0; }
  thead th { position: static; }
  th, td { padding: 3px 6px; white-space: normal; }
  table { font-size: 8.5pt; }
}
"""
