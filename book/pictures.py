#!/usr/bin/env python3
"""Makes the pictures of the book's part "The method, shown" again.

    cargo build --release
    python3 book/pictures.py                    # every page: about twenty minutes on two cores
    python3 book/pictures.py koleo collapse     # some

A page gets a folder of its own with the shipped recipes and suites, as in tests/tests/book.rs but in their full length; its
blocks of `toml` that name a file are written to it, its blocks of `sh` are run. Then its pictures are made, each of what the
comment above it names:

    <!-- picture: curves runs/x/report.html loss/total probe/knn/top1 -->  curves of a suite's report
    <!-- picture: strip runs/x/report.html cls 1 -->                       a filmstrip's rows for one image
    <!-- picture: seen runs/x/report.html similarity -->                   what every arm sees at its end
    <!-- picture: grid seen/a.png,seen/b.png seen/c.png,seen/d.png -->     pictures that the program wrote, row by row
    <!-- picture: sphere start=runs/a trained=runs/b -->                   class tokens of cuttings from photographs

Needs NumPy and Pillow (.ci/run keeps a Python that has both in target/python). Folders stay in target/book, so that
pictures of a page whose runs are done by the same program cost nothing.
"""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "book/src/method"
WORK = ROOT / "target/book"
PROGRAM = ROOT / "target/release/dinolab"
PHOTOS = ROOT / "tests/photos"
INK, SOFT = "#1d1f24", "#5c6270"


def run(page):
    """Writes and runs what a page shows, unless that is done by this program; gives the page's text and folder."""
    text, folder = page.read_text(), WORK / page.stem
    blocks = re.findall(r"^```(sh|toml)\n(.*?)^```", text, re.M | re.S)
    done, shown = folder / "done", f"{PROGRAM.stat().st_mtime_ns} {blocks}"
    if done.exists() and done.read_text() == shown:
        return text, folder
    shutil.rmtree(folder, ignore_errors=True)
    for name in ["recipes", "ablations"]:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("src", "Cargo.toml", "build.rs"))
    shutil.copytree(PHOTOS, folder / "images")
    script = ["set -eu", f'dinolab() {{ "{PROGRAM}" "$@"; }}']
    for info, body in blocks:
        if info == "sh":
            script.append(body.replace("/path/to/images", "images"))
        elif named := re.match(r"# (\S+\.toml)\n", body):
            (folder / named[1]).write_text(body)
    subprocess.run(["bash", "-c", "\n".join(script)], cwd=folder, check=True)
    done.write_text(shown)
    return text, folder


class Drawing:
    """An SVG, put together from pieces."""

    def __init__(self):
        self.parts = []

    def text(self, x, y, text, size=13, color=INK, anchor="start"):
        self.parts.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{html.escape(text)}</text>')

    def image(self, x, y, side, uri, smooth=False):
        rendering = "auto" if smooth else "pixelated"
        self.parts.append(f'<image x="{x}" y="{y}" width="{side}" height="{side}" style="image-rendering:{rendering}" href="{uri}"/>')

    def frame(self, x, y, side, mark):
        """The marked patch, in percent of the image."""
        left, top, w, h = (side * float(v) / 100 for v in mark)
        for color, width in [("#000", 4), ("#fff", 2)]:
            self.parts.append(f'<rect x="{x + left:.1f}" y="{y + top:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" stroke="{color}" stroke-width="{width}"/>')

    def legend(self, x, y, lines):
        for name, color in lines:
            self.parts.append(f'<circle cx="{x + 5}" cy="{y - 4}" r="5" fill="{color}"/>')
            self.text(x + 16, y, name)
            x += 34 + 7.5 * len(name)

    def save(self, path, width, height):
        style = f'style="color:{INK}" font-family="sans-serif"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {style}>'
        path.write_text(f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(self.parts)}</svg>\n')


