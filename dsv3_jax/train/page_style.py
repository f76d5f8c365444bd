"""The style sheet of a run's page: light and dark, screen, phone and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #f6f7f9; --card: #ffffff; --ink: #1a1c20; --muted: #5a5f68; --grid: #e8eaed;
  --edge: #b4b8bf; --good: #00704f; --bad: #b3261e; --warn: #8a5a00;
  --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #cc79a7; --c5: #d08f00;
  --c6: #56b4e9; --c7: #7a4fbf; --c8: #8b5a2b; --c9: #6e6e6e;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --bg: #121418; --card: #1c1f25; --ink: #eceef2; --muted: #a4aab5; --grid: #2e323a;
    --edge: #5c626d; --good: #4fd1a5; --bad: #ff8a80; --warn: #f5c063;
    --c1: #4aa8e0; --c2: #ff8a3d; --c3: #2fc79a; --c4: #e6a3c8; --c5: #f5b942;
    --c6: #8fd0f5; --c7: #b494f0; --c8: #c99a6b; --c9: #a4aab5;
  }
  .maps img, .scale img { filter: brightness(.85); }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.2rem; max-width: 80rem; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .6rem; font-size: 1.1rem; }
h2 small, .note { color: var(--muted); font-weight: 400; font-size: .85rem; }
p { margin: .3rem 0; max-width: 75ch; }
.state { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.tiles, .pictures, .maps { display: grid; gap: .8rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(45%, 14rem), 1fr)); margin: 1rem 0; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.pictures.large { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.maps { grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); gap: .6rem; }
.tile, figure, .text { background: var(--card); border: 1px solid var(--grid);
  border-radius: .5rem; padding: .7rem .9rem; margin: 0; }
.tile dt { color: var(--muted); font-size: .85rem; }
.tile dd { margin: 0; font-size: 1.45rem; font-weight: 650; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tile dd + dd { font-size: .85rem; font-weight: 400; color: var(--muted); }
.bar { display: grid; grid-template-columns: 3rem 1fr; align-items: center; gap: .4rem; }
.bar i { display: block; height: .55rem; border-radius: .2rem; min-width: 1px; }
figcaption { font-weight: 600; font-size: .9rem; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figure svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .8rem; font-weight: 400; font-size: .8rem;
  color: var(--muted); }
.legend i { display: inline-block; width: .9em; height: .28em; margin-right: .35em;
  border-radius: 1px; vertical-align: middle; }
.maps .note { display: block; }
.maps figure { padding: .4rem .5rem; }
.maps img { display: block; width: 100%; height: 6.5rem; image-rendering: pixelated; }
.scale { display: flex; align-items: center; gap: .5rem; margin: .3rem 0 .6rem; flex-wrap: wrap; }
.scale img { width: 8rem; height: .7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem;
  line-height: 1.4; unicode-bidi: isolate; font-family: ui-monospace, Menlo, Consolas, monospace; }
.text { margin-bottom: .6rem; }
summary { cursor: pointer; color: var(--muted); }
a { color: var(--c1); }
footer { margin-top: 2rem; color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
@media print {
  :root { --bg: #fff; --card: #fff; --ink: #000; --muted: #444; --grid: #ddd; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, .tile { break-inside: avoid; }
  h2 { break-after: avoid; }
  .pictures { grid-template-columns: repeat(4, 1fr); }
  .pictures.large { grid-template-columns: repeat(2, 1fr); }
}
"""
