"""The other side of tests/tests/scores/probes.rs: scores of probes by scikit-learn and numpy, given the same features.

probes.py CASES    for every probe in the JSON file: its scores
"""

import json
import sys
from io import BytesIO

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import (average_precision_score, confusion_matrix, mean_absolute_percentage_error,
                             root_mean_squared_error)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler


def table(case, part, what):
    x = case[part][what]
    return np.array(x["values"]).reshape(x["shape"])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def knn(case, config):
    """Cosine distance d = 1 - s, so that the weight is exp(-d / temperature)."""
    scores = {}
    for i, k in enumerate([config["k"]] + config["more_k"]):
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                     weights=lambda d: np.exp(-d / config["temperature"]))
        model.fit(table(case, "train", "cls"), case["train"]["labels"])
        scores["top1" if i == 0 else f"top1_k{k}"] = model.score(table(case, "test", "cls"), case["test"]["labels"])
    return scores


def logistic(x, y, l2, weight=None):
    """Mean cross-entropy plus l2 / 2 |W|^2 is scikit-learn's sum plus |W|^2 / (2 C), divided by the rows' weight."""
    rows = len(x) if weight is None else weight.sum()
    model = LogisticRegression(C=1 / (l2 * rows), tol=1e-10, max_iter=20000)
    return model.fit(x, y, sample_weight=weight)


def linear_classification(case, config):
    """With one penalty nothing is chosen."""
    (l2,) = config["penalties"]
    scale = StandardScaler().fit(table(case, "train", "cls"))
    model = logistic(scale.transform(table(case, "train", "cls")), case["train"]["labels"], l2)
    logits = model.decision_function(scale.transform(table(case, "test", "cls")))
    labels = np.array(case["test"]["labels"])
    rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    return {"top1": (rank < 1).mean(), "top5": (rank < 5).mean(), "penalty": l2}


def retrieval(case, config):
    similarity = unit(table(case, "test", "cls")) @ unit(table(case, "train", "cls")).T
    right = np.array(case["test"]["labels"])[:, None] == np.array(case["train"]["labels"])
    similarity, right = similarity[right.any(axis=1)], right[right.any(axis=1)]
    order = np.argsort(-similarity, axis=1)
    first = np.take_along_axis(right, order, axis=1).argmax(axis=1)
    return {"map": np.mean([average_precision_score(r, s) for r, s in zip(right, similarity)]),
            **{f"recall_{k}": (first < k).mean() for k in config["recall"]}}


def resize(x, height, width=None):
    """Bilinear, align_corners = false: [h, w, c] to [height, width, c]."""
    def matrix(n, size):
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        m = np.zeros((size, n))
        m[np.arange(size), low] += 1 - (at - low)
        m[np.arange(size), np.minimum(low + 1, n - 1)] += at - low
        return m
    return np.einsum("yh,xw,hwc->yxc", matrix(x.shape[0], height), matrix(x.shape[1], width or height), x)


def shares(masks, grid, classes):
    """Shares of classes among a patch's pixels, over all of known class."""
    n, size, p = len(masks), masks.shape[1], masks.shape[1] // grid
    patches = masks.reshape(n, grid, p, grid, p).transpose(0, 1, 3, 2, 4).reshape(n, grid * grid, p * p)
    counts = np.stack([(patches == c).sum(axis=-1) for c in range(classes)], axis=-1)
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def segmentation(case, logits):
    """logits: [images, patches, classes]."""
    masks, grid = table(case, "test", "masks"), case["grid"]
    return confusion(case, masks, np.stack([resize(x.reshape(grid, grid, -1), masks.shape[1]).argmax(axis=-1) for x in logits]))


def confusion(case, masks, predicted):
    classes = case["classes"]
    known = masks < classes
    m = confusion_matrix(masks[known], predicted[known], labels=range(classes))
    right, truth, given = np.diag(m), m.sum(axis=1), m.sum(axis=0)
    iou = {c: right[c] / (truth[c] + given[c] - right[c]) for c in range(classes) if truth[c]}
    return {"miou": np.mean(list(iou.values())), "accuracy": right.sum() / m.sum(),
            **{f"iou/{case['names'][c]}": value for c, value in iou.items()}}


