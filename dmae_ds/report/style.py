"""How the page looks: the colours of figures.py, light or dark as the reader's device says, and one column on a phone."""

from __future__ import annotations

from dmae_ds.report.figures import COLOURS


def style() -> str:
    """The page's CSS."""
    light, dark = (
        "".join(f"{variable}:{pair[side]};" for variable, pair in COLOURS.items()) for side in (0, 1)
    )
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}"


_STYLE = """
body{margin:0 auto;max-width:76rem;padding:1.5rem clamp(.9rem,3vw,2.5rem) 3rem;background:var(--surface);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header p,footer,.note,small{color:var(--soft);font-size:.85rem} header p{margin:0}
h1{margin:0 0 1.2rem;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere} h2{margin:3rem 0 .2rem;font-size:1.25rem}
h3{margin:0 0 .5rem;font-size:1rem;overflow-wrap:anywhere} h3 small{display:inline;font-weight:400;margin-left:.6em}
i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
.note{margin:.2rem 0 1rem;max-width:60rem} .missing{margin:.2rem 0;color:var(--soft)}
.alarm{border-left:4px solid var(--alarm);padding:.2rem 0 .2rem .8rem;max-width:60rem;overflow-wrap:anywhere} .alarm b{color:var(--alarm)}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.45rem 1.6rem .45rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th[scope=row]{color:var(--soft);font-weight:400;min-width:7rem;max-width:14rem} td{min-width:8rem;max-width:24rem;overflow-wrap:anywhere}
thead th{overflow-wrap:anywhere}
tbody tr:first-child td{font-size:1.7rem;font-weight:600;line-height:1.3} small{display:block;font-weight:400;line-height:1.4}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1.5rem 2.5rem} figure{margin:0}
svg{display:block;width:100%;height:auto} svg text{font-family:inherit!important}
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(29rem,100%),1fr));gap:2rem 3rem} .run{min-width:0;max-width:44rem} .run .charts{grid-template-columns:1fr}
.board{display:grid;grid-template-columns:5.4rem repeat(var(--columns),minmax(0,1fr));gap:.35rem;align-items:center;max-width:44rem}
.board span{color:var(--soft);font-size:.85rem;line-height:1.2} .board b{font-weight:400;font-size:.8rem;line-height:1.2;color:var(--soft);align-self:end}
.board img{width:100%;aspect-ratio:1;image-rendering:pixelated} footer{margin-top:3rem}
@media(max-width:40rem){th,td{padding-right:.7rem} td{min-width:6.6rem} th[scope=row]{min-width:0;width:5.2rem;font-size:.85rem}
 tbody tr:first-child td{font-size:1.2rem}
 .board{grid-template-columns:repeat(var(--columns),minmax(0,1fr))} .board span{grid-column:1/-1;margin-top:.4rem} .board span:empty{display:none}}
"""
