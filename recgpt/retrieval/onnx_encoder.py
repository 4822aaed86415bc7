"""The GPT as an ONNX graph: from the vectors of padded histories to interest vectors.

It is written node by node: exporters of PyTorch programs are slow even for the smallest model, need a further
package, and write what their release has them write. Tables of items and users stay outside, so that the
graph is small, and so that anything can be appended to a history: an item, or the mean of several.

Shapes: B histories, L places of the longest with padding, D width, H heads, K width per head, M members of
the model, S = D / M width of a member, N vectors. In the graph B is called ``batch`` and L ``length``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recgpt.config import ModelSettings
from recgpt.errors import UserError
from recgpt.model.attention import Layout, offsets_of_lengths
from recgpt.model.gpt import GPT
from recgpt.model.members import weights_as_one

ENCODER_FILE = "encoder.onnx"
OPSET = 20  # the first with GELU as one node; ONNX Runtime knows it from 1.17 on
IR_VERSION = 9  # of the file, belongs to the opset
_MOST_BYTES_INSIDE = 2**30  # of weights; a file of protocol buffers holds 2 GiB at most
_ROUNDING = 1e-3  # of the largest value; what is off by more is wrong otherwise


def import_onnx() -> tuple[Any, Any]:
    """ONNX and ONNX Runtime, optional packages. Raises ``UserError`` that says how to install them."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise UserError("--format onnx needs ONNX and its runtime: pip install 'recgpt[onnx]'") from None
    return onnx, onnxruntime


def save_encoder(folder: Path, gpt: GPT) -> None:
    """Write ``encoder.onnx`` into a local folder, and check that ONNX Runtime computes what the GPT does.

    Its inputs are ``item_vectors``, float32 [B, L, D]; ``segments``, int64 [B, L], 0 real or 1 generated;
    ``mask``, bool [B, L], false where there is padding, on whichever side; and, if the model is personal,
    ``user_vectors``, float32 [B, D]. Its output is ``interest``, float32 [B, D], after each last token.
    Weights of more than a GiB go into a file beside it.
    Raises ``UserError`` without ONNX, or if the runtime computes something else.
    """
    onnx, onnxruntime = import_onnx()
    model = _model(onnx, gpt)
    large = sum(len(weight.raw_data) for weight in model.graph.initializer) > _MOST_BYTES_INSIDE
    path = folder / ENCODER_FILE
    onnx.save_model(model, path, save_as_external_data=large, location=f"{ENCODER_FILE}.data")
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for length in sorted({1, min(3, gpt.settings.max_history), gpt.settings.max_history}):
        _check(session, gpt, length)


