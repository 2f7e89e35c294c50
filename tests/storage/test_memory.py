from __future__ import annotations

import pickle

import pytest
from contract import StoreContract

from magi_ray.storage.memory import MemoryStore


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()

    def test_it_is_not_copied_to_another_process(self, store: MemoryStore) -> None:
        with pytest.raises(TypeError):
            pickle.dumps(store)
