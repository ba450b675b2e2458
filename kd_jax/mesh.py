"""Device meshes."""

import jax
import numpy as np
from jax.sharding import Mesh


def one_axis(name: str, devices=None) -> Mesh:
    """All `devices` (default: every device there is) along one axis called `name`."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (name,))
