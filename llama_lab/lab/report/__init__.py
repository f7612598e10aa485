"""A report: one page that answers which config is better, and shows what the answer rests on.

    words -> material (runs, arms, the study that `compare` makes of them) -> sections of blocks -> HTML, Markdown, a picture

    material.py  what the report is about      sections.py  what it says, in blocks
    series.py    curves of arms, thinned       chart.py     curves as SVG and HTML      parallel.py  a sweep's points as lines
    page.py      blocks as HTML                markdown.py  blocks as Markdown          picture.py   curves as PNG

Verdicts, intervals and refusals are those of `llama-lab compare`; nothing is tested here a second time. The same runs give the same
bytes: there is no time of day in them, and nothing of where the files lie.
"""
