"""protomem: embedding models on millions of identities, with prototypes sharded over ranks."""

__version__ = "0.1.0"