def linear_segmentation(case, config):
    """A patch is as many samples as it has classes, each of the weight of its share; one of no class counts in the mean."""
    classes = case["classes"]
    train, test = table(case, "train", "patches"), table(case, "test", "patches")
    d = train.shape[-1]
    scale = StandardScaler().fit(train.reshape(-1, d))
    x = scale.transform(train.reshape(-1, d))
    weight = shares(table(case, "train", "masks"), case["grid"], classes).reshape(-1, classes)
    rows, y = np.nonzero(weight)
    model = LogisticRegression(C=1 / (config["l2"] * len(x)), tol=1e-10, max_iter=20000)
    model.fit(x[rows], y, sample_weight=weight[rows, y])
    logits = model.decision_function(scale.transform(test.reshape(-1, d)))
    return segmentation(case, logits.reshape(len(test), -1, classes))


def knn_segmentation(case, config):
    classes = case["classes"]
    train, test = table(case, "train", "patches"), table(case, "test", "patches")
    share = shares(table(case, "train", "masks"), case["grid"], classes).reshape(-1, classes)
    memory = unit(train.reshape(-1, train.shape[-1]))[share.any(axis=1)]
    share = share[share.any(axis=1)]
    similarity = unit(test) @ memory.T
    nearest = np.argsort(-similarity, axis=-1)[..., :config["k"]]
    weight = np.exp((np.take_along_axis(similarity, nearest, axis=-1) - 1) / config["temperature"])
    votes = np.einsum("npk,npkc->npc", weight, share[nearest])
    return segmentation(case, votes / votes.max(axis=-1, keepdims=True))


def few_shot(case, config):
    """The images of every draw are given: they come from a generator of its own."""
    x, labels = unit(table(case, "train", "cls")), np.array(case["train"]["labels"])
    test, truth = unit(table(case, "test", "cls")), np.array(case["test"]["labels"])
    scores = {}
    for shots, draws in case["draws"].items():
        top1 = []
        for rows in draws:
            model = logistic(x[rows], labels[rows], config["l2"])
            top1.append((model.predict(test) == truth).mean())
        scores[f"top1_{shots}"] = np.mean(top1)
        scores[f"top1_{shots}_sd"] = np.std(top1, ddof=1)
    return scores


def depth(case, config):
    """Mean squared error plus l2 |w|^2 is scikit-learn's sum plus alpha |w|^2, divided by the rows."""
    grid = case["grid"]
    train, test = table(case, "train", "patches"), table(case, "test", "patches")
    d, images = train.shape[-1], table(case, "train", "depth")
    scale = StandardScaler().fit(train.reshape(-1, d))
    p = images.shape[1] // grid
    patches = images.reshape(-1, grid, p, grid, p).transpose(0, 1, 3, 2, 4).reshape(-1, p * p)
    known = patches > 0
    rows = known.any(axis=1)
    y = patches.sum(axis=1)[rows] / known.sum(axis=1)[rows]
    model = Ridge(alpha=config["l2"] * rows.sum()).fit(scale.transform(train.reshape(-1, d))[rows], y)
    predicted = np.clip(model.predict(scale.transform(test.reshape(-1, d))), y.min(), y.max())
    truth = table(case, "test", "depth")
    predicted = np.stack([resize(x.reshape(grid, grid, 1), truth.shape[1])[..., 0] for x in predicted.reshape(len(test), -1)])
    t, p = truth[truth > 0], predicted[truth > 0]
    return {"rmse": root_mean_squared_error(t, p), "abs_rel": mean_absolute_percentage_error(t, p),
            "delta1": (np.maximum(t / p, p / t) < 1.25).mean()}


def windows(case, config):
    """Logits of every window at its pixels, averaged over the windows of an image."""
    classes, size, grid = case["classes"], case["window"], case["grid"]
    scale = StandardScaler().fit(table(case, "train", "patches").reshape(-1, table(case, "train", "patches").shape[-1]))
    x = scale.transform(table(case, "train", "patches").reshape(-1, scale.n_features_in_))
    width, height = case["size"]
    def cut(masks, places):
        return np.stack([m[y:y + size, x:x + size] for m in masks for x, y in places])
    places = case["places"]
    weight = shares(cut(table(case, "train", "masks"), places), grid, classes).reshape(-1, classes)
    rows, y = np.nonzero(weight)
    model = LogisticRegression(C=1 / (config["l2"] * len(x)), tol=1e-10, max_iter=20000)
    model.fit(x[rows], y, sample_weight=weight[rows, y])
    logits = model.decision_function(scale.transform(table(case, "test", "patches").reshape(-1, scale.n_features_in_)))
    logits = logits.reshape(-1, len(places), grid, grid, classes)
    sums = np.zeros((len(logits), height, width, classes))
    counts = np.zeros((height, width, 1))
    for k, (left, top) in enumerate(places):
        counts[top:top + size, left:left + size] += 1
        for image in range(len(logits)):
            sums[image, top:top + size, left:left + size] += resize(logits[image, k], size)
    return confusion(case, table(case, "test", "masks"), (sums / counts).argmax(axis=-1))


