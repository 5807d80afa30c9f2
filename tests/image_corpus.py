"""The other side of tests/tests/data/decoding.rs: images of every kind, whole and damaged, and what Pillow (libjpeg-turbo,
libpng, libwebp, libtiff) sees in them.

image_corpus.py [FLIPS] [SEED]    writes cases to stdout, each a line of JSON and two blobs: the file, and 8-bit RGB

FLIPS random bits are turned in every file, one at a time. A case has `kind`: "good" (a file that any program writes),
"rare" (valid, and few programs write it), "cut", "flip"; and Pillow's picture, or why it refuses the file.
"""

import io
import json
import random
import struct
import sys
import zlib

import numpy as np
from jpeg_writer import progressive, write
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

WIDTH, HEIGHT = 61, 43


def picture(width=WIDTH, height=HEIGHT):
    """`[H, W, 4]`: colours that change slowly, some noise, and transparency with other colours under it."""
    random = np.random.default_rng(5)
    coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    rgb = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)).astype(int)
    rgb = np.clip(rgb + random.integers(-6, 7, rgb.shape), 0, 255)
    alpha = np.clip(np.add.outer(np.arange(height) * 5, np.arange(width) * 4) - 60, 0, 255)
    return np.dstack([rgb, alpha]).astype(np.uint8)


RGBA = picture()
RGB = np.ascontiguousarray(RGBA[..., :3])
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
YCC = np.asarray(Image.fromarray(RGB).convert("YCbCr"))


def encode(image, kind, **options):
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, kind, **options)
    return out.getvalue()


