"""Images as files and Parquet, for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def random_images(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def as_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(
    file: Path,
    images: list[bytes | None] | np.ndarray,
    labels: list,
    *,
    column: str = "img",
    names: list[str] | None = None,
    label_type: pa.DataType | None = None,
    row_group_size: int = 4,
) -> None:
    encoded = [as_file(image) for image in images] if isinstance(images, np.ndarray) else images
    structs = pa.array([{"bytes": item, "path": "x.png"} for item in encoded])
    table = pa.table({column: structs, "label": pa.array(labels, label_type or pa.int64())})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group_size)
