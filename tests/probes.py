"""The other side of tests/tests/probes.rs: scores of probes by scikit-learn and numpy, given the same features.

probes.py CASES    for every probe in the JSON file: its scores
"""

import json
import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, confusion_matrix
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


def resize(x, size):
    """Bilinear, align_corners = false: [h, w, c] to [size, size, c]."""
    def matrix(n):
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        m = np.zeros((size, n))
        m[np.arange(size), low] += 1 - (at - low)
        m[np.arange(size), np.minimum(low + 1, n - 1)] += at - low
        return m
    return np.einsum("yh,xw,hwc->yxc", matrix(x.shape[0]), matrix(x.shape[1]), x)


def shares(masks, grid, classes):
    """Shares of classes among a patch's pixels, over all of known class."""
    n, size, p = len(masks), masks.shape[1], masks.shape[1] // grid
    patches = masks.reshape(n, grid, p, grid, p).transpose(0, 1, 3, 2, 4).reshape(n, grid * grid, p * p)
    counts = np.stack([(patches == c).sum(axis=-1) for c in range(classes)], axis=-1)
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def segmentation(case, logits):
    """logits: [images, patches, classes]."""
    masks, classes, grid = table(case, "test", "masks"), case["classes"], case["grid"]
    predicted = np.stack([resize(x.reshape(grid, grid, -1), masks.shape[1]).argmax(axis=-1) for x in logits])
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


def main():
    out = {}
    for name, case in json.load(open(sys.argv[1])).items():
        scores = globals()[name](case, case["config"])
        out[name] = {key: float(value) for key, value in scores.items()}
    json.dump(out, sys.stdout)


main()
