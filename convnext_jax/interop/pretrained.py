"""load_pretrained and save_pretrained: whole models in the folders and files of the other libraries."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax

from convnext_jax.errors import UserError
from convnext_jax.interop.backbone import backbone_tensors
from convnext_jax.interop.configs import activation, backbone_config, check_problem_type, classifier_config
from convnext_jax.interop.files import Tensors, write_folder
from convnext_jax.interop.layouts import HEADS, LAST_NORMS, from_layout, to_layout
from convnext_jax.interop.processor import ImageProcessor, processor_for
from convnext_jax.interop.recognition import Opened, last_epsilon, open_weights
from convnext_jax.models import Backbone, ConvNeXt, Execution, ExecutionOptions, get_parameters, with_parameters
from convnext_jax.paths import local_path

HEAD = ('head.kernel', 'head.bias')


class Pretrained(NamedTuple):
    """A model and what else its folder says.

    Attributes:
        layout: the names its tensors had.
        class_names: of the head's outputs, where the folder gives them.
        processor: how it wants its images, where the folder says it.
        fresh: the parameters that the file does not give, which are newly initialised.
        notes: lines for the user, about these or about other weights in the same place.
        problem_type: of Hugging Face's config: 'single_label_classification', 'multi_label_classification',
            'regression', or None where nothing says it.
        origin: which weights of which file, folder or run these are, in words for messages.
    """

    model: ConvNeXt
    layout: str
    class_names: tuple[str, ...] | None
    processor: ImageProcessor | None
    fresh: tuple[str, ...]
    notes: list[str]
    problem_type: str | None = None
    origin: str = ''

    @property
    def activation(self) -> str | None:
        """The function from logits to probabilities: 'softmax', 'sigmoid', or None for a regression."""
        return activation(self.problem_type, self.model.head.bias.shape[0])

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the data the model was trained on, as `data.dataset.Dataset.facts`."""
        return {} if self.class_names is None else {'class names': list(self.class_names)}


def load_pretrained(where: str | Path, **arguments) -> ConvNeXt:
    """A model with the weights of the Hugging Face, timm or original libraries; arguments as `read_pretrained`.

    Warns where a part of the model is newly initialised. `read_pretrained` also gives class names and preprocessing.
    """
    loaded = read_pretrained(where, **arguments)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.model


def read_pretrained(
    where: str | Path,
    *,
    name: str | None = None,
    entry: str | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    new_classes: int | None = None,
    key: jax.Array | None = None,
    drop_path_rate: float = 0.0,
    head_init_scale: float = 1.0,
    **options: Unpack[ExecutionOptions],
) -> Pretrained:
    """A model with the weights of another library, and what its folder says about classes and images.

    Args:
        where: a folder of Hugging Face (`config.json` with safetensors, in one file or several, or
            `pytorch_model.bin`) or of timm; a hub id of either; a safetensors or PyTorch file of any name. The layout
            follows from the tensors' names, of which what wrappers put before them (`module.`, `model.`) is taken off.
        name: the architecture to insist on; by default as the folder's config, or the names and shapes, say.
        entry: which weights of a PyTorch file that holds several: the name of an entry, or 'ema' for 'model_ema' or
            'state_dict_ema'; by default 'model' or 'state_dict', or the only entry that is a state dict.
        revision: branch, tag or commit on the hub.
        num_classes: if it is not the file's, the head is newly initialised.
        new_classes: outputs of a newly initialised head where the file has none; as `num_classes`, but a file's head
            stays whatever its size.
        key: random key of a new head.
        drop_path_rate, head_init_scale: as `create_model`.
        options: how the model is computed, as `create_model`: dtype='bfloat16', remat='full' …

    Raises:
        UserError: the file cannot be read, is of another model, or has tensors that are missing, unexpected or of
            another shape; these are listed.
    """
    execution = Execution.from_keywords(read_pretrained, options)
    opened = open_weights(str(where), name=name, entry=entry, revision=revision)
    tensors, layout = opened.tensors, opened.layout
    bias = tensors.get(f'{HEADS[layout][0]}bias')
    saved_classes = None if bias is None else math.prod(bias.shape)
    sizes = [size for size in (num_classes, saved_classes, new_classes) if size is not None]
    num_classes = sizes[0] if sizes else 1  # without a size, what else does not fit is listed first

    def build(key: jax.Array) -> ConvNeXt:
        return ConvNeXt(
            opened.variant,
            key=key,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            head_init_scale=head_init_scale,
            layer_norm_eps=last_epsilon(opened.config, layout),
            in_channels=opened.in_channels,
            execution=execution,
        )

    model = jax.eval_shape(build, jax.random.key(0))
    shapes = {name: array.shape for name, array in get_parameters(model).items()}
    notes, fresh = _fresh_parts(tensors, saved_classes, num_classes, layout)
    if saved_classes is not None and HEAD[0] in fresh:
        tensors = {name: x for name, x in tensors.items() if not name.startswith(HEADS[layout])}
    parameters = from_layout(
        tensors, {name: shape for name, shape in shapes.items() if name not in fresh}, opened.variant, layout
    )
    if not sizes:
        raise UserError(f'{where} has no head: load_pretrained(…, num_classes=, key=) initialises one')
    if fresh:
        if key is None:
            raise UserError(f'{"; ".join(notes)}: give key=jax.random.key(…)')
        drawn = jax.jit(lambda key: {name: get_parameters(build(key))[name] for name in fresh})(key)
        parameters |= drawn
    model = with_parameters(model, parameters)
    if fresh:  # the names and the problem type are of another head
        return Pretrained(model, layout, None, _processor(opened), fresh, notes)
    class_names, problem_type = _class_names(opened.config, num_classes), opened.config.get('problem_type')
    check_problem_type(problem_type)
    return Pretrained(model, layout, class_names, _processor(opened), fresh, notes, problem_type)


