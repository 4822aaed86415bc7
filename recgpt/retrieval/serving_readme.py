"""The README.txt of a model that is handed over: what the folder holds, what goes in and what comes out."""

from collections.abc import Sequence

from recgpt.config import ModelSettings
from recgpt.model.export import ModelInfo
from recgpt.retrieval.onnx_encoder import OPSET

_NEEDS = {"torch": "torch", "onnx": "onnxruntime", "faiss": "faiss-cpu"}

_FILES = {
    "encoder.safetensors": "the weights of the encoder, float32",
    "encoder.onnx": "the encoder, ONNX opset {opset}",
    "encoder.onnx.data": "its weights",
    "item_vectors.npy": "float32 [{rows}, {width}]: row i is item i, row 0 is padding and no item",
    "items.faiss": "exact index by inner product, {items} vectors of {width}; ids are item indices",
    "items.json": '"item_ids": the ids of items 1 to {items}; "counts": how often the log holds each',
    "user_vectors.npy": "float32 [rows, {width}]: row 0 is that of users whom the model does not know",
    "user_hashes.npy": "int64, ascending: the hashes of the users of rows 1, 2, ...",
    "manifest.json": "format, settings, releases; size and SHA-256 of the files above",
}

_TEXT = """\
A model made by RecGPT, for serving (format {format})

    python serve.py --history ID ID ... [--user ID] --k 20

prints one line of JSON: "item_ids", "scores" and "steps", the best first. serve.py needs Python 3.10 or
newer, numpy and {needs}, and nothing of RecGPT. In a service of your own,
Server(folder).recommend(histories, users) takes a batch.

FILES

{files}

All arrays are little-endian and in order of rows. Nothing here can run code when it is read, serve.py apart.

ENCODER

{encoder}
  in   item_vectors  float32 [batch, length, {width}]  the vector of each token, the newest last
  in   segments      int64   [batch, length]  0: chosen by the user, 1: appended by recall
  in   mask          bool    [batch, length]  false where there is padding, on the left or on the right
{user_input}  out  interest      float32 [batch, {width}]  after the last token of each history
{user_row}
Batch and length are free, the length up to {max_history}: of longer histories take the newest tokens. At
least one token of each history is real; who has no history gets the items with the highest counts.

RECALL

1. The score of an item is the dot product of its vector and the interest vector. Leave out what the user has
   seen{keep_seen}, and take the best.
2. To go on, append one more token with segment 1 and encode again: {continuation}
   Keep room for it within the {max_history} tokens. Take the best of what was not found before.

This model takes {quotas} from its steps. Scores can be compared within a step only.
"""

_ENCODERS = {
    "torch": "encode() in serve.py computes it in torch from encoder.safetensors.",
    "onnx": "encoder.onnx is a graph with these inputs and output.",
    "faiss": "encode() in serve.py computes it in numpy from encoder.safetensors.",
}

_USER_INPUT = "  in   user_vectors  float32 [batch, {width}]  a row of user_vectors.npy\n"
_USER_ROWS = {
    "none": "",
    "hashed": "\nA user's row is stable_hash(id) mod {buckets} + 1; without an id it is 0.\n",
    "table": "\nA user's row is the place of stable_hash(id) in user_hashes.npy, from 1 on, or 0.\n",
}

_CONTINUATIONS = {
    "mean": "the mean of what the step\n   found, weighted by exp(score / {temperature:g}){unit}.",
    "best": "the best item that the step\n   found.",
    "sampled": "one item that the step\n   found, drawn in proportion to exp(score / {temperature:g}).",
    "beam": "one item that the step\n   found, in {beam_width} continuations side by side.",
}


def _unit(model: ModelSettings) -> str:
    if model.similarity == "dot":
        return ""
    if model.members == 1:
        return " and brought to length 1"
    return f" and each of its {model.members} parts of {model.width} values brought to length 1"


def readme(format: str, info: ModelInfo, files: Sequence[str]) -> str:
    """The text for a folder of this format that holds these files of data."""
    model, recall = info.model, info.recall
    values = {
        "opset": OPSET,
        "width": model.vector_width,
        "items": info.num_items,
        "rows": info.num_items + 1,
        "buckets": model.user.buckets,
        "temperature": recall.temperature,
        "beam_width": recall.beam_width,
        "unit": _unit(model),
    }
    listed = [*files, "manifest.json"]
    longest = max(map(len, listed))
    return _TEXT.format(
        format=format,
        needs=_NEEDS[format],
        files="\n".join(f"  {name:{longest}}  {_FILES[name].format(**values)}" for name in listed),
        encoder=_ENCODERS[format],
        user_input="" if model.user.kind == "none" else _USER_INPUT.format(**values),
        user_row=_USER_ROWS[model.user.kind].format(**values),
        keep_seen=" (this model is set to keep it)" if recall.keep_seen else "",
        continuation=_CONTINUATIONS[recall.continuation].format(**values),
        max_history=model.max_history,
        quotas=" + ".join(map(str, recall.quotas)),
        width=model.vector_width,
    )
