"""The licence of weights: read from the other files in their folder, and written into a model card."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

from convnext_jax.errors import first_line
from convnext_jax.interop.files import printable

CARD = 'README.md'
"""File name of a model card on the Hugging Face hub: a block of YAML between two lines `---`, and then Markdown."""


DINOV3 = 'dinov3-license'
EUPE = 'fair-noncommercial-research-license'
LINKS = {DINOV3: 'https://ai.meta.com/resources/models-and-libraries/dinov3-license'}
"""Licences that the hub does not list → address of their text. A model card states them as 'other'."""
PUBLISHED_FILES = {r'dinov3_convnext_\w+_pretrain_\w+-[0-9a-f]{8}\.pth': DINOV3, r'(?i)eupe[-_]convnext[-_].*': EUPE}
"""Regular expression for names of files that are published without a model card → their licence."""


@dataclasses.dataclass(frozen=True)
class Licence:
    """The licence of weights, with the fields of a model card.

    Attributes:
        identifier: the card's `license`, such as 'apache-2.0', or 'other'.
        name: the card's `license_name`, such as 'dinov3-license' if the identifier is 'other'.
        link: the card's `license_link`, the address of the text of the licence.
        source: where the licence is stated, for messages.
    """

    identifier: str
    name: str | None = None
    link: str | None = None
    source: str = ''

    @property
    def is_special(self) -> bool:
        """Whether the licence was written for particular weights, so that it may set unusual conditions."""
        return self.identifier in ('other', DINOV3, EUPE)

    @property
    def line(self) -> str:
        """One line for the user, such as 'licence of the weights: cc-by-nc-4.0 (README.md)'."""
        text = f'licence of the weights: {printable(self.name or self.identifier)}'
        return f'{text} ({printable(self.source)})' if self.source else text


def read_licence(path: Path, config: dict) -> Licence | None:
    """The licence of weights: from the model card, from the config, or known by the file name; None if unknown.

    Args:
        path: a folder or file of weights.
        config: content of the folder's `config.json`, or {}. timm stores the licence in the entry `pretrained_cfg`.
    """
    card = _read_card((path if path.is_dir() else path.parent) / CARD)
    if licence := _text(card.get('license')):
        return Licence(licence, _text(card.get('license_name')), _text(card.get('license_link')), CARD)
    for part in (config.get('pretrained_cfg'), config):
        if isinstance(part, dict) and (licence := _text(part.get('license'))):
            return Licence(licence, source='config.json')
    for pattern, name in PUBLISHED_FILES.items():
        if re.fullmatch(pattern, path.name):
            return Licence(name, source='file name')
    return None


def model_card(licence: Licence | None, text: str = 'ConvNeXt weights, saved by convnext_jax.', **fields: Any) -> bytes:
    """The content of a model card.

    Args:
        licence: the licence that it states; None if it is unknown.
        text: the card in Markdown.
        fields: further fields of its metadata, such as `library_name`.
    """
    from huggingface_hub import ModelCardData

    stated: dict[str, Any] = {}
    if licence and licence.identifier in LINKS:
        licence = Licence('other', licence.identifier, LINKS[licence.identifier])
    if licence:
        stated = {'license': licence.identifier, 'license_name': licence.name, 'license_link': licence.link}
    return f'---\n{ModelCardData(**stated, **fields).to_yaml()}\n---\n{text}\n'.encode()


def _read_card(path: Path) -> dict:
    """The YAML block of a model card; {} if there is no card or block. Warns if the card cannot be read."""
    if not path.is_file():
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, RecursionError, YAMLError) as error:
        warnings.warn(f'{path} cannot be read, so its licence is unknown: {first_line(error)}', stacklevel=4)
        return {}


def _text(value: object) -> str | None:
    """A value of a card or a config as text: a string, or a list joined by commas; None for anything else."""
    if isinstance(value, list):
        value = ', '.join(map(str, value))
    return value.strip() or None if isinstance(value, str) else None
