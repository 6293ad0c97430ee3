"""The model card of an upload: licence, library, and how to load the weights."""

from convnext_jax.interop.licence import model_card
from convnext_jax.interop.pretrained import Pretrained
from convnext_jax.interop.timm_models import timm_name
from convnext_jax.models import get_parameters

TRANSFORMERS = "import transformers\nmodel = transformers.{model}.from_pretrained('{hub_id}')"
TIMM = "import timm\nmodel = timm.create_model('hf_hub:{hub_id}', pretrained=True)"
USES = {'huggingface': (TRANSFORMERS,), 'dinov3': (TRANSFORMERS,), 'timm': (TIMM, TRANSFORMERS)}
"""Layout → code that loads the weights with other libraries. For the timm layout, transformers needs timm."""
LIBRARIES = {'huggingface': 'transformers', 'dinov3': 'transformers', 'timm': 'timm'}
"""Layout → name of the library in a model card."""


def upload_card(pretrained: Pretrained, layout: str, hub_id: str, training: str = '') -> bytes:
    """The content of the model card, `README.md`, of an uploaded folder.

    Args:
        pretrained: the uploaded model.
        layout: the layout of the folder.
        hub_id: the repository, 'ACCOUNT/NAME'.
        training: a section about the training, in Markdown; '' for none.
    """
    model = pretrained.model
    parameters = sum(x.size for x in get_parameters(model).values())
    facts = [f'{timm_name(model.variant) or "ConvNeXt"} with {parameters / 1e6:.1f} million parameters']
    facts += [f'{model.num_classes} classes'] if pretrained.has_head else ['no head']
    facts += [f'images of {pretrained.processor.size} pixels'] if pretrained.processor else []
    kind = 'AutoModelForImageClassification' if pretrained.has_head and layout != 'dinov3' else 'AutoModel'
    uses = [f"import convnext_jax as cx\nmodel = cx.load_pretrained('{hub_id}')"]
    uses += [use.format(model=kind, hub_id=hub_id) for use in USES.get(layout, ())]
    examples = '\n\n'.join(f'```python\n{use}\n```' for use in uses)
    fields: dict[str, str | list[str]] = {
        'pipeline_tag': 'image-classification' if pretrained.has_head else 'image-feature-extraction',
        'tags': ['convnext'],
    }
    if layout in LIBRARIES:
        fields['library_name'] = LIBRARIES[layout]
    name = hub_id.split('/')[1]
    text = f'# {name}\n\n{", ".join(facts)}.\n\n{examples}\n\n{training}'.rstrip()
    return model_card(pretrained.licence, text, **fields)
