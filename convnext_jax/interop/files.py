"""Reading and writing of safetensors, PyTorch and JSON files; code in a PyTorch file is never run."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convnext_jax.errors import UserError, first_line
from convnext_jax.interop.hub import HUB_ID, download
from convnext_jax.output import to_json
from convnext_jax.paths import local_path


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `np.asarray` reads its values when they are needed, to save memory."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        # The file is opened again for each tensor, because the pages of a mapped file count as memory of the process.
        try:
            with safe_open(self.path, framework='np') as file:
                array = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f'{self.path} was changed while it was read: {first_line(error)}') from error
        if array.shape != self.shape or array.dtype.name not in FLOATS.values():
            raise UserError(f'{self.path} was changed while it was read: {self.name} is {array.shape} {array.dtype}')
        return np.asarray(_exact_float32(array, self.name, self.path), dtype)


Tensors = Mapping[str, np.ndarray | StoredTensor]
"""Name → tensor with a dtype in `FLOATS`. Both types have `shape`, and `np.asarray` gives the values."""


class FileContent(NamedTuple):
    """The content of a weights file.

    Attributes:
        tensors: name → tensor.
        class_names: the names of the classes that mmsegmentation stores in its PyTorch files; None if there are none.
    """

    tensors: Tensors
    class_names: tuple[str, ...] | None = None


FLOATS = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'F64': 'float64'}
"""Dtypes of weights by their names in safetensors; float64 is read only if float32 represents the values exactly."""

WEIGHTS_FILES = (
    *('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'model.pth'),
    *('open_clip_model.safetensors', 'open_clip_pytorch_model.bin'),
)
"""File names of a folder's weights; the first existing file is read."""
RAW_ENTRIES = ('model', 'state_dict')
EMA_ENTRIES = ('model_ema', 'state_dict_ema')
"""Names of the entries with the weights (`RAW_ENTRIES`) and with their moving average (`EMA_ENTRIES`) in the PyTorch
files of training programs."""
SAFE_CLASSES = (
    'argparse.Namespace',
    'types.SimpleNamespace',
    *(f'{module}.{kind}Path' for module in ('pathlib', 'pathlib._local') for kind in ('Posix', 'Windows')),
    'numpy.dtype',
    'numpy.ndarray',
    *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('scalar', '_reconstruct')),
)
"""Classes and functions of objects that training programs store beside the weights, such as arguments, paths and
metrics. They are read as `_Inert` and ignored."""


def locate(where: str, revision: str | None = None) -> Path:
    """The path of a file or folder, or of the local copy of a repository on the Hugging Face hub.

    Args:
        where: a path, 'owner/name' or 'hf_hub:owner/name'.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there is no such path, or as for `hub.download`.
    """
    try:
        path = local_path(where)
        if path.exists():
            return path
    except OSError as error:
        raise UserError(f'{where[:80]} is not a path: {first_line(error)}') from error
    hub_id = re.sub('^hf[_-]hub:', '', where)
    if not HUB_ID.fullmatch(hub_id):
        raise UserError(f'{where} is not a file, a folder or a hub id (owner/name)')
    return download(hub_id, revision)


def read_folder(folder: Path) -> FileContent:
    """The content of a folder's weights, from one file or from several files with an index.

    Raises:
        UserError: the folder has no weights, or they cannot be read.
    """
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).exists()), None)
    if path is None:
        raise UserError(f'{folder} contains none of {", ".join(WEIGHTS_FILES)}: give the path of the weights file')
    if path.suffix != '.json':
        return read_file(path)
    weight_map = read_json(path).get('weight_map')
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f'{path} has no weight_map from tensors to files')
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if Path(name).name != name or not name.endswith('.safetensors')]
    if outside:
        raise UserError(f'{path} names files that are not safetensors files in its folder: {outside[:3]}')
    tensors: dict[str, np.ndarray | StoredTensor] = {}
    found: dict[str, str] = {}
    for name in files:
        shard = read_file(folder / name).tensors
        tensors |= shard
        found |= {tensor: name if tensor not in found else 'two files' for tensor in shard}
    if found != weight_map:
        names = found.keys() | weight_map
        differ = [printable(name) for name in names if found.get(name) != weight_map.get(name)]
        raise UserError(f'{path} and its files differ in {", ".join(sorted(differ)[:3])}')
    return FileContent(tensors)


