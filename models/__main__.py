"""Write a model of the catalogue to a file.

python -m onnxmesh.models llama-70b llama.onnx --layers 2 --weights none
"""

from __future__ import annotations

from typing import Any

import click

from onnxmesh.models.catalogue import CATALOGUE, WEIGHTS, save


@click.command()
@click.argument("name", type=click.Choice(list(CATALOGUE)))
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("--layers", type=int, help="Blocks of each kind; the real number without it.")
@click.option("--weights", type=click.Choice(WEIGHTS), default="random", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--opset", type=int, default=23, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]))
def main(name: str, path: str, layers: int | None, weights: str, seed: int, opset: int, dtype: str | None) -> None:
    """Write the model NAME to the file PATH."""
    changes: dict[str, Any] = {"opset": opset} | ({"dtype": dtype} if dtype else {})
    save(name, path, layers, weights, seed, **changes)


if __name__ == "__main__":
    main()
