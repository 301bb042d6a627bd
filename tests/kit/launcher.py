"""A device with the names that host modules use of their ops: for tests of single kernels."""

from typing import Any

import numpy as np

from mlacli.backends.cuda_array import Array


class Launcher:
    """new, put, get and run on a device, as CudaOps has them."""

    def __init__(self, device: Any) -> None:
        self.device, self.n_sm, self.capability = device, device.n_sm, device.capability
        self.run, self.get, self.copy_in = device.launch, device.get, device.copy_in

    def new(self, shape: tuple[int, ...], dtype: Any = "f4") -> Array:
        return self.device.take(shape, dtype)

    def put(self, host: np.ndarray) -> Array:
        array = self.device.take(host.shape, host.dtype)
        self.device.copy_in(array, host)
        return array