def printable(name: str) -> str:
    """A name from a file in a form for error messages: one line of at most 200 characters."""
    return (name if name.isprintable() else repr(name))[:200]


def read_file(path: Path, entry: str | None = None) -> FileContent:
    """The floating-point tensors of a safetensors or PyTorch file, and the class names in it.

    Integer scalars, such as BatchNorm's `num_batches_tracked`, are counters and are ignored.

    Args:
        path: the file; its content determines the format.
        entry: name of one of several state dicts in a PyTorch file, or 'ema' for one of `EMA_ENTRIES`. None selects one
            of `RAW_ENTRIES`, or the only state dict.

    Raises:
        UserError: the file cannot be read, is truncated, would need code, or does not have this entry.
    """
    if not path.is_file():
        raise UserError(f'there is no file {path}')
    try:
        with path.open('rb') as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    if start[8:] == b'{' or path.suffix == '.safetensors':  # 8 bytes for the length of the JSON header, then the header
        if entry:
            raise UserError(f"{path} contains only one set of weights, and no entry '{entry}'")
        return FileContent(_read_safetensors(path))
    if start.startswith((b'PK', b'\x80')):  # a zip file; or a pickle, torch's format before 1.6
        return _read_torch(path, entry)
    raise UserError(f'{path} is neither a safetensors file nor a PyTorch file')


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        UserError: the file is missing, damaged, or has other content.
    """
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise UserError(f'there is no file {path}') from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged: {first_line(error)}') from error
    if not isinstance(value, dict):
        raise UserError(f'{path} does not contain a JSON object')
    return value


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework='np') as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
            tensors = {name: StoredTensor(path, name, tuple(tensor.get_shape())) for name, tensor in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f'{path} is not a complete safetensors file: {first_line(error)}') from error
    counters = {name for name, x in tensors.items() if x.shape == () and dtypes[name][0] in 'IU'}
    tensors = {name: x for name, x in tensors.items() if name not in counters}
    others = [f'{printable(name)} is {dtypes[name]}' for name in tensors if dtypes[name] not in FLOATS]
    if others:
        raise UserError(f'{path} contains tensors that are not float weights: {"; ".join(others[:3])}')
    return tensors


class _Inert:
    """Replaces the objects stored beside the weights: it accepts their arguments and state, and ignores them."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_torch(path: Path, entry: str | None) -> FileContent:
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{path} is a PyTorch file: pip install torch to read it') from error
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in SAFE_CLASSES]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch passes on the errors of its zip and pickle readers
        raise UserError(_why_unreadable(path, error)) from error
    state_dict = _choose_entry(content, entry, path, torch.Tensor)
    counters = {name for name, x in state_dict.items() if x.ndim == 0 and not x.is_floating_point()}
    weights = {name: x.detach() for name, x in state_dict.items() if name not in counters}
    floats = [getattr(torch, name) for name in FLOATS.values()]
    odd = [
        printable(name)
        for name, x in weights.items()
        # With a stride of zero a tensor has more elements than the file stores.
        if x.layout != torch.strided or x.is_meta or x.dtype not in floats or x.nbytes > x.untyped_storage().nbytes()
    ]
    if odd:
        raise UserError(f'{path} contains tensors that are not plain float weights: {", ".join(odd[:3])}')
    tensors = {
        name: _exact_float32(x.numpy(), name, path) if x.dtype == torch.float64 else x.float().numpy()
        for name, x in weights.items()
    }
    return FileContent(tensors, _class_names(content))


def _class_names(content: Mapping) -> tuple[str, ...] | None:
    """The class names of mmsegmentation: `meta['CLASSES']`, or from version 1 on `meta['dataset_meta']['classes']`."""
    meta = content.get('meta')
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get('dataset_meta')
    names = dataset.get('classes') if isinstance(dataset, Mapping) else meta.get('CLASSES')
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(printable(name).strip() for name in names)  # ADE20K's list has 'bed '


