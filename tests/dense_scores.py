"""The other side of tests/tests/scores/dense_scores.rs: label-free scores of patch features, stated in NumPy.

dense_scores.py CASES    for every case in the JSON file: its scores by name
"""

import json
import sys

import numpy as np


def rank(rows, epsilon):
    s = np.linalg.svd(rows, compute_uv=False)
    p = s / s.sum() + epsilon
    return np.exp(-(p * np.log(p)).sum())


def effective_rank(case):
    """RankMe, arXiv:2210.02885, equation 1."""
    cls, patches = np.array(case["cls"]), np.array(case["patches"])
    return {"cls": rank(cls, 1e-7), "patches": rank(patches.reshape(-1, patches.shape[-1]), 1e-7)}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def patch_spread(case):
    """Half of the mean squared distance of two patches, drawn with return, of one image and of any."""
    x = unit(np.array(case["patches"]))

    def spread(rows):
        return ((rows[:, None] - rows[None]) ** 2).sum(-1).mean() / 2

    within, total = np.mean([spread(rows) for rows in x]), spread(x.reshape(-1, x.shape[-1]))
    return {"within": within, "total": total, "share": within / total}


def radii(rows, labels):
    for label in np.unique(labels):
        group = rows[labels == label]
        n, d = group.shape
        s = np.linalg.svd(group - group.mean(0), compute_uv=False)
        yield s.sum() / np.sqrt(max(n - 1, d))


def dse(case):
    """DSE as in EldercatSAM/SSL-Degradation, estimator.py, for patches whose groups are given."""
    x, labels = unit(np.array(case["patches"])), np.array(case["groups"])
    b, p, d = x.shape
    scale = np.linalg.norm(x - x.mean((0, 1)), axis=-1).mean()
    of_images = np.mean([np.mean(list(radii(rows, own))) for rows, own in zip(x, labels)])
    apart, of_batches = [], []
    for first in range(0, b, case["batch_images"]):
        rows = x[first : first + case["batch_images"]].reshape(-1, d)
        own = labels[first : first + case["batch_images"]].reshape(-1)
        of_batches += radii(rows, own)
        centers = {label: rows[own == label].mean(0) for label in np.unique(own)}
        near = lambda row, label: min(np.linalg.norm(row - c) for other, c in centers.items() if other != label)
        apart.append(np.mean([near(row, label) for row, label in zip(rows, own)]))
    independent = [np.stack([x[i, order[place]] for i, order in enumerate(case["orders"])]) for place in range(p)]
    scores = {
        "inter": np.mean(apart) / scale,
        "intra_image": of_images / scale,
        "intra_batch": np.mean(of_batches) / scale,
        "dim": np.mean([rank(rows, 1e-12) for rows in independent]) / min(b, d),
    }
    scores["dse"] = scores["inter"] - (scores["intra_image"] + scores["intra_batch"]) / 2 + scores["dim"]
    return scores


STATEMENTS = {"effective_rank": effective_rank, "patch_spread": patch_spread, "dse": dse}
print(json.dumps([STATEMENTS[case["probe"]](case) for case in json.load(open(sys.argv[1]))]))
