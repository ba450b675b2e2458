"""What is in a safetensors file, by the format's definition alone: what the loader is compared with."""

import json
import struct

import numpy as np

_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def safetensors(data):
    """Tensors by name, as float32."""
    (size,) = struct.unpack_from("<Q", data)
    header, tensors = json.loads(data[8 : 8 + size]), {}
    for name, about in header.items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            values = np.frombuffer(data[8 + size + first : 8 + size + last], _SAFETENSORS[about["dtype"]])
            if about["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            with np.errstate(all="ignore"):
                tensors[name] = values.reshape(about["shape"]).astype(np.float32)
    return tensors
