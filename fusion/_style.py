"""The style sheet of a report: two colours that make a third, type that stays legible from a phone to paper.

Blue is the target, orange the teachers, and what is fused of them is green; a baseline keeps to the target's side, in a
lighter blue. The hues are those of Okabe and Ito (2008), told apart under the common colour blindnesses.
"""

LIGHT = """--paper:#fcfbf8;--card:#ffffff;--ink:#1c1f24;--soft:#5d646e;--faint:#e7e4dd;--line:#d8d4ca;--track:#f1eee7;
--target:#0072b2;--teacher-0:#e69f00;--teacher-1:#b87a00;--teacher-2:#f0c04d;--baseline-0:#56b4e9;--baseline-1:#8aa9c9;
--fused-0:#009e73;--fused-1:#d55e00;--fused-2:#cc79a7;--fused-3:#6a5acd;--other:#9aa0a8;--up:#00795a;--down:#b84a00;
--heat:#0b6e99;--cold:#c2570c;"""

DARK = """--paper:#14171b;--card:#1a1e23;--ink:#e9e7e2;--soft:#a0a7b1;--faint:#2a2f36;--line:#383e47;--track:#22272d;
--target:#3f9fdc;--teacher-0:#efb035;--teacher-1:#c88e1e;--teacher-2:#f7d57e;--baseline-0:#8fcdf2;--baseline-1:#9fb6cc;
--fused-0:#23bd90;--fused-1:#ee8140;--fused-2:#dd97bd;--fused-3:#9c90ee;--other:#868d97;--up:#35cfa2;--down:#f29559;
--heat:#5bb8e6;--cold:#f08a4b;"""

CSS = (
    f":root{{color-scheme:light dark;{LIGHT}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}\n"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:56px 28px 72px}
