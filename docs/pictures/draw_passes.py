"""Draws the passes over memory of each operation, with torch's kernels above those of bnres.

``python docs/pictures/draw_passes.py`` writes an SVG for each operation beside this file.
"""

from pathlib import Path

# For each picture and row, the kernels as (name, tensors that the kernel reads and writes). Each
# tensor is one pass. y is the batch norm's output, s is the sum, and z is the activation's output.
# ¼ is the max-pool's output or its gradient, which has a quarter of the elements of x.
STATS, APPLY = ("statistics", "read x"), ("normalise", "read x, write y")
DRAWINGS = {
    "bn-act": {
        "torch, forward": [STATS, APPLY, ("activation", "read y, write z")],
        "bnres, forward": [STATS, ("normalise, activation", "read x, write z")],
        "torch, backward": [
            ("activation", "read dz, z, write dy"),
            ("sums", "read dy, x"),
            ("dx", "read dy, x, write dx"),
        ],
        "bnres, backward": [("sums", "read dz, x"), ("dx", "read dz, x, write dx")],
    },
    "bn-add-act": {
        "torch, forward": [
            STATS, APPLY, ("addition", "read y, r, write s"), ("activation", "read s, write z"),
        ],
        "bnres, forward": [STATS, ("normalise, add, activation", "read x, r, write z")],
        "torch, backward": [
            ("activation", "read dz, z, write dr"),
            ("sums", "read dr, x"),
            ("dx", "read dr, x, write dx"),
        ],
        "bnres, backward": [("sums", "read dz, x"), ("dx, dr", "read dz, x, write dx, dr")],
    },
    "two-norms": {
        "torch, forward": [
            STATS, APPLY, ("statistics", "read r"), ("normalise", "read r, write t"),
            ("addition", "read y, t, write s"), ("activation", "read s, write z"),
        ],
        "bnres, forward": [
            STATS, ("statistics", "read r"), ("normalise both, activation", "read x, r, write z"),
        ],
        "torch, backward": [
            ("activation", "read dz, z, write ds"),
            ("sums", "read ds, x"), ("dx", "read ds, x, write dx"),
            ("sums", "read ds, r"), ("dr", "read ds, r, write dr"),
        ],
        "bnres, backward": [
            ("sums of both", "read dz, x, r"), ("dx, dr", "read dz, x, r, write dx, dr"),
        ],
    },
    "bn-act-pool": {
        "torch, forward": [
            STATS, APPLY, ("activation", "read y, write z"), ("max-pool", "read z, write ¼"),
        ],
        "bnres, forward": [STATS, ("normalise, activation, max-pool", "read x, write ¼")],
        "torch, backward": [
            ("max-pool", "read ¼, write dz"), ("activation", "read dz, z, write dy"),
            ("sums", "read dy, x"), ("dx", "read dy, x, write dx"),
        ],
        "bnres, backward": [
            ("sums", "read ¼, x at the maxima"), ("dx", "read ¼, x, write dx"),
        ],
    },
}  # fmt: skip
WIDTH, HEIGHT, GAP, LEFT, COLUMNS = 200, 44, 12, 120, 4
COLORS = {"torch": "#999999", "bnres": "#0072B2"}


def draw(rows: dict[str, list[tuple[str, str]]]) -> str:
    """Returns the SVG of one operation. Long rows are wrapped."""
    parts, y = [], GAP
    for title, kernels in rows.items():
        parts.append(f'<text x="4" y="{y + HEIGHT / 2 + 4}">{title}</text>')
        for j, (name, passes) in enumerate(kernels):
            x, top = LEFT + j % COLUMNS * (WIDTH + GAP), y + j // COLUMNS * (HEIGHT + GAP)
            text = f'<text x="{x + WIDTH / 2}" text-anchor="middle"'
            parts += [
                f'<rect x="{x}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="none" '
                f'stroke="{COLORS[title.split(",")[0]]}" stroke-width="2"/>',
                f'{text} y="{top + 18}">{name}</text>',
                f'{text} y="{top + 35}" class="passes">{passes}</text>',
            ]
        y += -(-len(kernels) // COLUMNS) * (HEIGHT + GAP)
    width = LEFT + COLUMNS * (WIDTH + GAP)
    style = "text{font:13px sans-serif;fill:#222}.passes{font-size:12px;fill:#555}"
    lines = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}">'
        f"<style>{style}</style>\n<rect width='100%' height='100%' fill='#fff'/>\n{lines}\n</svg>\n"
    )


if __name__ == "__main__":
    for name, rows in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(rows), encoding="utf-8")
