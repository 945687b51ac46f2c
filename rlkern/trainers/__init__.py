"""Reference trainers, on transformers and accelerate."""

from .._versions import require

require("transformers", "accelerate")