h1,h2,h3,p,figure{margin:0}
small{font-size:.8125em;color:var(--soft);font-weight:400}
.eyebrow{font-size:.8125rem;color:var(--soft);letter-spacing:.02em;margin-bottom:14px;overflow-wrap:anywhere}
.eyebrow b{color:var(--ink);font-weight:600}
h1{font:500 clamp(1.5rem,1.1rem + 2vw,2.3rem)/1.25 Charter,"Iowan Old Style","Palatino Linotype",Georgia,serif;
letter-spacing:-.01em;max-width:27em;text-wrap:pretty;overflow-wrap:anywhere}
.more{margin-top:14px;max-width:54em;color:var(--soft);text-wrap:pretty;overflow-wrap:anywhere}
.cast{display:flex;flex-wrap:wrap;align-items:stretch;gap:10px;margin-top:34px}
.pair{display:flex;gap:10px;min-width:0;max-width:100%}
.chip{border:1px solid var(--line);border-left:5px solid var(--c);background:var(--card);border-radius:6px;
padding:9px 15px 10px 13px;min-width:0;max-width:100%}
.chip b{display:block;font-weight:600;line-height:1.3;overflow-wrap:anywhere}
.chip span{display:block;font-size:.8125rem;color:var(--soft)}
.pair i{align-self:center;font-style:normal;color:var(--soft);font-size:1.25rem;padding:0 2px}
section{margin-top:58px;border-top:1px solid var(--line);padding-top:20px}
h2{font-size:1.1875rem;font-weight:650;letter-spacing:-.005em}
h2+p{color:var(--soft);font-size:.9063rem;max-width:58em;margin-top:3px;text-wrap:pretty}
h3{font-size:.9375rem;font-weight:600;margin:0 0 8px;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:34px 52px;margin-top:24px}
.grid>*{min-width:0}
.dot{display:inline-block;flex:none;width:.625rem;height:.625rem;border-radius:50%;background:var(--c);margin-right:.5rem}
.row{display:grid;grid-template-columns:minmax(5.5rem,9.5rem) minmax(0,1fr) 7.75rem;gap:14px;
align-items:center;padding:4px 0}
.row .name{display:flex;align-items:baseline;font-size:.875rem;line-height:1.25;overflow-wrap:anywhere;min-width:0}
.row .name span{min-width:0}
.row .value{font-size:.875rem;line-height:1.25;font-variant-numeric:tabular-nums;white-space:nowrap}
.row .value small{font-size:.75rem}
.row.strong .name,.row.strong .value{font-weight:650}
.row.faint{opacity:.72}
.group{font-size:.8125rem;color:var(--soft);padding:12px 0 2px;overflow-wrap:anywhere}
.group:first-child{padding-top:0}
svg{display:block;overflow:visible;width:100%}
svg.bar{height:18px;background:var(--track);border-radius:2px}
svg.bar rect{fill:var(--c)}
svg.bar .whisker{stroke:var(--ink);stroke-width:1.25;opacity:.75}
svg.span{height:20px}
svg.span .zero{stroke:var(--line);stroke-width:1.5}
svg.span .stem{stroke:var(--c);stroke-width:3;opacity:.35}
svg.span .error{stroke:var(--ink);stroke-width:1.25}
svg.span circle{fill:var(--c);stroke:var(--paper);stroke-width:1.5}
svg.span circle.hollow{fill:var(--paper);stroke:var(--c);stroke-width:2}
.ends{display:grid;grid-template-columns:1fr auto 1fr;gap:8px;font-size:.75rem;color:var(--soft);line-height:1.3}
.ends span:nth-child(2){text-align:center}.ends span:last-child{text-align:right}
.axis{padding-top:6px}
.times .row{grid-template-columns:minmax(5.5rem,13rem) minmax(0,1fr) 13rem}
.moves{columns:2 360px;column-gap:52px;margin-top:16px}
.moves .row{grid-template-columns:minmax(0,13rem) minmax(0,1fr) 4.25rem;padding:0;break-inside:avoid}
.moves .row .name{display:flex;align-items:baseline;font-size:.75rem}
.moves .row .value{font-size:.75rem;text-align:right}
.moves .up small{color:var(--up)}.moves .down small{color:var(--down)}
.chart figcaption{font-size:.9375rem;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:2px 20px;font-size:.8125rem;color:var(--soft);margin:4px 0 12px}
.legend>span{display:flex;align-items:baseline;gap:0;min-width:0;overflow-wrap:anywhere}
.legend b{margin-left:.45em;color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.plot{padding:6px 0 26px 46px}
.plot>svg{height:260px}
.plot text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.plot .grid{stroke:var(--faint);stroke-width:1}
.plot polyline{fill:none;stroke:var(--c);vector-effect:non-scaling-stroke;stroke-linejoin:round}
.plot .raw{stroke-width:1;opacity:.3}
.plot .course{stroke-width:2.25}
.plot .dashed{stroke-dasharray:7 4}
.plot svg svg{overflow:hidden}
.heat{margin-top:30px}
.heat .row{padding:1px 0;grid-template-columns:minmax(5.5rem,13rem) minmax(0,1fr) 4.5rem}
.heat .name,.heat .value{font-size:.8125rem}
.heat .value{text-align:right;color:var(--soft)}
svg.cells{height:20px;background:var(--track);border-radius:2px;overflow:hidden}
svg.cells rect{fill:var(--heat);stroke:var(--paper);stroke-width:1}
svg.cells rect.below{fill:var(--cold)}
svg.numbers{height:16px}svg.numbers text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.plans{display:grid;grid-template-columns:repeat(auto-fill,minmax(72px,1fr));gap:14px 12px;margin-top:12px}
.plans small{display:block;font-size:.6875rem;line-height:1.25;margin-top:3px;overflow-wrap:anywhere}
svg.plan{width:100%;aspect-ratio:1;background:var(--track);border-radius:2px}svg.plan path{fill:var(--heat)}
.scale{display:inline-block;width:7rem;height:.625rem;margin:0 .5rem;border-radius:2px;
background:linear-gradient(to right,var(--track),var(--heat))}
.scale.both{background:linear-gradient(to right,var(--cold),var(--track),var(--heat))}
.notes{margin:16px 0 0;padding:0;list-style:none;font-size:.9375rem;max-width:58em}
.notes li{padding:2px 0 2px 14px;border-left:3px solid var(--line);margin-top:6px;text-wrap:pretty;
overflow-wrap:anywhere}
.notes .warn{border-left-color:var(--down)}
.scroll{overflow-x:auto;margin-top:16px}
table{border-collapse:collapse;font-size:.8438rem;min-width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:6px 0 6px 22px;border-bottom:1px solid var(--faint);white-space:nowrap;
vertical-align:baseline}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere;min-width:8.5rem}
th{font-weight:600;white-space:normal;min-width:5.5rem;vertical-align:bottom;color:var(--soft);
border-bottom-color:var(--line)}
td b{font-weight:700}
td.text,th.text{text-align:left}
caption{text-align:left;font-weight:600;font-size:.9375rem;padding-bottom:4px}
pre{font:.8125rem/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--card);
border:1px solid var(--line);border-radius:6px;padding:16px 18px;overflow-x:auto;margin:14px 0 0;tab-size:4}
pre i{font-style:normal;color:var(--soft)}
code{font:.875em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
details{margin-top:22px}summary{cursor:pointer;font-size:.9375rem;font-weight:600}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:3px 20px;font-size:.8438rem;margin:16px 0 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:640px){
main{padding:30px 18px 48px}
section{margin-top:42px}
.row,.times .row{grid-template-columns:minmax(0,1fr) auto;gap:1px 10px;padding:6px 0}
.row .name{grid-area:1/1}.row .value{grid-area:1/2}.row svg,.row .ends{grid-area:2/1/3/3}
.moves .row{grid-template-columns:minmax(0,8.5rem) minmax(0,1fr) 4.25rem;gap:10px}
.heat .row{grid-template-columns:minmax(0,8.5rem) minmax(0,1fr) 3.5rem;gap:8px}
.moves .row .name,.moves .row .value,.moves .row svg,.heat .row .name,.heat .row .value,.heat .row svg{grid-area:auto}
.plot>svg{height:210px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}
}
@media print{
:root{--paper:#fff;--card:#fff}
body{font-size:10.5pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:none;padding:0}
section{margin-top:26px}
.row,.chart,.cast,tr,h2,h3,.notes li{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible}
th,td{padding-left:12px}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
}
"""
)