def contour(mask):
    """The pixels whose right, lower or lower right neighbour is on the other side, as the toolkit of DAVIS takes them."""
    e, s, se = mask.copy(), mask.copy(), mask.copy()
    e[:, :-1], s[:-1], se[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    edge = (mask ^ e) | (mask ^ s) | (mask ^ se)
    edge[-1], edge[:, -1], edge[-1, -1] = mask[-1] ^ e[-1], mask[:, -1] ^ s[:, -1], False
    return edge


def f_measure(truth, given):
    reach = int(np.ceil(0.008 * np.linalg.norm(truth.shape)))
    y, x = np.ogrid[-reach:reach + 1, -reach:reach + 1]
    disc = x ** 2 + y ** 2 <= reach ** 2
    truth, given = contour(truth), contour(given)
    if not truth.any() or not given.any():
        return float(truth.any() == given.any())
    precision = (given & binary_dilation(truth, disc)).sum() / given.sum()
    recall = (truth & binary_dilation(given, disc)).sum() / truth.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def tracking(case, config):
    j, f = [], []
    for film in case["films"]:
        x, (h, w) = unit(np.array(film["features"]["values"]).reshape(film["features"]["shape"])), film["grid"]
        masks = np.array(film["masks"]["values"]).reshape(film["masks"]["shape"])
        size = masks.shape[1:]
        ph, pw = size[0] // h, size[1] // w
        first = masks[0].copy()
        first[first == 255] = 0
        labels = first.max() + 1
        carried = [np.eye(labels)[first[ph // 2::ph, pw // 2::pw].reshape(-1)]]
        row, column = np.divmod(np.arange(h * w), w)
        far = np.maximum(abs(row[:, None] - row), abs(column[:, None] - column)) > config["radius"]
        for t in range(1, len(x)):
            sources = [0] + list(range(max(t - config["last_frames"], 1), t))
            s = np.concatenate([np.where(far, -np.inf, x[t] @ x[i].T) for i in sources], axis=1)
            known = np.concatenate([carried[i] for i in sources])
            nearest = np.argsort(-s, axis=1, kind="stable")[:, :config["top_k"]]
            weight = np.exp((np.take_along_axis(s, nearest, axis=1) - 1) / config["temperature"])
            weight /= weight.sum(axis=1, keepdims=True)
            carried.append(np.einsum("pk,pkc->pc", weight, known[nearest]))
        for label in range(1, labels):
            if not (first == label).any():
                continue
            of_frames = []
            for t in range(1, len(x) - 1):
                pixels = np.moveaxis(resize(carried[t].reshape(h, w, -1), *size), -1, 0)
                least = pixels.min(axis=(1, 2), keepdims=True)
                span = np.where(pixels.max(axis=(1, 2), keepdims=True) > least, np.ptp(pixels, axis=(1, 2), keepdims=True), 1)
                given, truth = ((pixels - least) / span).argmax(axis=0) == label, masks[t] == label
                union = (given | truth).sum()
                of_frames.append([(given & truth).sum() / union if union else 1.0, f_measure(truth, given)])
            of_object = np.mean(of_frames, axis=0)
            j.append(of_object[0])
            f.append(of_object[1])
    return {"j_and_f": (np.mean(j) + np.mean(f)) / 2, "j": np.mean(j), "f": np.mean(f)}


def correspondence(case, config):
    """Parts are [left, top, width, height] in pixels of an image of case["size"]."""
    a, b = (unit(table(case, part, "patches")) for part in ("from", "to"))
    h, w = case["grid"]
    row, column = np.divmod(np.arange(h * w), w)
    centre = np.stack([(column + 0.5) / w, (row + 0.5) / h], axis=1)
    shape = np.array([w, h]) / max(w, h)
    within, count = np.zeros(2), 0
    for x, y, (first, second) in zip(a, b, np.array(case["parts"], dtype=float)):
        place = (first[:2] + centre * first[2:] - second[:2]) / second[2:]
        inside = ((place >= 0) & (place < 1)).all(axis=1)
        found = centre[(x @ y.T).argmax(axis=1)]
        distance = np.linalg.norm((found - place) * shape, axis=1)[inside]
        within += [(distance <= 0.10).sum(), (distance <= 0.05).sum()]
        count += inside.sum()
    return {"pck_10": within[0] / count, "pck_05": within[1] / count}


def crops(case, config):
    """How far cut and resized parts are from Pillow's, in levels of 255, at most over images."""
    worst = 0.0
    for image, parts, a, b in zip(table(case, "images", "rgb"), case["parts"], table(case, "from", "rgb"), table(case, "to", "rgb")):
        image = Image.fromarray(image.astype(np.uint8))
        for (left, top, width, height), ours in zip(parts, (a, b)):
            size = (ours.shape[1], ours.shape[0])
            theirs = image.crop((left, top, left + width, top + height)).resize(size, Image.BILINEAR)
            worst = max(worst, abs(np.asarray(theirs, dtype=float) - ours).max())
    return {"levels": worst}


def robustness(case, config):
    """k-NN of the features that the probe was given for every corruption and strength."""
    train, labels = table(case, "train", "cls"), case["train"]["labels"]
    model = KNeighborsClassifier(config["k"], metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    model.fit(train, labels)
    right = {name: (model.predict(table(case["of"], name, "cls")) == np.array(case["test"]["labels"])).mean() for name in case["of"]}
    clean = right.pop("clean")
    corrupted = np.mean(list(right.values()))
    return {"clean": clean, "corrupted": corrupted, "kept": corrupted / clean, **right}


def corruptions(case, config):
    """Mean distance, in levels of 255, of corrupted images to those that Pillow and scipy make; of noise in its deviation."""
    clean = table(case["of"], "clean", "rgb").astype(np.uint8)
    side, rng = min(clean.shape[1:3]), np.random.default_rng(0)
    distances = {}
    for name in case["of"]:
        if name == "clean":
            continue
        kind, at = name.split("/")
        at, ours = int(at) - 1, table(case["of"], name, "rgb")
        if kind == "noise":
            noise = [0.08, 0.12, 0.18, 0.26, 0.38][at]
            theirs = np.clip(np.round(clean + 255 * noise * rng.standard_normal(clean.shape)), 0, 255)
            distances[name] = abs((theirs - clean).std() - (ours - clean).std())
            continue
        if kind == "blur":
            sigma = [1, 2, 3, 4, 6][at] * side / 224
            theirs = gaussian_filter(clean.astype(float), (0, sigma, sigma, 0), mode="nearest", truncate=6)
        elif kind == "contrast":
            mean = clean.mean(axis=(1, 2), keepdims=True)
            theirs = np.round(mean + [0.4, 0.3, 0.2, 0.1, 0.05][at] * (clean - mean))
        elif kind == "scale":
            size = [clean.shape[2], clean.shape[1]]
            small = [round(s * [0.6, 0.5, 0.4, 0.3, 0.25][at]) for s in size]
            theirs = np.stack([np.asarray(Image.fromarray(x).resize(small, Image.BILINEAR).resize(size, Image.BILINEAR)) for x in clean])
        else:
            def jpeg(x):
                out = BytesIO()
                Image.fromarray(x).save(out, "JPEG", quality=[25, 18, 15, 10, 7][at], subsampling=0)
                return np.asarray(Image.open(out).convert("RGB"))
            theirs = np.stack([jpeg(x) for x in clean])
        border = int(np.ceil(side / 8))
        inner = np.s_[:, border:-border, border:-border]
        distances[name] = abs(theirs[inner].astype(float) - ours[inner]).mean()
    return distances


def main():
    out = {}
    for name, case in json.load(open(sys.argv[1])).items():
        scores = globals()[name](case, case.get("config"))
        out[name] = {key: float(value) for key, value in scores.items()}
    json.dump(out, sys.stdout)


main()
