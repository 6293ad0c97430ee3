"""The classes of masks: lists of names, pixel values, and masks that must be refused."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.mask_classes import IGNORED, MaskClasses, find_classes
from convnext_jax.errors import UserError


def png(pixels, mode='L'):
    file = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint16 if mode == 'I;16' else np.uint8)).convert(mode).save(file, 'PNG')
    return file.getvalue()


def grey_png_of_4_bits():
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', 2, 1, 4, 0, 0, 0, 0)
    data = zlib.compress(b'\0\x12')
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def test_without_reduce_zero_label_the_values_are_the_labels():
    """Masks of most data sets would be shifted by one class."""
    classes = MaskClasses(('sky', 'road', 'car'), (0, 1, 2), reduce_zero_label=False)
    labels = classes.labels(png([[0, 1], [2, 255]]), 'a.png')
    np.testing.assert_array_equal(labels, [[0, 1], [2, IGNORED]])
    assert labels.dtype == np.uint8


def test_reduce_zero_label_ignores_0_and_shifts_the_others():
    """All 150 classes of ADE20K would be shifted by one, and unlabelled pixels would be learnt as a class."""
    classes = MaskClasses(tuple('abc'), (1, 2, 3), reduce_zero_label=True)
    np.testing.assert_array_equal(classes.labels(png([[0, 1], [3, 255]]), 'a.png'), [[IGNORED, 0], [2, IGNORED]])


def test_values_with_gaps_become_consecutive_labels():
    """COCO's ids reach 200 for 133 classes: the head would have outputs that no class uses."""
    classes = MaskClasses(('person', 'rug'), (1, 200), reduce_zero_label=True)
    np.testing.assert_array_equal(classes.labels(png([[0, 1], [200, 255]]), 'a.png'), [[IGNORED, 0], [1, IGNORED]])


def test_a_palette_png_holds_labels_as_indices():
    """Masks of Pascal VOC would be read as colours."""
    image = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8))
    image = image.convert('P')
    image.putpalette([value for index in range(256) for value in (255 - index, index // 2, 7)])
    file = io.BytesIO()
    image.save(file, 'PNG')
    classes = MaskClasses(('sky', 'road', 'car'), (0, 1, 2), reduce_zero_label=False)
    np.testing.assert_array_equal(classes.labels(file.getvalue(), 'a.png'), [[0, 1], [2, IGNORED]])


@pytest.mark.parametrize(
    ('mask', 'message'),
    [
        (png([[0, 1]], 'I;16'), 'greyscale PNG file of 16 bits'),
        (grey_png_of_4_bits(), 'greyscale PNG file of 4 bits'),
        (png([[0, 1]], 'RGB'), 'colour or transparent PNG'),
        (png([[0, 1]], 'LA'), 'colour or transparent PNG'),
        (b'\xff\xd8\xff' + bytes(30), 'not a PNG'),
        (png(np.arange(256).reshape(16, 16) % 3)[:-30], 'cannot be decoded'),
        (
            png([[0, 3]]),
            'value 3, which is none of the 3 classes (0 to 2) and not the ignored value 255: add its name to the list '
            'of classes, or if 0 means no class, set --config.data.reduce_zero_label=True',
        ),
        (png([[0, 9]]), 'ignored value 255: add its name to the list of classes'),
    ],
    ids=['16 bits', '4 bits', 'RGB', 'LA', 'JPEG', 'truncated', 'next value', 'unknown value'],
)
def test_other_masks_are_refused_with_their_name(mask, message):
    """The user would not find the file among thousands, or the network would learn wrong classes."""
    classes = MaskClasses(('sky', 'road', 'car'), (0, 1, 2), reduce_zero_label=False)
    with pytest.raises(UserError, match=r'^folder/a\.png ') as error:
        classes.labels(mask, 'folder/a.png')
    assert message in str(error.value)


def test_a_forgotten_reduce_zero_label_is_suggested(tmp_path):
    """The user would not know why 0 is not a class."""
    (tmp_path / 'categories.json').write_text(json.dumps([{'id': 1, 'name': 'person'}]))
    with pytest.raises(UserError, match='reduce_zero_label=True'):
        find_classes([tmp_path], None, reduce_zero_label=False).labels(png([[0, 1]]), 'a.png')


def test_lists_of_classes(tmp_path):
    """The metrics and the saved model would have wrong class names."""
    path = tmp_path / 'classes.txt'
    path.write_text('sky\ntraffic light\n')
    assert find_classes([tmp_path], None, reduce_zero_label=False) == MaskClasses(
        ('sky', 'traffic light'), (0, 1), False
    )
    assert find_classes([], path, reduce_zero_label=True).values == (1, 2)
    path = tmp_path / 'objectInfo150.txt'
    path.write_text('Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t5\t6\twall\n2\t0.1\t5\t6\tbed \n3\t0.1\t5\t6\tcar, auto\n')
    assert find_classes([tmp_path], None, reduce_zero_label=True).names == ('wall', 'bed', 'car')
    path = tmp_path / 'coco.json'
    rows = [{'id': 200, 'name': 'rug'}, {'id': 1, 'name': 'person'}]
    for content in (rows, {'categories': rows}):
        path.write_text(json.dumps(content))
        assert find_classes([], path, reduce_zero_label=True) == MaskClasses(('person', 'rug'), (1, 200), True)


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('a.txt', 'sky\n\nroad', 'line 2 is empty'),
        ('a.json', '[{"id": 1}]', 'it must be a list of {"id": 1, "name": "person"}'),
        ('a.json', '["sky", "road"]', 'it must be a list of'),
        ('a.json', '{"images": []}', 'it must be a list of'),
        ('a.json', '3', 'it must be a list of'),
        ('a.json', '[]', 'it has no classes'),
        ('a.json', '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', 'two classes have the same id'),
        ('a.json', '[{"id": "b", "name": "a"}]', "the id of a class must be a whole number, not 'b'"),
        ('a.json', '[{"id": 1.5, "name": "a"}]', 'the id of a class must be a whole number, not 1.5'),
        ('a.json', '[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]', "several classes are called 'a': give each"),
        ('a.txt', 'sky\nroad\nsky', "several classes are called 'sky': give each class its own name"),
        ('a.json', '[{"id": 0, "name": "a"}]', 'ids from 1 to 254, because data.reduce_zero_label is set'),
        ('a.txt', '\n'.join(map(str, range(255))), 'the 255 classes must have ids from 1 to 254'),
        ('b.txt', None, 'cannot be read as a list of classes'),
    ],
)
def test_invalid_lists_are_refused(tmp_path, name, text, message):
    """A typing error in the list would shift all classes after it."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        find_classes([], tmp_path / name, reduce_zero_label=True)


def test_a_missing_list_is_explained(tmp_path):
    """The user would not know which file is missing, or where."""
    with pytest.raises(UserError, match=r'no list of classes.*classes\.txt.*--config\.data\.classes'):
        find_classes([tmp_path], None, reduce_zero_label=False)