def curves(folder, target, report, *names):
    page = (folder / report).read_text()
    plots = {html.unescape(name): svg for name, svg in re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", page, re.S)}
    legend = re.search(r'<ul class="legend">(.*?)</ul>', page, re.S)[1]
    lines = [(html.unescape(name), color) for color, name in re.findall(r"--arm: (#\w+)\"></span>(.*?)</li>", legend)]
    drawing, across = Drawing(), 2 if len(names) > 1 else 1
    drawing.legend(12, 22, lines)
    for i, name in enumerate(names):
        x, y = i % across * 400, 36 + i // across * 276
        drawing.text(x + 12, y + 14, name)
        # A tenth of a pixel is enough in tags; labels stand between them.
        rounded = lambda tag: re.sub(r"\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), tag[0])
        plot = re.sub(r"<[^>]*>", rounded, plots[name])
        drawing.parts.append(f'<svg x="{x}" y="{y + 20}" {plot[4:]}')
    drawing.save(target, 400 * across, 36 + 276 * -(-len(names) // across))


def strip(folder, target, report, kind, image):
    page = (folder / report).read_text()
    titles = {"similarity": "Similarity to", "cls": "Cosine of", "components": "Principal components, one"}
    table = re.search(rf'<h3>{titles[kind]}.*?<table class="film">(.*?)</table>', page, re.S)[1]
    steps = re.findall(r'<th class="num">(.*?)</th>', table)
    group = re.split(r'<td rowspan="\d+">', table)[int(image)]
    rows = re.split(r'<th scope="row">', group)
    photo = re.search(r'<img src="(.*?)"', rows[0])[1]
    mark = re.search(r'left: ([\d.]+)%; top: ([\d.]+)%; width: ([\d.]+)%; height: ([\d.]+)%', rows[0])
    side, left, drawing = 84, 210, Drawing()
    drawing.image(8, 24, side, photo, smooth=True)
    if mark:
        drawing.frame(8, 24, side, mark.groups())
    for i, step in enumerate(steps):
        drawing.text(left + i * (side + 6) + side / 2, 16, step, 12, SOFT, "middle")
    y = 24
    for row in rows[1:]:
        drawing.text(left - 8, y + side / 2, row.split("</th>")[0], anchor="end")
        below = 0
        # A run that has no checkpoint of a step leaves its cell empty.
        for i, cell in enumerate(re.findall(r"<td>(.*?)</td>", row, re.S)):
            x = left + i * (side + 6)
            if uri := re.search(r'<img src="(.*?)"', cell):
                drawing.image(x, y, side, uri[1])
            if path := re.search(r'<path d="(.*?)"', cell):
                drawing.parts.append(f'<path transform="translate({x} {y + side + 3}) scale({side / 40} 2)" fill="{SOFT}" d="{path[1]}"/>')
                below = 22
        y += side + 6 + below
    drawing.save(target, left + len(steps) * (side + 6) + 4, y + 2)


def seen(folder, target, report, kind):
    page = (folder / report).read_text()
    title = "Similarity to the framed patch" if kind == "similarity" else "Principal components"
    grid = re.search(rf"<h3>{title}</h3>\s*<div class=\"scroll\"><div class=\"pictures\"(.*?)</section>", page, re.S)[1]
    grid = grid.split("<h3>")[0]
    photos = re.findall(r'class="photo"><img src="(.*?)".*?</div>', grid)
    marks = re.findall(r"left: ([\d.]+)%; top: ([\d.]+)%; width: ([\d.]+)%; height: ([\d.]+)%", grid)
    side, left, drawing = 96, 170, Drawing()
    drawing.text(left - 10, 8 + side / 2, "held-out image", 13, SOFT, "end")
    for i, photo in enumerate(photos):
        drawing.image(left + i * (side + 6), 8, side, photo, smooth=True)
        if marks:
            drawing.frame(left + i * (side + 6), 8, side, marks[i])
    y = 8
    for name, row in re.findall(r'class="dot"[^>]*></span>([^<]*)</div>(.*?)(?=<div><span|\Z)', grid, re.S):
        y += side + 6
        drawing.text(left - 10, y + side / 2, html.unescape(name), anchor="end")
        for i, uri in enumerate(re.findall(r'<img src="(.*?)"', row)):
            drawing.image(left + i * (side + 6), y, side, uri)
    drawing.save(target, left + len(photos) * (side + 6) + 2, y + side + 8)


def grid(folder, target, *rows):
    from PIL import Image

    side, shown = 200, [[Image.open(next(folder.glob(path))).convert("RGB") for path in row.split(",")] for row in rows]
    heights = [round(side * row[0].height / row[0].width) for row in shown]
    sheet = Image.new("RGB", ((side + 6) * len(shown[0]) - 6, sum(heights) + 6 * (len(rows) - 1)), "white")
    for i, row in enumerate(shown):
        for j, picture in enumerate(row):
            sheet.paste(picture.resize((side, heights[i]), Image.NEAREST), ((side + 6) * j, sum(heights[:i]) + 6 * i))
    sheet.quantize(64).save(target, optimize=True)


def sphere(folder, target, *runs):
    """Class tokens of 64-pixel cuttings, scaled to length 1, along the two main directions of all of them together."""
    import numpy as np
    from PIL import Image

    cuttings = folder / "cuttings"
    if not cuttings.exists():
        cuttings.mkdir()
        for path in sorted(p for p in (folder / "images").iterdir() if p.suffix != ".md"):
            photo = Image.open(path).convert("RGB")
            for x in range(0, photo.width - 63, 32):
                for y in range(0, photo.height - 63, 32):
                    photo.crop((x, y, x + 64, y + 64)).save(cuttings / f"{path.stem}_{x}_{y}.png")
    tokens = {}
    for name, weights in (run.split("=") for run in runs):
        out = folder / "seen" / f"cuttings_{name}"
        command = [PROGRAM, "features", cuttings, "--weights", weights, "--out", out]
        subprocess.run([*command, "--no-pictures", "--format", "npy"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        x = np.stack([np.load(path).ravel() for path in sorted(out.glob("**/cls.npy"))]).astype(float)
        tokens[name.replace("_", " ")] = x / np.linalg.norm(x, axis=1, keepdims=True)
    drawing, side = Drawing(), 260
    for i, (name, x) in enumerate(tokens.items()):
        axes = np.linalg.svd(x, full_matrices=False)[2][:2]
        shadow, cosines = x @ axes.T, x @ x.T
        np.fill_diagonal(cosines, -1)
        nearest = np.sqrt(2 - 2 * cosines.max(1)).mean()
        cx, cy, r = i * side + side / 2, 34 + side / 2, side / 2 - 12
        drawing.text(cx, 20, f"{name}: nearest at {nearest:.3f}", anchor="middle")
        drawing.parts.append(f'<circle cx="{cx}" cy="{cy}" r="{r}" fill="none" stroke="{SOFT}"/>')
        drawing.parts += [f'<circle cx="{cx + r * u:.1f}" cy="{cy - r * v:.1f}" r="2.2" fill="#0072b2" fill-opacity=".55"/>' for u, v in shadow]
        print(f"  {name}: {len(x)} class tokens, mean distance to the nearest {nearest:.4f}, mean cosine {x.mean(0) @ x.mean(0):.4f}")
    drawing.save(target, side * len(tokens), side + 40)


def main():
    wanted = sys.argv[1:] or [page.stem for page in sorted(PAGES.glob("*.md"))]
    for name in wanted:
        text, folder = run(PAGES / f"{name}.md")
        for call, picture in re.findall(r"<!-- picture: (.*?) -->\s*!\[[^\]]*\]\((.*?)\)", text):
            kind, *arguments = call.split()
            target = (PAGES / picture).resolve()
            target.parent.mkdir(exist_ok=True)
            {"curves": curves, "strip": strip, "seen": seen, "grid": grid, "sphere": sphere}[kind](folder, target, *arguments)
            print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