def exif(orientation, big=False):
    order = ">" if big else "<"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return (b"MM\0*" if big else b"II*\0") + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def jpegs():
    for quality in (40, 75, 95):
        for name, sampling in (("444", 0), ("422", 1), ("420", 2)):
            for way in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}, {"progressive": True, "restart_marker_rows": 1}):
                label = "_".join(map(str, way)) or "baseline"
                yield "good", f"pillow_{quality}_{name}_{label}.jpg", encode(RGB, "JPEG", quality=quality, subsampling=sampling, **way)
    for way in ({}, {"progressive": True}):
        yield "good", f"grey_{len(way)}.jpg", encode(GREY, "JPEG", **way)
        yield "good", f"cmyk_{len(way)}.jpg", encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", **way)
        yield "good", f"rgb_{len(way)}.jpg", encode(RGB, "JPEG", keep_rgb=True, **way)
    for width, height in ((1, 1), (8, 8), (16, 16), (17, 9), (1, 50), (50, 1), (15, 33), (7, 100)):
        small = picture(width, height)[..., :3]
        for sampling in (0, 1, 2):
            for way in ({}, {"progressive": True}):
                yield "good", f"size_{width}x{height}_{sampling}_{len(way)}.jpg", encode(small, "JPEG", subsampling=sampling, **way)
    planes = [YCC[..., c].astype(float) for c in range(3)]
    colours = [RGB[..., c].astype(float) for c in range(3)]
    inks = [255 - np.asarray(Image.fromarray(RGB).convert("CMYK"))[..., c].astype(float) for c in range(4)]
    inks[3] = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) * 1.5 + 80
    one, apart = [([0, 1, 2], 0, 63, 0, 0)], [([c], 0, 63, 0, 0) for c in range(3)]
    scans = {"baseline": one, "progressive": progressive(3), "apart": apart, "two": [([0], 0, 63, 0, 0), ([1, 2], 0, 63, 0, 0)]}
    common = {"444": (1, 1), "422": (2, 1), "440": (1, 2), "420": (2, 2)}
    every = {**common, "411": (4, 1), "441": (1, 4), "410": (4, 2), "442": (2, 4), "311": (3, 1), "313": (1, 3)}
    for name, luma in every.items():
        for label, scan in scans.items():
            for restart in (0, 2):
                kind = "good" if name in common and label in ("baseline", "progressive") else "rare"
                yield kind, f"written_{name}_{label}_{restart}.jpg", write(planes, [luma, (1, 1), (1, 1)], scan, jfif=True, restart=restart)
    odd = {"chroma_larger": [(1, 1), (2, 2), (2, 2)], "all_2x2": [(2, 2)] * 3, "cb_2x1": [(2, 2), (2, 1), (1, 1)], "cb_1x2_cr_2x1": [(2, 2), (1, 2), (2, 1)],
           "thirds": [(3, 2), (1, 1), (1, 1)], "all_1x2": [(1, 2)] * 3, "chroma_2x1": [(2, 2), (2, 1), (2, 1)], "chroma_1x2": [(2, 2), (1, 2), (1, 2)]}
    for name, sampling in odd.items():
        for label in ("baseline", "progressive"):
            yield "rare", f"sampling_{name}_{label}.jpg", write(planes, sampling, scans[label])
    for name, grey in (("1x1", (1, 1)), ("2x2", (2, 2)), ("4x1", (4, 1)), ("1x2", (1, 2))):
        for label, scan in (("baseline", [([0], 0, 63, 0, 0)]), ("progressive", progressive(1))):
            yield "good" if name == "1x1" else "rare", f"grey_{name}_{label}.jpg", write([GREY.astype(float)], [grey], scan, restart=3)
    for label in ("baseline", "progressive"):
        for app14, data in ((0, colours), (1, planes), (2, planes), (None, planes)):
            yield "rare", f"adobe_{app14}_{label}.jpg", write(data, [(1, 1)] * 3, scans[label], app14=app14)
        yield "rare", f"ids_rgb_{label}.jpg", write(colours, [(1, 1)] * 3, scans[label], ids=[82, 71, 66])
        yield "rare", f"ids_rgb_jfif_{label}.jpg", write(planes, [(1, 1)] * 3, scans[label], ids=[82, 71, 66], jfif=True)
        yield "rare", f"ids_0_{label}.jpg", write(planes, [(2, 2), (1, 1), (1, 1)], scans[label], ids=[0, 1, 2])
        yield "rare", f"ids_odd_{label}.jpg", write(planes, [(2, 2), (1, 1), (1, 1)], scans[label], ids=[34, 7, 200])
        yield "rare", f"rgb_420_{label}.jpg", write(colours, [(2, 2), (1, 1), (1, 1)], scans[label], app14=0)
        yield "rare", f"jfif_and_adobe_0_{label}.jpg", write(planes, [(1, 1)] * 3, scans[label], app14=0, jfif=True)
        four = [([0, 1, 2, 3], 0, 63, 0, 0)] if label == "baseline" else progressive(4)
        for app14 in (0, 2, None):
            for name, sampling in (("444", [(1, 1)] * 4), ("420", [(2, 2), (1, 1), (1, 1), (2, 2)]), ("422", [(2, 1), (1, 1), (1, 1), (2, 1)])):
                yield "rare", f"four_{app14}_{name}_{label}.jpg", write(inks, sampling, four, app14=app14)
    yield "rare", "two_components.jpg", write(planes[:2], [(1, 1)] * 2, [([0, 1], 0, 63, 0, 0)])
    yield "rare", "wide_tables.jpg", write(planes, [(1, 1)] * 3, one, wide=True)
    yield "rare", "extended_sequential.jpg", write(planes, [(1, 1)] * 3, one, sof=0xC1)
    yield "rare", "arithmetic.jpg", write(planes, [(1, 1)] * 3, one, sof=0xC9)
    yield "rare", "lossless.jpg", write(planes, [(1, 1)] * 3, one, sof=0xC3)
    yield "rare", "only_dc.jpg", write(planes, [(2, 2), (1, 1), (1, 1)], progressive(3)[:1])
    yield "rare", "a_scan_is_missing.jpg", write(planes, [(2, 2), (1, 1), (1, 1)], progressive(3)[:-1])
    yield "rare", "a_component_is_missing.jpg", write(planes, [(1, 1)] * 3, apart[:2])
    yield "rare", "spectral_selection_only.jpg", write(planes, [(2, 2), (1, 1), (1, 1)], [([0, 1, 2], 0, 0, 0, 0)] + [([c], 1, 63, 0, 0) for c in range(3)])
    good = encode(RGB, "JPEG")
    yield "good", "comment_and_profile.jpg", encode(RGB, "JPEG", comment=b"hello", icc_profile=bytes(3000))
    yield "good", "fill_bytes.jpg", good[:2] + b"\xff\xff\xff" + good[2:]
    yield "good", "another_behind.jpg", good + good
    yield "good", "zeros_behind.jpg", good + bytes(1000)
    yield "rare", "fill_bytes_before_the_end.jpg", good[:-2] + b"\xff\xff\xff\xd9"
    yield "rare", "extra_byte_before_the_end.jpg", good[:-2] + b"\x00\xff\xd9"
    yield "good", "no_end.jpg", good[:-2]
    yield "good", "start_of_thumbnail.jpg", write(planes, [(1, 1)] * 3, one, extra=b"\xff\xe1" + struct.pack(">H", len(good) + 2) + good)
    for n in range(10):
        for big in (False, True):
            yield "good", f"orientation_{n}_{big}.jpg", encode(RGB, "JPEG", exif=b"Exif\0\0" + exif(n, big))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows, bits, colour, extra=b"", interlaced=False):
    """A PNG of rows `[H, W, C]` of whole numbers."""
    height, width = rows.shape[:2]

    def packed(rows):
        out = b""
        for row in rows:
            if bits == 16:
                out += b"\0" + row.astype(">u2").tobytes()
            else:
                out += b"\0" + np.packbits(np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits:].ravel()).tobytes()
        return out

    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [rows[y::dy, x::dx] for x, y, dx, dy in passes] if interlaced else [rows]
    data = zlib.compress(b"".join(packed(part) for part in parts if part.size), 6)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    half = len(data) // 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data[:half]) + chunk(b"IDAT", data[half:]) + chunk(b"IEND", b"")


