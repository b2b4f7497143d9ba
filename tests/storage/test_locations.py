"""URLs: what opens them."""

from __future__ import annotations

import pytest
from pyarrow import fs

from pipeline.storage.locations import open_location


def test_azures_store_goes_by_pyarrows_scheme_and_others_are_refused_with_it() -> None:
    filesystem, path = open_location("abfs://images@account.dfs.core.windows.net/sets/train%20a.tar")
    assert isinstance(filesystem, fs.AzureFileSystem)
    assert path == "images/sets/train a.tar"
    for url in ("az://images/set?sas=SECRET", "azure://images/set?sas=SECRET"):
        with pytest.raises(ValueError, match=r"^az.*://images/set: for Azure give abfs://CONTAINER@") as found:
            open_location(url)
        assert "SECRET" not in str(found.value)
