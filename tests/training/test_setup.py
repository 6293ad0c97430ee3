"""The model that a config describes."""

from convnext_jax.config import default_config
from convnext_jax.models import Execution
from convnext_jax.tasks import abstract_model


def test_the_model_has_the_execution_options_of_the_config():
    """An option that does not reach the model would cost memory or speed."""
    config = default_config()
    config.model.update(name='convnext_atto', num_classes=2, dtype='bfloat16', remat='full', unroll=True, pallas=True)
    assert abstract_model(config).execution == Execution('bfloat16', remat='full', unroll=True, pallas=True)
