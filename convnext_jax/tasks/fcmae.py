"""FCMAE, the pre-training of ConvNeXt V2 (arXiv:2301.00808): predict the masked patches of images, without labels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from convnext_jax.data.arrays import PILLOW_CHANNELS
from convnext_jax.data.augment import normalize, random_flip
from convnext_jax.data.dataset import Features
from convnext_jax.data.labelled_images import EvalImages, TrainImages
from convnext_jax.data.unlabelled_images import UnlabelledImages, open_images
from convnext_jax.fields import Fields
from convnext_jax.interop import ImageProcessor, Pretrained
from convnext_jax.interop.fcmae import decoder_parameters
from convnext_jax.models import AFTER_TRUNK, ConvNeXt, Weights, get_parameters, parameter_roles, with_parameters
from convnext_jax.models.fcmae import PATCH_SIZE, MaskedAutoencoder, patch_errors, reconstruct, split_decoder
from convnext_jax.models.masked import GRN_STATISTICS, Visible, draw_patches
from convnext_jax.tasks.probes import PROBES, open_probe
from convnext_jax.tasks.task import (
    Batch,
    Evaluation,
    Evaluator,
    Headline,
    LabelledData,
    LoadedWeights,
    Loss,
    Measured,
    Task,
)

EVALUATION_SEED = 0
"""Seed of the masks in evaluations. It is the same in all runs, so that their losses can be compared."""
GREY = 0.5
"""Pixel value, in [0, 1], of masked patches in figures."""


def _defaults(config: ConfigDict) -> None:
    config.data.crop_scale = (0.2, 1.0)  # fraction of the area in the random resized crop; (): the whole image
    config.data.crop_pct = 0.875  # evaluation below 384 pixels: shorter side to int(image_size / crop_pct), centre crop
    config.data.exact = False  # Pillow's pixels exactly, at half the speed, in training; in evaluation they always are
    config.augment = ConfigDict()
    config.augment.flip = True

    config.fcmae = ConfigDict()
    config.fcmae.mask_ratio = 0.6  # fraction of the patches that are masked
    config.fcmae.mask_patch = 32  # side of a masked patch in pixels, a multiple of 32
    # GRN takes its norms over the visible positions of each 'image' (as in the JAX code that trained the published
    # weights) or of the whole 'batch' (as in the published PyTorch code).
    config.fcmae.grn = 'image'
    # Standard deviation of the initial kernels. The original encoder has 0.02, but the original pre-training code
    # initialises most kernels a second time, with a standard deviation of 1.
    config.fcmae.init_std = 0.02

    # Each evaluation also tests a classifier on the features of the frozen encoder, which needs images with labels.
    config.probe = ConfigDict()
    config.probe.kind = ''  # 'knn': k-nearest neighbours; 'linear': a linear classifier; '': none
    config.probe.neighbours = 20  # number of neighbours of 'knn'
    config.probe.name = ''  # data set, as data.name; '': data.name in data.dir
    config.probe.dir = ''  # as data.dir; used only if probe.name is set
    config.probe.train_split = (
        ''  # images from which the classes are learned, such as 'train[:10%]'; '': data.train_split
    )
    config.probe.eval_split = ''  # images that are classified; '': data.eval_split


class FCMAE(Task):
    """The encoder gets the visible patches of an image, and a decoder predicts the pixels of the masked patches.

    A batch has `image`, (N, H, W, C) uint8, and in evaluation also `index`, (N,) int32. `augment` turns `image` into
    normalised floats.
    """

    headline = Headline('loss', 'loss on masked patches', lowest=True, digits=4)
    fields = Fields(
        _defaults,
        positive=('data.crop_pct', 'fcmae.init_std', 'probe.neighbours'),
        at_most_one=('data.crop_pct',),
        choices={'fcmae.grn': GRN_STATISTICS, 'probe.kind': ('', *PROBES)},
        fixed=('augment', 'fcmae'),
        free=('data.crop_pct',),
        paths=('probe.dir',),
        evaluation=(
            *('data.crop_pct', 'fcmae.mask_ratio', 'fcmae.mask_patch'),
            *('probe.name', 'probe.dir', 'probe.train_split', 'probe.eval_split'),
        ),
    )

    def problems(self) -> list[str]:
        size, name, fcmae = self.config.data.image_size, self.config.model.name, self.config.fcmae
        lines, stride = [], self.variant().total_stride
        if self.channels not in PILLOW_CHANNELS:
            lines.append(f'fcmae needs images of 1 or 3 channels, but data.mean has {self.channels} values')
        if stride != PATCH_SIZE:
            lines.append(f'FCMAE needs a backbone with a total stride of {PATCH_SIZE}, but {name} has {stride}')
        if not 0 < fcmae.mask_ratio < 1:
            lines.append(f'fcmae.mask_ratio must be between 0 and 1, not {fcmae.mask_ratio}')
        if fcmae.mask_patch < 1 or fcmae.mask_patch % PATCH_SIZE or size % fcmae.mask_patch:
            lines.append(
                f'fcmae.mask_patch={fcmae.mask_patch} must be a multiple of {PATCH_SIZE} that divides '
                f'data.image_size={size}'
            )
        if not lines and not 0 < self._visible_patches < self._side**2:
            lines.append(
                f'fcmae.mask_ratio={fcmae.mask_ratio} of {self._side**2} patches leaves {self._visible_patches} '
                'visible patches: use larger images or another ratio'
            )
        if fcmae.grn == 'batch' and self.config.accumulation_steps > 1:
            lines.append("fcmae.grn='batch' needs accumulation_steps=1: GRN would see only a part of the batch")
        return lines

    @property
    def _side(self) -> int:
        """The number of patches along a side of an image."""
        return self.config.data.image_size // self.config.fcmae.mask_patch

    @property
    def _visible_patches(self) -> int:
        """The number of visible patches of an image, rounded down; 10 · (1 − 0.9), which floats make 0.999…, is 1."""
        return int(round(self._side**2 * (1 - self.config.fcmae.mask_ratio), 9))

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return len(self.config.data.mean)

    @property
    def features(self) -> Features:
        size = self.config.data.image_size
        return {'image': jax.ShapeDtypeStruct((size, size, self.channels), jnp.uint8)}

    def open(self) -> tuple[UnlabelledImages, UnlabelledImages]:
        """Opens both splits. Labels are ignored.

        Raises:
            UserError: as for `open_images`.
        """
        data = self.config.data
        source = open_images(data.name, data.dir, data.train_split)
        train = TrainImages(source, data.image_size, self.channels, crop_scale=data.crop_scale, exact=data.exact)
        return UnlabelledImages(train), self.open_split(data.name, data.eval_split, {})

    def open_split(self, name: str, split: str, facts: Mapping[str, Any]) -> UnlabelledImages:
        data = self.config.data
        source = open_images(name, data.dir, split)
        images = EvalImages(source, data.image_size, self.channels, crop_pct=data.crop_pct)
        return UnlabelledImages(images, numbered=True)

    def open_evaluations(self) -> list[Evaluation]:
        """Opens the data of the probe that `config.probe` describes, if any.

        Raises:
            UserError: as for `open_probe`.
        """
        probe = self.config.probe
        if not probe.kind:
            return []
        dataset, evaluator = open_probe(
            probe.kind, self.labelled_data, self.processor, norm=False, neighbours=probe.neighbours
        )
        return [Evaluation(dataset, evaluator, evaluator.headline)]

    @property
    def labelled_data(self) -> LabelledData:
        """The data set of `config.probe`; fields that are '' have the value of `config.data`."""
        data, probe = self.config.data, self.config.probe
        name, directory = (probe.name, probe.dir) if probe.name else (data.name, data.dir)
        return LabelledData(name, directory, probe.train_split or data.train_split, probe.eval_split or data.eval_split)

    def augment(self, batch: Batch, keys: Key[Array, ' n']) -> Batch:
        """Flips each image horizontally with probability ½, and normalises it."""
        images = random_flip(batch['image'], keys) if self.config.augment.flip else batch['image']
        return {'image': normalize(images, self.config.data.mean, self.config.data.std)}

    def build(self, key: Key[Array, '']) -> MaskedAutoencoder:
        """Builds the network with random parameters.

        Raises:
            UserError: as for `MaskedAutoencoder`.
        """
        network = MaskedAutoencoder(
            self.variant(),
            key=key,
            in_channels=self.channels,
            drop_path_rate=self.config.model.drop_path_rate,
            execution=self.execution(),
        )
        factor = self.config.fcmae.init_std / 0.02  # the layers initialise kernels with 0.02
        kernels = {name for name, role in parameter_roles(network).items() if role.decays}
        parameters = get_parameters(network)
        return with_parameters(network, parameters | {name: factor * parameters[name] for name in kernels})

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one image: the encoder, whose linear layers skip masked patches, and the decoder."""
        config, size = self.config, self.config.data.image_size
        encoder = self.variant().multiply_adds(size, 0, self.channels, self._visible_patches / self._side**2)
        network = jax.eval_shape(self.build, jax.random.key(0))
        decoder = split_decoder(get_parameters(network))[1]
        kernels = sum(x.size for name, x in decoder.items() if name.endswith('kernel'))
        return encoder + (config.data.image_size // PATCH_SIZE) ** 2 * kernels

    def visible(self, keys: Key[Array, ' n']) -> Visible:
        """Draws the visible patches of N images. `keys` (N,) has one random key for each image."""
        patches = draw_patches(keys, self._side, self._side, self._visible_patches)
        return Visible(patches, self.config.fcmae.grn, self._visible_patches)

    def loss(self, model: MaskedAutoencoder, batch: Batch, keys: Key[Array, ' n']) -> Loss:
        """The sum of the errors of all masked patches; its weight is their number."""
        mask_keys, model_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        visible = self.visible(mask_keys)
        errors, masked = masked_errors(model, batch['image'], visible, key=model_keys)
        return Loss(jnp.where(masked, errors, 0).sum(), masked.sum(dtype=jnp.float32))

    def evaluator(self, dataset: UnlabelledImages) -> 'MaskedLoss':
        return MaskedLoss(self)

    def figures(self, model: MaskedAutoencoder, batch: Batch) -> dict[str, UInt8[Array, 'h w 3']]:
        """The images, their visible patches and their reconstructions, side by side."""
        return {'reconstructions': self.draw(model, batch['image'], batch['index'])}

    def draw(
        self, model: MaskedAutoencoder, images: UInt8[Array, 'n h w c'], index: Int[Array, ' n']
    ) -> UInt8[Array, 'n*h 3*w 3']:
        """Draws a row for each image: the image, its visible patches, and the reconstruction of the other patches.

        Args:
            model: the network, for inference.
            images: (N, H, W, C) uint8.
            index: (N,) int32, the indices of the images in the split. They determine the masks.

        Returns:
            (N · H, 3 · W, 3) uint8.
        """
        mean, std = self.config.data.mean, self.config.data.std
        normalised, visible = normalize(images, mean, std), self.evaluation_mask(index)
        rebuilt = reconstruct(model(normalised, visible), normalised, visible) * jnp.asarray(std) + jnp.asarray(mean)
        whole = images.astype(jnp.float32) / 255
        seen = jnp.where(visible.positions(images), whole, GREY)
        rows = rearrange(jnp.stack([whole, seen, rebuilt]), 'k n h w c -> (n h) (k w) c')
        pixels = jnp.round(255 * jnp.clip(rows, 0, 1)).astype(jnp.uint8)
        return jnp.broadcast_to(pixels, (*pixels.shape[:2], 3))

    def evaluation_mask(self, index: Int[Array, ' n']) -> Visible:
        """The visible patches of images in an evaluation. `index` (N,) has their indices in the split."""
        return self.visible(jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(EVALUATION_SEED), index))

    def initial_weights(
        self, initial: Weights, trained: LoadedWeights, facts: Mapping[str, Any]
    ) -> tuple[Weights, list[str]]:
        """Takes the encoder and, if there is one, the decoder. The norm and head of a classifier are dropped."""
        pretrained = trained.as_classifier()
        encoder, decoder = split_decoder(trained.weights)
        new = split_decoder(initial)[1]
        if pretrained and pretrained.decoder:
            decoder = decoder_parameters(pretrained.decoder, {name: x.shape for name, x in new.items()})
        notes = [] if decoder else ['the decoder is newly initialised']
        if dropped := [name for name in AFTER_TRUNK if name in encoder]:
            notes.append(f'FCMAE has no classifier, so these are dropped: {", ".join(dropped)}')
        return {name: x for name, x in encoder.items() if name not in dropped} | (decoder or new), notes

    def pretrained(self, model: MaskedAutoencoder, facts: Mapping[str, Any]) -> Pretrained:
        """The encoder as a classifier with a newly initialised final norm and head. `convert` omits the head."""
        variant = model.variant.replace(head_hidden=0)  # a hidden layer would be as untrained as the head
        classifier = jax.eval_shape(
            lambda key: ConvNeXt(variant, key=key, num_classes=1, in_channels=self.channels, execution=model.execution),
            jax.random.key(0),
        )
        shapes = {name: x.shape for name, x in get_parameters(classifier).items()}
        new = {name: jnp.full(shapes[name], float(name == 'norm.scale')) for name in AFTER_TRUNK if name in shapes}
        classifier = with_parameters(classifier, split_decoder(get_parameters(model))[0] | new)
        return Pretrained(classifier, 'convnext_jax', None, self.processor, tuple(new), [])

    @property
    def processor(self) -> ImageProcessor:
        data = self.config.data
        return ImageProcessor(data.image_size, data.crop_pct, mean=tuple(data.mean), std=tuple(data.std))