def _why_unreadable(path: Path, error: Exception) -> str:
    """A one-line message for an error of `torch.load`, whose own message has many lines."""
    if unknown := re.search(r'GLOBAL (\S+)', str(error)):
        return (
            f'{path} needs the code of {printable(unknown[1])}, but code in files is never run: save only the weights, '
            'with torch.save(model.state_dict(), FILE)'
        )
    reason = re.search(r'WeightsUnpickler error:\s*(.*)', str(error))
    return f'{path} cannot be read without running code: {reason[1] if reason else first_line(error)}'


def _choose_entry(content: object, entry: str | None, path: Path, tensor: type) -> Mapping:
    """The selected state dict in the content of a PyTorch file; arguments as for `read_file`."""
    if _is_state_dict(content, tensor):
        if entry:
            raise UserError(f"{path} contains only one set of weights, and no entry '{entry}'")
        return content
    if not isinstance(content, Mapping):
        raise UserError(f'{path} does not contain a state dict, but a {type(content).__name__}')
    found = [name for name, value in content.items() if _is_state_dict(value, tensor)]
    listed = ', '.join(printable(str(name)) for name in found or content)[:500]
    if not found:
        raise UserError(f'{path} does not contain a state dict: its entries are {listed}')
    wanted = RAW_ENTRIES if entry is None else EMA_ENTRIES if entry == 'ema' else (entry,)
    chosen = [name for name in found if name in wanted] or (found if entry is None else [])
    if not chosen:
        raise UserError(f'{path} does not contain {" or ".join(wanted)}: its state dicts are {listed}')
    if len(chosen) > 1:
        raise UserError(
            f"{path} contains the state dicts {listed}: choose one, as in load_pretrained(FILE, entry='{chosen[0]}'), "
            'or save only one'
        )
    return content[chosen[0]]


def _is_state_dict(content: object, tensor: type) -> TypeGuard[Mapping]:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, tensor) for name, value in content.items())
    )


def _exact_float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """The array, converted to float32 if it is float64.

    Raises:
        UserError: float32 does not represent a value exactly.
    """
    if array.dtype != np.float64:
        return array
    with np.errstate(over='ignore'):
        single = array.astype(np.float32)
    if not np.array_equal(single, array, equal_nan=True):
        raise UserError(
            f'{path} contains float64 values that float32 does not represent exactly, as in {printable(name)}: save '
            'them as float32'
        )
    return single


def write_folder(
    folder: Path,
    tensors: dict[str, np.ndarray],
    files: Mapping[str, dict | bytes],
    *,
    pytorch: bool = False,
    entry: str | None = None,
) -> None:
    """Writes a folder with tensors, in `model.safetensors` or `model.pth`, and with other files.

    Args:
        folder: a new or empty folder.
        tensors: name → array.
        files: file name → content, a JSON object or bytes.
        pytorch: write the PyTorch file `model.pth` instead of `model.safetensors`. It needs torch.
        entry: the entry of the PyTorch file that has the tensors; None for a file that contains only the tensors.

    Raises:
        UserError: the folder is not empty or not writable, or torch is missing.
    """
    folder = folder.resolve()  # because '.' has no name
    partial = folder.with_name(f'{folder.name}.partial')  # renamed to the folder when it is complete
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f'{folder} is not empty: choose a new folder')
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {first_line(error)}') from error
    try:
        if pytorch:
            _write_torch(partial / 'model.pth', tensors, entry)
        else:
            save_file(tensors, partial / 'model.safetensors', metadata={'format': 'pt'})
        for name, content in files.items():
            if isinstance(content, dict):
                content = f'{to_json(content, indent=2)}\n'.encode()
            (partial / name).write_bytes(content)
        if folder.exists():  # it is kept, because it may be a shell's current folder
            for path in sorted(partial.iterdir()):
                path.replace(folder / path.name)
        else:
            partial.replace(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises RuntimeError
        raise UserError(f'{folder} cannot be written: {first_line(error)}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_torch(path: Path, tensors: Mapping[str, np.ndarray], entry: str | None) -> None:
    try:
        import torch
    except ImportError as error:
        raise UserError('this layout is a PyTorch file: pip install torch to write it') from error
    state_dict = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    torch.save({entry: state_dict} if entry else state_dict, path)
