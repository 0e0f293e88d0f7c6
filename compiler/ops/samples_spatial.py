"""Samples of ops over spatial dims, in the notation of compiler/ops/samples.py: (op, signature, attributes)."""

from __future__ import annotations

from typing import Any

POOL: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("MaxPool", "f[2,12,8] -> f[2,12,4]", {"kernel_shape": [2], "strides": [2]}),
    ("MaxPool", "f[2,12,5,6] -> f[2,12,4,4], i[2,12,4,4]", {"kernel_shape": [2, 3]}),
    ("MaxPool", "u[6,13,5] -> u[6,13,3]", {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
    ("MaxUnpool", "f[2,12,2,2], i<9[2,12,2,2] -> f[2,12,4,4]", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("AveragePool", "f[2,12,6,6] -> f[2,12,6,6]", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", "f[2,6,12,6] -> f[2,6,4,4]", {"kernel_shape": [3, 3], "strides": [3, 1]}),
    ("MaxPool", "f[2,6,13] -> f[2,6,6]", {"kernel_shape": [2], "strides": [2]}),
    ("AveragePool", "f[6,13,7] -> f[6,13,4]", {"kernel_shape": [2], "strides": [2], "ceil_mode": 1}),
    ("GlobalMaxPool", "f[2,12,6] -> f[2,12,1]", {}),
    ("GlobalAveragePool", "f[6,12,2,3] -> f[6,12,1,1]", {}),
    ("GlobalLpPool", "f[2,12,7,8] -> f[2,12,1,1]", {"p": 3}),
    ("RoiAlign", "f[2,12,6,8], p[6,4], i<2[6] -> f[6,12,2,2]", {"spatial_scale": 6.0, "sampling_ratio": 2}),
    ("RoiAlign", "f[2,12,6,8], p[13,4], i<2[13] -> f[13,12,2,2]", {"spatial_scale": 6.0, "mode": "max"}),
    ("MaxRoiPool", "f[2,12,6,8], p[6,5] -> f[6,12,2,2]", {"spatial_scale": 6.0, "pooled_shape": [2, 2]}),
)

_CROP = {"coordinate_transformation_mode": "tf_crop_and_resize", "mode": "linear"}
IMAGE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Resize", "f[2,12,4] -> f[2,12,8]", {"mode": "nearest"}),
    ("Resize", "f[2,6,4,12] -> f[2,6,12,18]", {"mode": "nearest"}),
    (
        "Resize",
        "f[2,6,8] -> f[2,6,24]",
        {
            "mode": "nearest",
            "scales": [1.0, 1.0, 3.0],
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
    ),
    ("Resize", "f[6,12,4,4] -> f[6,12,8,8]", {"mode": "linear"}),
    ("Resize", "f[4,6,12,13] -> f[4,6,12,6]", {"mode": "cubic", "antialias": 1}),
    ("Resize", "f[4,6,12] -> f[4,6,12]", {"mode": "linear", "scales": [1.0, 1.0, 1.05]}),
    ("Resize", "f[4,12,6,8], p[4] -> f[4,12,6,3]", {**_CROP, "axes": [2, 3]}),
    ("AffineGrid", "f[12,2,3] -> f[12,3,4,2]", {}),
    ("AffineGrid", "f[6,3,4] -> f[6,2,3,4,3]", {"align_corners": 1}),
    ("DepthToSpace", "f[6,12,2,4] -> f[6,3,4,8]", {"blocksize": 2}),
    ("DepthToSpace", "f[1,48,2,3] -> f[1,12,4,6]", {"blocksize": 2}),
    ("DepthToSpace", "f[1,48,2,3] -> f[1,12,4,6]", {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", "f[6,3,4,8] -> f[6,12,2,4]", {"blocksize": 2}),
    ("SpaceToDepth", "f[1,12,4,6] -> f[1,48,2,3]", {"blocksize": 2, "mode": "CRD"}),
    ("Col2Im", "f[2,48,9] -> f[2,12,4,4]", {"block_shape": [2, 2]}),
    ("Col2Im", "f[6,12,5] -> f[6,4,9]", {"block_shape": [3], "strides": [2], "pads": [1, 1]}),
)
