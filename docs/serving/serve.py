"""Candidates from a folder that `recgpt export` wrote; this file needs nothing of RecGPT.

    python serve.py --history ID ID ... [--user ID] [--k 20]

It serves the folder that it lies in. Besides numpy it needs what the folder's format says: torch, onnxruntime
or faiss. Inside a service of your own:

    server = Server("folder")
    server.recommend([["id1", "id2"], ["id3"]], users=["u17", None])

What is read here are JSON, .npy without pickles, safetensors, ONNX and faiss's format: none can run code. A
file is read only if it has the checksum of the manifest.

B histories, N rows (one for each continuation of a history), L tokens of the longest, D width.
"""

import argparse
import hashlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PADDING = 0  # item index that is no item
UNKNOWN_USER = 0  # row of the user vectors
POPULARITY_STEP = 0  # of items that are given to users without a history
erf = np.vectorize(math.erf, otypes=[np.float32])  # numpy has none of its own


class Server:
    """An exported model in memory."""

    def __init__(self, folder):
        folder = Path(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        check_files(folder, manifest["files"])
        self.manifest, self.model, self.recall = manifest, manifest["model"], manifest["recall"]
        self.backend = BACKENDS[manifest["format"]](folder, self.model)
        items = json.loads((folder / "items.json").read_text())
        self.item_ids = [None, *items["item_ids"]]
        self.index_of = {item_id: index for index, item_id in enumerate(self.item_ids) if index}
        self.counts = np.array([-1, *items["counts"]])
        self.user_vectors, self.user_hashes = (
            np.load(folder / name, mmap_mode="r") if name in manifest["files"] else None
            for name in ("user_vectors.npy", "user_hashes.npy")
        )

    def recommend(self, histories, users=None, quotas=None):
        """The candidates of several users, as dictionaries of lists: "item_ids", "scores" and "steps".

        Ids are int or str, as the manifest says.
        histories: item ids of each user, the newest last; those that the model does not know are left out.
        users: the id of each user; None for one who is unknown, or for all.
        quotas: the candidates that each step adds; None: as the model's settings say.
        """
        quotas = self.recall["quotas"] if quotas is None else quotas
        if len(quotas) > self.model["max_history"]:
            raise ValueError(f"{len(quotas)} steps do not fit histories of {self.model['max_history']} items")
        window = self.model["max_history"] - (len(quotas) - 1)  # what is appended needs room
        users = [None] * len(histories) if users is None else users
        asked = [self._asked(*pair) for pair in zip(histories, users, strict=True)]
        with_history = [one for one in asked if len(one.items)]
        for step, quota in enumerate(quotas, start=1):
            self._step(with_history, step, quota, window)
        for one in asked:
            if not len(one.items):
                popular = np.argsort(-self.counts, kind="stable")[: min(sum(quotas), len(self.counts) - 1)]
                one.found = [(item, self.counts[item], POPULARITY_STEP) for item in popular]
        return [self._answer(one) for one in asked]

    def _asked(self, history, user):
        items = np.array([self.index_of[item] for item in history if item in self.index_of], np.int64)
        hashed = 0 if user is None else stable_hash(user)
        vector = None
        if self.user_vectors is not None:
            vector = self.user_vectors[UNKNOWN_USER if user is None else self._user_row(hashed)]
        return Asked(items, hashed, vector)

    def _user_row(self, hashed):
        if self.user_hashes is None:
            return hashed % self.model["user"]["buckets"] + 1
        place = int(np.searchsorted(self.user_hashes, hashed))
        known = place < len(self.user_hashes) and self.user_hashes[place] == hashed
        return place + 1 if known else UNKNOWN_USER

    def _step(self, asked, step, quota, window):
        """Find the items of a step for all, and what the next step goes on from."""
        rows = [(one, appended) for one in asked for _, appended in one.branches]
        if not rows:
            return
        interest_ND = self._interest(rows, window)
        excluded = [one.excluded(self.recall["keep_seen"]) for one, _ in rows]
        found_of_row = zip(interest_ND, self.backend.search(interest_ND, quota, excluded), strict=True)
        for one in asked:
            of_branches = [next(found_of_row) for _ in one.branches]
            score_of = {}
            for _, found in of_branches:
                for item, score in found:
                    score_of[item] = max(score, score_of.get(item, score))
            best = sorted(score_of, key=lambda item: (-score_of[item], item))[:quota]
            one.found += [(item, score_of[item], step) for item in best]
            if best:
                scores = np.array([score_of[item] for item in best])
                interest_WD = np.stack([interest_D for interest_D, _ in of_branches])
                vectors_QD = self.backend.vectors(np.array(best))
                one.branches = self._continued(one, interest_WD, vectors_QD, scores, step)

    def _interest(self, rows, window):
        """Interest vectors [N, D] after histories with what was appended, padded to the longest."""
        tails = [one.items[-window:] for one, _ in rows]
        length_N = np.array([len(tail) for tail in tails])
        total_N = length_N + np.array([len(appended) for _, appended in rows])
        items_NL = np.full((len(rows), total_N.max()), PADDING)
        place_L = np.arange(total_N.max())
        items_NL[place_L < length_N[:, None]] = np.concatenate(tails)
        mask_NL = place_L < total_N[:, None]
        appended_NL = mask_NL & (place_L >= length_N[:, None])
        items_NLD = self.backend.vectors(items_NL)
        if appended_NL.any():
            items_NLD[appended_NL] = np.stack([vector for _, appended in rows for vector in appended])
        users_ND = None if self.user_vectors is None else np.stack([one.user_vector for one, _ in rows])
        return self.backend.interest(items_NLD, appended_NL.astype(np.int64), mask_NL, users_ND)

    def _continued(self, one, interest_WD, vectors_QD, scores, step):
        """What the next step goes on from, after a step that found Q items, the best first."""
        how = self.recall["continuation"]
        if how == "beam":
            scores_WQ = interest_WD @ vectors_QD.T
            sums_WQ = np.array([total for total, _ in one.branches])[:, None] + scores_WQ
            order = np.argsort(-sums_WQ, axis=None, kind="stable")[: self.recall["beam_width"]]
            pairs = [divmod(int(place), len(vectors_QD)) for place in order]
            return [(sums_WQ[w, q], [*one.branches[w][1], vectors_QD[q]]) for w, q in pairs]
        weights = np.exp((scores.astype(np.float64) - scores[0]) / self.recall["temperature"])
        if how == "mean":
            appended_D = (weights / weights.sum()).astype(np.float32) @ vectors_QD
            if self.model["similarity"] == "cosine":
                appended_D = unit(appended_D, self.model["members"])
        elif how == "sampled":
            sums = weights.cumsum()
            appended_D = vectors_QD[np.argmax(sums > uniform(one.user_hash, step) * sums[-1])]
        else:
            appended_D = vectors_QD[0]
        return [(0.0, [*one.branches[0][1], appended_D])]

    def _answer(self, one):
        return {
            "item_ids": [self.item_ids[item] for item, _, _ in one.found],
            "scores": [float(score) for _, score, _ in one.found],
            "steps": [step for _, _, step in one.found],
        }


@dataclass
class Asked:
    """A user whose candidates are asked for."""

    items: np.ndarray  # item indices of the history, int64
    user_hash: int
    user_vector: np.ndarray | None
    branches: list = field(default_factory=lambda: [(0.0, [])])
    """Continuations of the history: the sum of the scores of what was appended, and its vectors."""
    found: list = field(default_factory=list)
    """(item index, score, step) of each candidate."""

    def excluded(self, keep_seen):
        """Item indices that are not to be found, int64; padding is one of them."""
        out = np.array([PADDING, *(item for item, _, _ in self.found)])
        return out if keep_seen else np.union1d(self.items, out)


# The formats. Each has ``vectors`` of item indices, ``interest`` vectors of padded histories, and ``search``,
# which gives for each row the best (item index, score) pairs of the items that are not excluded.


class Torch:
    """Format `torch`: weights in safetensors, items in a .npy; on a GPU if there is one."""

    def __init__(self, folder, model):
        import torch

        self.torch, self.model = torch, model
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = read_safetensors(folder / "encoder.safetensors")
        self.weights = {name: self.tensor(array) for name, array in weights.items()}
        # Mapped, not read; copy-on-write, because torch knows no arrays that cannot be written.
        self.items_RD = self.tensor(np.load(folder / "item_vectors.npy", mmap_mode="c"))

    def tensor(self, array):
        return self.torch.from_numpy(array).to(self.device)

    def vectors(self, items):
        return self.items_RD[self.tensor(items)].cpu().numpy()

    def interest(self, *inputs):
        tensors = [None if one is None else self.tensor(one) for one in inputs]
        with self.torch.inference_mode():
            return encode(self.torch, self.torch.erf, self.weights, self.model, *tensors).cpu().numpy()

    def search(self, interest_ND, quota, excluded):
        scores_NR = self.tensor(interest_ND) @ self.items_RD.T
        for scores_R, out in zip(scores_NR, excluded, strict=True):
            scores_R[self.tensor(out)] = -math.inf
        best = scores_NR.topk(min(quota, scores_NR.shape[1]))
        return [pairs(items, scores) for items, scores in zip(best.indices, best.values, strict=True)]


class Onnx:
    """Format `onnx`: the encoder for ONNX Runtime, items in a .npy."""

    def __init__(self, folder, model):
        import onnxruntime

        providers = ["CPUExecutionProvider"]  # others: see onnxruntime.get_available_providers()
        self.session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"), providers=providers)
        self.items_RD = np.load(folder / "item_vectors.npy", mmap_mode="r")

    def vectors(self, items):
        return self.items_RD[items]

    def interest(self, *inputs):
        names = [one.name for one in self.session.get_inputs()]  # without user_vectors if not personal
        return self.session.run(["interest"], dict(zip(names, inputs, strict=False)))[0]

    def search(self, interest_ND, quota, excluded):
        scores_NR = interest_ND @ self.items_RD.T
        lists = []
        for scores_R, out in zip(scores_NR, excluded, strict=True):
            scores_R[out] = -math.inf
            best = np.argpartition(-scores_R, min(quota, len(scores_R)) - 1)[:quota]
            best = best[np.argsort(-scores_R[best])]
            lists.append(pairs(best, scores_R[best]))
        return lists


class Faiss:
    """Format `faiss`: items in an exact index, the encoder's weights for numpy."""

    def __init__(self, folder, model):
        import faiss

        self.model = model
        self.weights = read_safetensors(folder / "encoder.safetensors")
        self.index = faiss.read_index(str(folder / "items.faiss"))  # its ids are item indices
        self.flat = faiss.downcast_index(self.index.index)  # place i is item i + 1

    def vectors(self, items):
        places = np.maximum(items - 1, 0).ravel()  # for padding any vector will do
        return self.flat.reconstruct_batch(places).reshape(*items.shape, -1)

    def interest(self, *inputs):
        return encode(np, erf, self.weights, self.model, *inputs)

    def search(self, interest_ND, quota, excluded):
        fetched = min(quota + max(map(len, excluded)), self.index.ntotal)
        lists = []
        for scores, items, out in zip(*self.index.search(interest_ND, fetched), excluded, strict=True):
            kept = ~np.isin(items, out)
            lists.append(pairs(items[kept][:quota], scores[kept][:quota]))
        return lists


def pairs(items, scores):
    """(item index, score) of arrays of torch or numpy, without items that are excluded."""
    together = zip(items.tolist(), scores.tolist(), strict=True)
    return [(item, score) for item, score in together if score > -math.inf]


BACKENDS = {"torch": Torch, "onnx": Onnx, "faiss": Faiss}


def encode(xp, erf, weights, model, items_BLD, segments_BL, mask_BL, users_BD):
    """Interest vectors [B, D] after the last token of each history; there is padding where mask is False.

    The whole GPT, in what torch and numpy have in common: xp is one of them, the rest are arrays of its kind.
    """

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        shares = x.reshape(*x.shape[:-1], model["members"], -1)
        shares = shares - shares.mean(-1, keepdims=True)
        shares = shares / xp.sqrt((shares * shares).mean(-1, keepdims=True) + 1e-5)
        return shares.reshape(x.shape) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    positions_BL = (mask_BL.cumsum(1) - 1).clip(min=0)
    x_BLD = items_BLD + weights["position.weight"][positions_BL] + weights["segment.weight"][segments_BL]
    if users_BD is not None:
        users_BLD = users_BD[:, None] + xp.zeros_like(items_BLD)
        if "user_gate.weight" in weights:
            gate_BLD = linear("user_gate", xp.concatenate([items_BLD, users_BLD], -1))
            users_BLD = users_BLD / (1 + xp.exp(-gate_BLD))
        x_BLD = x_BLD + users_BLD
    place_L = xp.ones_like(mask_BL[0]).cumsum(0) - 1
    # A token sees itself even where it is padding: the softmax over nothing would be NaN.
    itself_LL, earlier_LL = place_L[:, None] == place_L, place_L[:, None] >= place_L
    visible_B1LL = (itself_LL | earlier_LL & mask_BL[:, None])[:, None]
    for block in (f"blocks.{layer}" for layer in range(model["layers"])):
        qkv = linear(f"{block}.attention.query_key_value", norm(f"{block}.attention_norm", x_BLD))
        qkv = qkv.reshape(*mask_BL.shape, 3, model["heads"] * model["members"], -1)
        query, key, value = (qkv[:, :, part].swapaxes(1, 2) for part in range(3))
        scores = xp.where(visible_B1LL, query @ key.swapaxes(2, 3) / math.sqrt(query.shape[-1]), -math.inf)
        shares = xp.exp(scores - xp.amax(scores, -1, keepdims=True))
        attended = shares / shares.sum(-1, keepdims=True) @ value
        x_BLD = x_BLD + linear(f"{block}.attention.output", attended.swapaxes(1, 2).reshape(x_BLD.shape))
        inner = linear(f"{block}.feed_forward.0", norm(f"{block}.feed_forward_norm", x_BLD))
        x_BLD = x_BLD + linear(f"{block}.feed_forward.2", inner * (1 + erf(inner / math.sqrt(2))) / 2)  # GELU
    interest_BD = norm("final_norm", x_BLD[xp.arange(len(x_BLD)), xp.amax(mask_BL * place_L, 1)])
    if model["similarity"] == "cosine":
        interest_BD = unit(interest_BD, model["members"]) / model["temperature"]
    return interest_BD / model["members"]


def unit(x, members):
    """Vectors of which each member's share is divided by its length."""
    shares = x.reshape(*x.shape[:-1], members, -1)
    return (shares / (shares * shares).sum(-1, keepdims=True).clip(min=1e-24) ** 0.5).reshape(x.shape)


def check_files(folder, files):
    """Raises ``ValueError`` if a file is not the one that was exported."""
    for name, expected in files.items():
        if hashlib.sha256(np.memmap(folder / name, mode="r")).hexdigest() != expected["sha256"]:
            raise ValueError(f"{folder / name}: not the file that was exported (its SHA-256 differs)")


def read_safetensors(path):
    """The float32 tensors of a file, as numpy arrays in mapped memory."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "c", offset=8 + length)
    return {
        name: data[slice(*entry["data_offsets"])].view("<f4").reshape(entry["shape"])
        for name, entry in header.items()
    }


def stable_hash(user):
    """The hash of a user id (int or str) by which the model knows the user, a signed number of 64 bits."""
    if isinstance(user, int):
        hashed = mixed(user)
    else:
        data = user.encode()
        words = [int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), 8)]
        total = sum(mixed(word + mixed(place)) for place, word in enumerate(words))
        hashed = mixed(total + mixed(len(data)))
    return hashed - 2**64 if hashed >= 2**63 else hashed


def uniform(user_hash, step):
    """The number in [0, 1) by which continuation `sampled` draws."""
    return (mixed(mixed(user_hash) ^ mixed(step)) >> 11) * 2.0**-53


def mixed(x):
    """The finalizer of SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def scaled(quotas, k):
    """Quotas in the same proportion that sum to k, at least 1 each; fewer steps if k is too small."""
    steps = min(len(quotas), k)
    result = []
    for step in range(steps - 1):
        wanted = round(sum(quotas[: step + 1]) * k / sum(quotas)) - sum(result)
        result.append(min(max(wanted, 1), k - sum(result) - (steps - 1 - step)))
    return [*result, k - sum(result)]


def main():
    parser = argparse.ArgumentParser(description="Print the candidates of one user as JSON.")
    parser.add_argument("--history", nargs="*", default=[], metavar="ID", help="item ids, the newest last")
    parser.add_argument("--user", metavar="ID", help="the user's id; unknown without it")
    parser.add_argument("--k", type=int, metavar="N", help="how many; as the model's settings say without it")
    options = parser.parse_args()
    if options.k is not None and options.k < 1:
        parser.error(f"--k {options.k}: ask for at least 1 candidate")
    server = Server(Path(__file__).parent)
    try:
        item, user = (int if server.manifest[f"{of}_id_type"] == "int64" else str for of in ("item", "user"))
        history = [item(text) for text in options.history]
        users = None if options.user is None else [user(options.user)]
    except ValueError as error:
        parser.error(f"the ids are integers: {error}")
    if unknown := [one for one in history if one not in server.index_of]:
        print(f"serve.py: the model does not know {unknown}; left out", file=sys.stderr)
    quotas = server.recall["quotas"]
    quotas = quotas if options.k is None else scaled(quotas, options.k)
    print(json.dumps(server.recommend([history], users, quotas)[0]))


if __name__ == "__main__":
    main()
