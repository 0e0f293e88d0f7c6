"""Export the recurrent models of this folder, with small random weights, by both of torch's exporters.

    python tests/recurrent/export.py

Needs torch, onnx and onnxscript (the `export` extra).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

FOLDER = Path(__file__).resolve().parent
OPSETS = {"ts": 17, "dynamo": 20}
BATCH, SOURCE, TARGET, WORDS, WIDTH = 4, 7, 5, 40, 16


class Classifier(nn.Module):
    """Two bidirectional LSTM layers over words, and a head on their last states."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.LSTM(WIDTH, WIDTH, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, 96), nn.ReLU(), nn.Linear(96, 8))

    def forward(self, ids: Tensor) -> Tensor:
        _, (last, _) = self.layers(self.words(ids))
        return self.head(torch.cat([last[-2], last[-1]], dim=1))


class Tagger(nn.Module):
    """A GRU over sequences of different lengths, and a label for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.GRU(WIDTH, WIDTH, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 12)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(self.words(ids), lengths)
        states, _ = rnn.pad_packed_sequence(self.layer(packed)[0], total_length=SOURCE)
        return self.head(states)


class Translator(nn.Module):
    """A GRU that reads, a GRU that writes, and attention of the one to the other (Luong et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.reader = nn.GRU(WIDTH, 2 * WIDTH, batch_first=True)
        self.writer = nn.GRU(WIDTH, 2 * WIDTH, batch_first=True)
        self.join = nn.Linear(4 * WIDTH, 96)
        self.head = nn.Linear(96, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read, last = self.reader(self.source(source))
        written, _ = self.writer(self.target(target), last)
        weights = torch.softmax(written @ read.transpose(1, 2), dim=-1)
        return self.head(torch.tanh(self.join(torch.cat([weights @ read, written], dim=2))))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, WORDS, shape)


MODELS: dict[str, tuple[type[nn.Module], dict[str, Tensor], Sequence[str]]] = {
    "classifier": (Classifier, {"ids": ids(BATCH, SOURCE)}, ("ts", "dynamo")),
    "tagger": (Tagger, {"ids": ids(SOURCE, BATCH), "lengths": torch.tensor([7, 6, 3, 1])}, ("ts",)),
    "translator": (Translator, {"source": ids(BATCH, SOURCE), "target": ids(BATCH, TARGET)}, ("ts", "dynamo")),
}
"""The model, its inputs by name, and the exporters that can write it: a packed sequence only one."""


def randomise(module: nn.Module) -> None:
    """Random weights, each from a seed of its own name."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))))


def stripped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Take out the exporter's notes, of which stack traces are most."""
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
            del part.metadata_props[:]
            part.ClearField("doc_string")
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    del proto.metadata_props[:]
    return proto


def main() -> None:
    """Write every model by every exporter that can."""
    for name, (build, inputs, exporters) in MODELS.items():
        module = build().eval()
        randomise(module)
        for exporter in exporters:
            path = str(FOLDER / f"{name}_{exporter}.onnx")
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=["y"],
                opset_version=OPSETS[exporter],
                dynamo=exporter == "dynamo",
                external_data=False,
            )
            onnx.save(stripped(onnx.load(path)), path)


if __name__ == "__main__":
    main()
