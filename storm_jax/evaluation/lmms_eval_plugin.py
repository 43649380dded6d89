"""What lmms-eval's entry point group `lmms_eval.models` finds: a name for our model.

lmms-eval calls it at every start, whatever model is asked for, so nothing heavy is imported.
"""


def manifest():
    """The `ModelManifest` of `--model storm_jax`."""
    # pyrefly: ignore[missing-import]
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "storm_jax.evaluation.lmms_eval_model.StormJax"
    return ModelManifest(model_id="storm_jax", chat_class_path=path)