def pngs():
    wide = RGBA.astype(int) * 257 + np.random.default_rng(1).integers(-90, 90, RGBA.shape)
    wide = np.clip(wide, 0, 65535)
    grey = GREY[..., None].astype(int)
    grey_wide = np.clip(grey * 257 + np.random.default_rng(2).integers(-90, 90, grey.shape), 0, 65535)
    for interlaced in (False, True):
        end = "_interlaced.png" if interlaced else ".png"
        for bits in (1, 2, 4, 8):
            yield "good", f"grey_{bits}{end}", png(grey >> (8 - bits), bits, 0, interlaced=interlaced)
            colours = min(1 << bits, 200)
            palette = chunk(b"PLTE", np.random.default_rng(3).integers(0, 256, 3 * colours, dtype=np.uint8).tobytes())
            see_through = chunk(b"tRNS", bytes(np.linspace(0, 255, colours).astype(np.uint8)))
            index = np.minimum(grey >> (8 - bits), colours - 1)
            yield "good", f"palette_{bits}{end}", png(index, bits, 3, palette, interlaced)
            yield "good", f"palette_{bits}_trns{end}", png(index, bits, 3, palette + see_through, interlaced)
            # Pillow compares with the level after it was stretched to 8 bits: right for black only.
            yield "good", f"grey_{bits}_trns{end}", png(grey >> (8 - bits), bits, 0, chunk(b"tRNS", struct.pack(">H", 0)), interlaced)
        yield "good", f"rgb_8{end}", png(RGB, 8, 2, interlaced=interlaced)
        yield "good", f"rgb_8_trns{end}", png(RGB & 0xF0, 8, 2, chunk(b"tRNS", struct.pack(">3H", *(RGB[9, 9] & 0xF0))), interlaced)
        yield "good", f"rgb_16{end}", png(wide[..., :3], 16, 2, interlaced=interlaced)
        yield "good", f"rgba_8{end}", png(RGBA, 8, 6, interlaced=interlaced)
        yield "good", f"rgba_16{end}", png(wide, 16, 6, interlaced=interlaced)
        yield "good", f"grey_16{end}", png(grey_wide, 16, 0, interlaced=interlaced)
        yield "good", f"grey_16_trns{end}", png(grey_wide, 16, 0, chunk(b"tRNS", struct.pack(">H", grey_wide[9, 9, 0])), interlaced)
        yield "good", f"grey_alpha_8{end}", png(np.dstack([grey, RGBA[..., 3:]]), 8, 4, interlaced=interlaced)
        yield "good", f"grey_alpha_16{end}", png(np.dstack([grey_wide, wide[..., 3:]]), 16, 4, interlaced=interlaced)
    yield "good", "gamma.png", png(RGB, 8, 2, chunk(b"gAMA", struct.pack(">I", 100000)))
    yield "good", "profile.png", encode(RGB, "PNG", icc_profile=bytes(3000))
    yield "good", "optimised.png", encode(RGBA, "PNG", optimize=True)
    yield "good", "animated.png", encode(RGB, "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])])
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 5000, zip=True)
    yield "good", "text.png", encode(RGB, "PNG", pnginfo=text)
    yield "good", "behind_the_end.png", encode(RGB, "PNG") + b"x" * 500
    for width, height in ((1, 1), (1, 60), (60, 1), (3, 3)):
        for interlaced in (False, True):
            yield "good", f"size_{width}x{height}_{interlaced}.png", png(picture(width, height), 8, 6, interlaced=interlaced)
    yield "good", "orientation_behind_the_pixels.png", png(RGB, 8, 2).replace(chunk(b"IEND", b""), chunk(b"eXIf", exif(6)) + chunk(b"IEND", b""))
    for n in range(10):
        yield "good", f"orientation_{n}.png", png(RGB, 8, 2, chunk(b"eXIf", exif(n, n % 2 == 0)))


