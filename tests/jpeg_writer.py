"""Writes JPEGs of any layout: samplings, scans, restart intervals, markers. For tests: most programs write few of them."""

import struct

import numpy as np

ZIGZAG = [y * 8 + x for s in range(15) for y, x in sorted(((i, s - i) for i in range(8) if 0 <= s - i < 8), reverse=s % 2 == 0)]
DCT = np.array([[(0.5 if k else 0.125**0.5) * np.cos((2 * n + 1) * k * np.pi / 16) for n in range(8)] for k in range(8)])
# Every symbol has a code of one length, so that any scan can be written with the same two tables.
DC = list(range(12))
AC = [run << 4 | size for run in range(16) for size in range(11) if size or run != 15] + [0xF0]


def progressive(components):
    """A script like libjpeg's, with spectral selection and successive approximation."""
    every = list(range(components))
    scans = [(every, 0, 0, 0, 1)]
    scans += [([c], 1, 5, 0, 2) for c in every] + [([c], 6, 63, 0, 2) for c in every]
    scans += [([c], 1, 63, 2, 1) for c in every] + [(every, 0, 0, 1, 0)]
    return scans + [([c], 1, 63, 1, 0) for c in every]


def write(planes, sampling, scans, app14=None, jfif=False, ids=None, restart=0, sof=None, quality=4, extra=b"", wide=False):
    """`planes`: one array [H, W] of 0..255 a component; `sampling`: (h, v) of each; `scans`: (components, Ss, Se, Ah, Al)."""
    height, width = planes[0].shape
    most = [max(s[i] for s in sampling) for i in (0, 1)]
    ids = ids or list(range(1, len(planes) + 1))
    mcus = [-(-width // (8 * most[0])), -(-height // (8 * most[1]))]
    blocks, sizes = [], []
    for plane, (h, v) in zip(planes, sampling):
        w, t = -(-width * h // most[0]), -(-height * v // most[1])
        x = np.minimum((np.arange(w)[:, None] * most[0] // h + np.arange(-(-most[0] // h))), width - 1)
        y = np.minimum((np.arange(t)[:, None] * most[1] // v + np.arange(-(-most[1] // v))), height - 1)
        small = plane[y][:, :, x].mean(axis=(1, 3))
        grid = (mcus[1] * v * 8, mcus[0] * h * 8)
        full = np.pad(small, ((0, grid[0] - t), (0, grid[1] - w)), mode="edge") - 128.0
        tiles = full.reshape(grid[0] // 8, 8, grid[1] // 8, 8).transpose(0, 2, 1, 3)
        coefficients = np.round(DCT @ tiles @ DCT.T / quality).astype(int)
        blocks.append(coefficients.reshape(*tiles.shape[:2], 64)[:, :, ZIGZAG].tolist())
        sizes.append((-(-w // 8), -(-t // 8)))

    out = bytearray(b"\xff\xd8")

    def segment(marker, body):
        out.extend(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body)

    if jfif:
        segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
    if app14 is not None:
        segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([app14]))
    out.extend(extra)
    segment(0xDB, b"\x10" + struct.pack(">64H", *[quality] * 64) if wide else b"\0" + bytes([quality] * 64))
    layout = b"".join(bytes([i, h << 4 | v, 0]) for i, (h, v) in zip(ids, sampling))
    if sof is None:
        sof = 0xC0 if all(s[1:] == (0, 63, 0, 0) for s in scans) else 0xC2
    segment(sof, struct.pack(">BHHB", 8, height, width, len(planes)) + layout)
    segment(0xC4, b"\0" + bytes([0, 0, 0, 12] + [0] * 12) + bytes(DC))
    segment(0xC4, b"\x10" + bytes([0] * 7 + [len(AC)] + [0] * 8) + bytes(AC))
    if restart:
        segment(0xDD, struct.pack(">H", restart))
    for scan in scans:
        segment(0xDA, bytes([len(scan[0])]) + b"".join(bytes([ids[c], 0]) for c in scan[0]) + bytes([scan[1], scan[2], scan[3] << 4 | scan[4]]))
        out.extend(entropy(blocks, sampling, sizes, mcus, scan, restart))
    return bytes(out + b"\xff\xd9")


def entropy(blocks, sampling, sizes, mcus, scan, restart):
    """The data of one scan, restart markers included."""
    components, start, end, high, low = scan
    out, bits, last, run = bytearray(), [], dict.fromkeys(components, 0), [0, []]

    def put(value, length):
        if length:
            bits.append(format(value, f"0{length}b"))

    def end_run():
        if run[0]:
            n = run[0].bit_length() - 1
            put(AC.index(n << 4), 8)
            put(run[0] - (1 << n), n)
            bits.extend(run[1])
            run[:] = [0, []]

    def number(value, size):
        put(value if value > 0 else value + (1 << size) - 1, size)

    def dc(c, block):
        value = block[0] >> low
        if high:
            put(value & 1, 1)
            return
        size = abs(value - last[c]).bit_length()
        put(size, 4)
        number(value - last[c], size)
        last[c] = value

    def ac(block, first):
        values = [int(v / (1 << low)) for v in block]
        zeros = 0
        for k in range(first, end + 1):
            if not values[k]:
                zeros += 1
                continue
            end_run()
            while zeros > 15:
                put(AC.index(0xF0), 8)
                zeros -= 16
            size = abs(values[k]).bit_length()
            put(AC.index(zeros << 4 | size), 8)
            number(values[k], size)
            zeros = 0
        if zeros:
            run[0] += 1
            if first == 0 or start == 0 or run[0] == 0x7FFF:
                end_run()

    def refine(block):
        values = [abs(v) >> low for v in block]
        new = max((k for k in range(start, end + 1) if values[k] == 1), default=0)
        zeros, corrections = 0, []
        for k in range(start, end + 1):
            if not values[k]:
                zeros += 1
                continue
            while zeros > 15 and k <= new:
                end_run()
                put(AC.index(0xF0), 8)
                bits.extend(corrections)
                zeros, corrections = zeros - 16, []
            if values[k] > 1:
                corrections.append(str(values[k] & 1))
                continue
            end_run()
            put(AC.index(zeros << 4 | 1), 8)
            put(int(block[k] > 0), 1)
            bits.extend(corrections)
            zeros, corrections = 0, []
        if zeros or corrections:
            run[0] += 1
            run[1] += corrections
            if run[0] == 0x7FFF or len(run[1]) > 900:
                end_run()

    def flush():
        end_run()
        text = "".join(bits)
        text += "1" * (-len(text) % 8)
        data = int(text or "0", 2).to_bytes(len(text) // 8, "big")
        out.extend(data.replace(b"\xff", b"\xff\0"))
        bits.clear()

    def block(c, x, y):
        data = blocks[c][y][x]
        if start == 0:
            dc(c, data)
        if end > 0:
            refine(data) if high else ac(data, max(start, 1))

    if len(components) == 1:
        w, h = sizes[components[0]]
        units = [[(components[0], x, y)] for y in range(h) for x in range(w)]
    else:
        grid = [(x, y) for y in range(mcus[1]) for x in range(mcus[0])]
        units = [[(c, x * sampling[c][0] + u, y * sampling[c][1] + v) for c in components for v in range(sampling[c][1]) for u in range(sampling[c][0])] for x, y in grid]
    for i, unit in enumerate(units):
        if restart and i and i % restart == 0:
            flush()
            out.extend(b"\xff" + bytes([0xD0 + (i // restart - 1) % 8]))
            last = dict.fromkeys(components, 0)
        for place in unit:
            block(*place)
    flush()
    return out
