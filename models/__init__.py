"""Networks. Importing the package registers them."""

from occstream.models import b2s  # noqa: F401
from occstream.models.batch import Batch, OccOutputs, concat
from occstream.models.registry import MODELS, build_model, model_entry

__all__ = ["MODELS", "Batch", "OccOutputs", "build_model", "concat", "model_entry"]