def webps():
    moving = [Image.fromarray(RGBA), Image.fromarray(np.ascontiguousarray(RGBA[::-1]))]
    for lossless in (False, True):
        name = "lossless" if lossless else "lossy"
        for quality in (5, 50, 95):
            yield "good", f"{name}_{quality}.webp", encode(RGB, "WEBP", quality=quality, lossless=lossless)
            yield "good", f"{name}_{quality}_alpha.webp", encode(RGBA, "WEBP", quality=quality, lossless=lossless)
        yield "good", f"{name}_animated.webp", encode(moving[0], "WEBP", save_all=True, append_images=moving[1:], lossless=lossless)
        yield "good", f"{name}_grey.webp", encode(GREY, "WEBP", lossless=lossless)
        yield "good", f"{name}_two_colours.webp", encode(Image.fromarray(GREY).convert("1").convert("RGB"), "WEBP", lossless=lossless)
        for width, height in ((1, 1), (1, 60), (60, 1), (17, 16)):
            yield "good", f"{name}_{width}x{height}.webp", encode(picture(width, height), "WEBP", lossless=lossless)
    for method in (0, 6):
        yield "good", f"method_{method}.webp", encode(RGB, "WEBP", method=method)
    yield "good", "exact.webp", encode(RGBA, "WEBP", lossless=True, exact=True)
    yield "good", "alpha_quality.webp", encode(RGBA, "WEBP", alpha_quality=10)
    yield "good", "profile.webp", encode(RGB, "WEBP", icc_profile=bytes(3000))
    for n in range(10):
        yield "good", f"orientation_{n}.webp", encode(RGB, "WEBP", exif=exif(n, n % 2 == 0))