def save_pretrained(
    model: ConvNeXt | Backbone,
    folder: str | Path,
    *,
    layout: str = 'huggingface',
    class_names: Sequence[str] | None = None,
    processor: ImageProcessor | None = None,
    problem_type: str | None = None,
) -> None:
    """Writes a folder that the other library loads as it is.

    'huggingface': `AutoModelForImageClassification.from_pretrained(folder)`, or `ConvNextBackbone`, and its processor.
    'timm': `timm.create_model('local-dir:FOLDER')`, or `checkpoint_path=FOLDER/model.safetensors`. 'original':
    `torch.load('FOLDER/model.pth')['model']`; it takes torch to write.

    Args:
        model: to save; a backbone has the Hugging Face layout alone.
        folder: new or empty.
        layout: one of `LAYOUTS`.
        class_names: of the head's outputs.
        processor: how images are prepared; by default the published one at 224 pixels.
        problem_type: as `Pretrained.problem_type`. Hugging Face's layout alone holds it; a warning says so where the
            other libraries would read the logits otherwise.

    Raises:
        UserError: the folder is not empty or cannot be written, a value is not as above, or the other library has no
            such model.
    """
    processor = processor_for(model.in_channels, processor)
    if isinstance(model, Backbone):
        if layout != 'huggingface' or class_names is not None or problem_type is not None:
            raise UserError('a backbone has no classes, and only the huggingface layout holds one')
        tensors, files = backbone_tensors(model), {'config.json': backbone_config(model, processor)}
    else:
        tensors = to_layout(jax.device_get(get_parameters(model)), model.variant, layout)
        files = classifier_config(model, layout, class_names, processor, problem_type)
    if layout == 'huggingface':
        files['preprocessor_config.json'] = processor.to_huggingface()
    write_folder(local_path(folder), tensors, files, torch=layout == 'original')


def _fresh_parts(
    tensors: Tensors, saved_classes: int | None, num_classes: int, layout: str
) -> tuple[list[str], tuple[str, ...]]:
    """Lines on what the file does not give, and the names of those parameters."""
    if saved_classes == num_classes:
        return [], ()
    if saved_classes is not None:
        return [f'the head is newly initialised: {num_classes} classes here, {saved_classes} in the file'], HEAD
    if any(name.startswith(LAST_NORMS[layout]) for name in tensors):
        return ['the head is newly initialised: the file has none'], HEAD
    return ['the last norm and the head are newly initialised: the file has none'], ('norm.scale', 'norm.bias', *HEAD)


def _class_names(config: dict, num_classes: int) -> tuple[str, ...] | None:
    """The names that Hugging Face's or timm's config gives, as a list or as a dictionary by label; None without any.

    Warns where it does not name every class.
    """
    of_timm = config['pretrained_cfg'] if isinstance(config.get('pretrained_cfg'), dict) else {}
    names = config.get('id2label') or config.get('label_names') or of_timm.get('label_names')
    if not names:
        return None
    if isinstance(names, dict):
        names = [names.get(str(label)) for label in range(num_classes)]  # keys of JSON are texts
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        warnings.warn(
            f'config.json does not name each of the {num_classes} classes: its names are left out', stacklevel=3
        )
        return None
    return tuple(names)


def _processor(opened: Opened) -> ImageProcessor | None:
    path = opened.path
    if path.is_dir() and ((path / 'preprocessor_config.json').is_file() or 'pretrained_cfg' in opened.config):
        return ImageProcessor.from_pretrained(str(path))
    return None
