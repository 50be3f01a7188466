"""Draws the README's picture of one training step: docs/pictures/step-light.svg and docs/pictures/step-dark.svg.

python docs/pictures/step.py
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 960, 366
LANES = (96, 270)
"""Height of each peer's middle."""

MIDDLE = sum(LANES) / 2
COLORS = {
    "light": {
        "ink": "#1f2328",
        "muted": "#59636e",
        "line": "#818b98",
        "box": "#f6f8fa",
        "tile": "#ffffff",
        "peers": ("#0969da", "#bc4c00"),
    },
    "dark": {
        "ink": "#e6edf3",
        "muted": "#9198a1",
        "line": "#7d8590",
        "box": "#161b22",
        "tile": "#2a313c",
        "peers": ("#58a6ff", "#f0883e"),
    },
}
IMAGES = (("A", "serif"), ("A", "monospace"), ("g", "serif"), ("g", "sans-serif"))
SEEN_BY = (
    ("scale(.96) rotate(-4)", "scale(1.02) rotate(5)"),
    ("rotate(-19) skewX(-14) scale(.86)", "rotate(16) skewX(12) scale(1.16)"),
)
POINTS = (
    ((-30, -17), (-17, -25), (14, 20), (32, 6)),
    ((-33, -10), (-20, -24), (20, 21), (31, 10)),
)
"""The four images' embeddings, by peer."""


def picture(colors: dict[str, str]) -> str:
    ink, muted, line = colors["ink"], colors["muted"], colors["line"]
    parts: list[str] = []

    def text(x: float, y: float, words: str, size: int = 14, color: str = ink, **more: str) -> None:
        style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="middle"{style}>{words}</text>'
        )

    def box(x: float, y: float, width: float, height: float, color: str = line) -> None:
        parts.append(
            f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" '
            f'rx="8" fill="{colors["box"]}" stroke="{color}" stroke-width="1.5"/>'
        )

    def arrow(path: str, color: str = line, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.8"{dash} marker-end="url(#{color[1:]})"/>'
        )

    def tiles(x: float, y: float, seen: tuple[str, str] | None) -> None:
        for number, (letter, family) in enumerate(IMAGES):
            left, top = x + (number % 2) * 32 - 16, y + (number // 2) * 32 - 16
            how = seen[(number + number // 2) % 2] if seen else ""
            parts.append(
                f'<g transform="translate({left} {top})"><rect x="-14" y="-14" width="28" height="28" '
                f'rx="4" fill="{colors["tile"]}" stroke="{line}" stroke-width=".8"/>'
                f'<text transform="{how}" y="7" font-size="20" font-family="{family}" fill="{ink}" '
                f'text-anchor="middle">{letter}</text></g>'
            )

    heads = {line, *colors["peers"]}
    markers = "".join(
        f'<marker id="{color[1:]}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6.5" '
        f'markerHeight="6.5" orient="auto"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
        for color in sorted(heads)
    )

    box(70, MIDDLE, 100, 124)
    tiles(70, MIDDLE + 12, None)
    text(70, MIDDLE - 38, "batch t", 15, font_weight="600")
    text(70, MIDDLE + 82, "the same images", 13, muted)
    text(70, MIDDLE + 98, "for every peer", 13, muted)

    words = (
        ("own view: weak", "own network: ResNet", "updates at every step"),
        ("own view: strong", "own network: ConvNeXt", "updates at every 2nd step"),
    )
    for peer, y in enumerate(LANES):
        color, up = colors["peers"][peer], -1 if peer == 0 else 1
        view, network, update = words[peer]
        arrow(f"M122 {MIDDLE + up * 22}C146 {MIDDLE + up * 22} 132 {y} 154 {y}")
        box(202, y, 92, 92, color)
        tiles(202, y, SEEN_BY[peer])
        arrow(f"M249 {y}H298")
        parts.append(
            f'<path d="M302 {y - 46}L406 {y - 24}V{y + 24}L302 {y + 46}z" fill="{colors["box"]}" '
            f'stroke="{color}" stroke-width="1.5" stroke-linejoin="round"/>'
        )
        text(351, y + 5, f"peer{peer}", 16, color, font_weight="600")
        arrow(f"M407 {y}H442")
        box(496, y, 104, 92, color)
        points = [(496 + dx, y + dy) for dx, dy in POINTS[peer]]
        for i, (x1, y1) in enumerate(points):
            parts.extend(
                f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{line}" stroke-width="1"/>'
                for x2, y2 in points[i + 1 :]
            )
        parts.extend(
            f'<circle cx="{px}" cy="{py}" r="5.5" fill="{color if i < 2 else colors["box"]}" '
            f'stroke="{color}" stroke-width="2"/>'
            for i, (px, py) in enumerate(points)
        )
        outside = y + up * 64 + (0 if up < 0 else 6)
        text(202, outside, view, 13, muted)
        text(351, outside, network, 13, muted)
        text(496, outside, "embeddings", 13, muted)
        metric, mutual = y + up * 25, y - up * 25
        for loss, name in ((metric, "metric loss: labels"), (mutual, "mutual loss: geometry")):
            box(726, loss, 176, 40, color)
            text(726, loss + 5, name)
            arrow(f"M816 {loss}C836 {loss} 824 {y} 846 {y}")
        arrow(f"M549 {metric}H634")
        arrow(f"M592 {metric}C620 {metric} 600 {mutual} 634 {mutual}")
        box(892, y, 84, 46, color)
        text(892, y + 5, "backward")
        text(866, outside, update, 13, muted)
    for peer, y in enumerate(LANES):
        up = -1 if peer == 0 else 1
        other = LANES[1 - peer] + up * 47
        arrow(
            f"M549 {y - up * 30}C646 {y - up * 30} 690 {MIDDLE + up * 6} 690 {other}",
            colors["peers"][peer],
            dashed=True,
        )
    text(824, MIDDLE - 4, "exchange: only embeddings travel,", 13, muted)
    text(824, MIDDLE + 13, "and no gradient goes back", 13, muted)

    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, '
        f'sans-serif"><defs>{markers}</defs>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    for scheme, colors in COLORS.items():
        Path(__file__).with_name(f"step-{scheme}.svg").write_text(picture(colors))
