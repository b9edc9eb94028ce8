"""The fingerprint of an array on eight devices is that of the whole, however it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ctpd_jax.train.fingerprint import fingerprints


def main() -> None:
    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        x = rng.normal(0, 20, (4, 8, 16)).astype(dtype)
        whole = fingerprints({"x": jnp.asarray(x)})
        for spec in (P(), P("a"), P(None, "b", "c"), P(None, ("a", "b", "c")), P("c", None, ("b", "a"))):
            cut = jax.device_put(x, NamedSharding(mesh, spec))
            assert fingerprints({"x": cut}) == whole, (dtype, spec)
    print("one fingerprint")


if __name__ == "__main__":
    main()
