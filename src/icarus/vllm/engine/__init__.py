"""The engine core: who may share the cache, what cannot be served, cache keys, counting."""