def masked_errors(
    model: MaskedAutoencoder,
    images: Float[Array, 'n h w c'],
    visible: Visible,
    *,
    key: Key[Array, ' n'] | None = None,
) -> tuple[Float[Array, 'n rows columns'], Bool[Array, 'n rows columns']]:
    """The error of each patch, and whether the patch is masked: two arrays (N, rows, columns)."""
    errors = patch_errors(model(images, visible, key=key), images)
    return errors, ~visible.positions(errors[..., None])[..., 0]


@dataclasses.dataclass(frozen=True)
class MaskedLoss(Evaluator):
    """The loss on masked patches. The mask of an image is the same in every evaluation."""

    task: FCMAE

    def measure(self, model: MaskedAutoencoder, batch: Batch) -> Measured:
        """The sum of the errors of all masked patches, and their count."""
        counted = batch['weight'] > 0
        visible = self.task.evaluation_mask(batch['index'])
        # Padding images have no visible patches, so that GRN's norms over the batch do not include them.
        visible = dataclasses.replace(visible, patches=visible.patches & counted[:, None, None])
        images = normalize(batch['image'], self.task.config.data.mean, self.task.config.data.std)
        errors, masked = masked_errors(model, images, visible)
        masked &= counted[:, None, None]
        return Measured({'loss': jnp.where(masked, errors, 0).sum(), 'patches': masked.sum()})

    def summary(self, measured: Measured) -> dict[str, float]:
        return {'loss': float(measured.sums['loss']) / max(float(measured.sums['patches']), 1)}