class _Graph:
    """Nodes in their order, and the constants that they read."""

    def __init__(self, onnx: Any, weights: dict[str, Tensor], settings: ModelSettings):
        self.onnx = onnx
        self.weights = weights
        self.members, self.width = settings.members, settings.width
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or a list of them if there are several."""
        names = [f"{kind}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(f"integers_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(f"number_{value}", np.array(value, np.float32))

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name].numpy())

    def linear(self, name: str, x: str) -> str:
        transposed = self.constant(f"{name}.weight", self.weights[f"{name}.weight"].numpy().T)
        return self.op("Add", self.op("MatMul", x, transposed), self.weight(f"{name}.bias"))

    def norm(self, name: str, x: str) -> str:
        scale, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        if self.members == 1:
            return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)
        one = self.constant("one", np.ones(self.width, np.float32))
        normed = self.op("LayerNormalization", self.shares(x), one, axis=-1, epsilon=1e-5)
        normed = self.op("Reshape", normed, self.op("Shape", x))
        return self.op("Add", self.op("Mul", normed, scale), shift)

    def shares(self, x: str) -> str:
        """[N, M, S] of vectors whose last dimension is D = M x S."""
        return self.op("Reshape", x, self.integers(-1, self.members, self.width))


def _model(onnx: Any, gpt: GPT) -> Any:
    settings = gpt.settings
    graph = _Graph(onnx, {name: value.cpu() for name, value in weights_as_one(gpt).items()}, settings)
    places_L = _places(graph)
    x_BLD = _embedded(graph, settings)
    hidden_B1LL = _hidden(graph, places_L)
    for layer in range(settings.layers):
        x_BLD = _block(graph, f"blocks.{layer}", settings, x_BLD, hidden_B1LL)
    interest_BD = _interest(graph, settings, x_BLD, places_L)
    graph.nodes.append(onnx.helper.make_node("Identity", [interest_BD], ["interest"]))
    float32, int64, boolean = (getattr(onnx.TensorProto, kind) for kind in ("FLOAT", "INT64", "BOOL"))
    inputs = [
        ("item_vectors", float32, ["batch", "length", settings.vector_width]),
        ("segments", int64, ["batch", "length"]),
        ("mask", boolean, ["batch", "length"]),
    ]
    if settings.user.kind != "none":
        inputs.append(("user_vectors", float32, ["batch", settings.vector_width]))
    output = onnx.helper.make_tensor_value_info("interest", float32, ["batch", settings.vector_width])
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "RecGPT",
            [onnx.helper.make_tensor_value_info(*one) for one in inputs],
            [output],
            list(graph.constants.values()),
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="RecGPT",
    )


def _places(graph: _Graph) -> str:
    """0 to L - 1, int64 [L]."""
    length = graph.op("Squeeze", graph.op("Shape", "mask", start=1, end=2))
    zero, one = (graph.constant(f"scalar_{value}", np.array(value, np.int64)) for value in (0, 1))
    return graph.op("Range", zero, length, one)


def _embedded(graph: _Graph, settings: ModelSettings) -> str:
    """The sums of item, position, segment and user vectors, [B, L, D]."""
    real_BL = graph.op("Cast", "mask", to=graph.onnx.TensorProto.INT64)
    count_BL = graph.op("CumSum", real_BL, graph.integers(1))
    position_BL = graph.op("Max", graph.op("Sub", count_BL, graph.integers(1)), graph.integers(0))
    x_BLD = graph.op("Add", "item_vectors", graph.op("Gather", graph.weight("position.weight"), position_BL))
    x_BLD = graph.op("Add", x_BLD, graph.op("Gather", graph.weight("segment.weight"), "segments"))
    if settings.user.kind == "none":
        return x_BLD
    user_BLD = graph.op("Unsqueeze", "user_vectors", graph.integers(1))
    if settings.user.combine == "gate":
        user_BLD = graph.op("Expand", user_BLD, graph.op("Shape", "item_vectors"))
        both = graph.op("Concat", "item_vectors", user_BLD, axis=-1)
        user_BLD = graph.op("Mul", user_BLD, graph.op("Sigmoid", graph.linear("user_gate", both)))
    return graph.op("Add", x_BLD, user_BLD)


def _hidden(graph: _Graph, places_L: str) -> str:
    """0 where a token is seen by another and minus infinity where not, float32 [B, 1, L, L]."""
    place_L1 = graph.op("Unsqueeze", places_L, graph.integers(1))
    earlier_LL = graph.op("GreaterOrEqual", place_L1, places_L)
    seen_BLL = graph.op("And", earlier_LL, graph.op("Unsqueeze", "mask", graph.integers(1)))
    # A token sees itself even where it is padding: the softmax over nothing would be NaN.
    seen_BLL = graph.op("Or", seen_BLL, graph.op("Equal", place_L1, places_L))
    hidden_BLL = graph.op("Where", seen_BLL, graph.number(0.0), graph.number(float("-inf")))
    return graph.op("Unsqueeze", hidden_BLL, graph.integers(1))


def _block(graph: _Graph, name: str, settings: ModelSettings, x_BLD: str, hidden_B1LL: str) -> str:
    heads, head_width = settings.heads * settings.members, settings.width // settings.heads
    normed = graph.norm(f"{name}.attention_norm", x_BLD)
    qkv = graph.linear(f"{name}.attention.query_key_value", normed)
    qkv_BL3HK = graph.op("Reshape", qkv, graph.integers(0, 0, 3, heads, head_width))
    qkv_3BHLK = graph.op("Transpose", qkv_BL3HK, perm=[2, 0, 3, 1, 4])
    query, key, value = (
        graph.op("Squeeze", part, graph.integers(0))
        for part in graph.op("Split", qkv_3BHLK, outputs=3, axis=0, num_outputs=3)
    )
    scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = graph.op("Add", graph.op("Mul", scores, graph.number(head_width**-0.5)), hidden_B1LL)
    attended = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3])
    attended_BLD = graph.op("Reshape", attended, graph.integers(0, 0, settings.vector_width))
    x_BLD = graph.op("Add", x_BLD, graph.linear(f"{name}.attention.output", attended_BLD))
    inner = graph.linear(f"{name}.feed_forward.0", graph.norm(f"{name}.feed_forward_norm", x_BLD))
    return graph.op("Add", x_BLD, graph.linear(f"{name}.feed_forward.2", graph.op("Gelu", inner)))


def _interest(graph: _Graph, settings: ModelSettings, x_BLD: str, places_L: str) -> str:
    """What the GPT puts out after the last real token, [B, D]."""
    real_BL = graph.op("Cast", "mask", to=graph.onnx.TensorProto.INT64)
    last_B1 = graph.op("ReduceMax", graph.op("Mul", real_BL, places_L), graph.integers(1), keepdims=1)
    interest_BD = graph.norm("final_norm", graph.op("GatherND", x_BLD, last_B1, batch_dims=1))
    if settings.similarity == "dot":
        return graph.op("Div", interest_BD, graph.number(float(settings.members)))
    share_BMS = graph.shares(interest_BD)
    length_BM1 = graph.op("ReduceL2", share_BMS, graph.integers(2), keepdims=1)
    unit_BMS = graph.op("Div", share_BMS, graph.op("Max", length_BM1, graph.number(1e-12)))
    unit_BD = graph.op("Reshape", unit_BMS, graph.op("Shape", interest_BD))
    return graph.op("Div", unit_BD, graph.number(settings.temperature * settings.members))


def _check(session: Any, gpt: GPT, longest: int) -> None:
    """Raises ``UserError`` if the runtime computes other interest vectors than the GPT, of random tokens."""
    generator = torch.Generator().manual_seed(longest)
    length_B = torch.tensor([longest, 1, (longest + 1) // 2])
    mask_BL = torch.arange(longest) < length_B[:, None]
    mask_BL[-1] = mask_BL[-1].flip(0)  # padded on the left, the others on the right
    item_BLD = torch.randn(*mask_BL.shape, gpt.settings.vector_width, generator=generator)
    segment_BL = torch.randint(0, 2, mask_BL.shape, generator=generator)
    user_row_B = torch.tensor([1, 0, 1])
    layout = Layout.from_offsets(offsets_of_lengths(length_B))
    inputs = {"item_vectors": item_BLD, "segments": segment_BL, "mask": mask_BL}
    with torch.inference_mode():
        expected_TD = gpt(item_BLD[mask_BL], layout, user_row_B, segment_BL[mask_BL])
        if gpt.user is not None:
            inputs["user_vectors"] = gpt.user(user_row_B)
    found_BD = session.run(["interest"], {name: value.numpy() for name, value in inputs.items()})[0]
    expected_BD = expected_TD[layout.offsets[1:] - 1].numpy()
    off = np.abs(found_BD - expected_BD).max() / np.abs(expected_BD).max()
    if not off < _ROUNDING:
        raise UserError(
            f"ONNX Runtime computes interest vectors that are off by {off:.2%}: pip install -U onnxruntime"
        )
