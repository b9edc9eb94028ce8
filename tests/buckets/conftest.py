"""A bucket on loopback, asked by the client that users have."""

from __future__ import annotations

import os

import pytest
from helpers.object_store import Store, served

# gcsfs reads it when it is imported: else it asks for the kind of a bucket in a protocol that is not spoken here.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The bucket "bucket", empty, and a cache of one's own."""
    monkeypatch.setenv("CTPD_CACHE", str(tmp_path / "cache"))
    store = Store()
    with served(store):
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        from fsspec.config import conf

        from ctpd_jax.buckets import objects, twin

        monkeypatch.setitem(conf, "gs", {"token": "anon"})  # fsspec reads its variables when it is imported
        monkeypatch.setattr(twin, "SETTLED", 0.1)
        objects.fetched.cache_clear()
        yield store
    objects.fetched.cache_clear()