def others():
    """TIFF, BMP and GIF, which have no check sums: whole and cut, no bit turned."""
    wide = np.clip(GREY.astype(int) * 257 + np.random.default_rng(2).integers(-90, 90, GREY.shape), 0, 65535).astype(np.uint16)
    few = Image.fromarray(RGB).quantize(40)
    for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        for label, image in {"rgb": RGB, "rgba": RGBA, "grey": GREY, "grey_16": wide}.items():
            yield "good", f"{label}_{name}.tif", encode(image, "TIFF", compression=name)
        yield "good", f"rows_{name}.tif", encode(RGB, "TIFF", compression=name, tiffinfo={278: 5})
        yield "rare", f"palette_{name}.tif", encode(few, "TIFF", compression=name)
        yield "rare", f"cmyk_{name}.tif", encode(Image.fromarray(RGB).convert("CMYK"), "TIFF", compression=name)
        yield "rare", f"two_colours_{name}.tif", encode(Image.fromarray(GREY).convert("1"), "TIFF", compression=name)
    yield "rare", "jpeg.tif", encode(RGB, "TIFF", compression="jpeg")
    yield "rare", "fax.tif", encode(Image.fromarray(GREY).convert("1"), "TIFF", compression="group4")
    yield "good", "big.tif", encode(RGB, "TIFF", big_tiff=True)
    for n in range(1, 9):
        yield "good", f"orientation_{n}.tif", encode(RGB, "TIFF", tiffinfo={274: n})
    yield "good", "rgb.bmp", encode(RGB, "BMP")
    yield "good", "grey.bmp", encode(GREY, "BMP")
    yield "good", "palette.bmp", encode(few, "BMP")
    yield "good", "two_colours.bmp", encode(Image.fromarray(GREY).convert("1"), "BMP")
    for width, height in ((1, 1), (1, 60), (60, 1), (17, 16)):
        small = picture(width, height)[..., :3]
        yield "good", f"{width}x{height}.tif", encode(small, "TIFF")
        yield "good", f"{width}x{height}.bmp", encode(small, "BMP")
        yield "good", f"{width}x{height}.gif", encode(Image.fromarray(small).quantize(8), "GIF")
    for interlace in (0, 1):
        yield "good", f"palette_{interlace}.gif", encode(few, "GIF", interlace=interlace)
        yield "good", f"grey_{interlace}.gif", encode(GREY, "GIF", interlace=interlace)
        yield "good", f"see_through_{interlace}.gif", encode(few, "GIF", interlace=interlace, transparency=3)
    yield "good", "animated.gif", encode(few, "GIF", save_all=True, append_images=[Image.fromarray(RGB[::-1]).quantize(40)])


def upright(data, lenient):
    ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")) as image:
        image.load()
        see_through = image.info.get("transparency")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            wide = np.asarray(image).astype(int)
            grey = (wide + 128) // 257
            if see_through is not None:
                grey = np.where(wide == see_through, 255, grey)
            return np.repeat(grey[..., None], 3, 2).astype(np.uint8)
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            rgba = np.asarray(image.convert("RGBA")).astype(int)
            alpha = rgba[..., 3:]
            return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.asarray(image.convert("RGB"))


def show(name, kind, data):
    """Writes a case: Pillow's picture, and if it has one only when it is lenient, both that and why it refuses."""
    problem, seen = None, None
    for lenient in (False, True):
        try:
            seen = upright(data, lenient)
            break
        except Exception as error:  # Pillow raises of all kinds.
            problem = problem or f"{type(error).__name__}: {str(error)[:80]}"
    height, width = seen.shape[:2] if seen is not None else (0, 0)
    head = {"name": name, "kind": kind, "bytes": len(data), "problem": problem, "width": width, "height": height}
    out = sys.stdout.buffer
    out.write(json.dumps(head).encode() + b"\n" + data)
    if seen is not None:
        out.write(np.ascontiguousarray(seen).tobytes())


def main():
    flips = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    draw = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    Image.MAX_IMAGE_PIXELS = 4_000_000
    cases = [*jpegs(), *pngs(), *webps(), *others()]
    for kind, name, data in cases:
        show(name, kind, data)
    for kind, name, data in cases:
        shares = range(5, 100, 5) if flips > 20 else draw.sample(range(5, 100, 5), 3)
        for share in shares:
            show(f"{name} cut at {share} %", "cut", data[: len(data) * share // 100])
        checked = name.endswith((".jpg", ".png", ".webp"))
        for _ in range(flips if checked else 0):
            at, bit = draw.randrange(len(data)), draw.randrange(8)
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            show(f"{name} with bit {bit} of byte {at} turned", "flip", bytes(damaged))


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    main()
