"""Files of other libraries, read as data: safetensors, PyTorch files without the code that a pickle can hold, JSON."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convnext_jax.errors import UserError, first_line
from convnext_jax.output import to_json
from convnext_jax.paths import local_path


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that stays in its safetensors file until `np.asarray` reads it, so that no model is in memory twice."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        # Opened anew each time: pages of a file that stays mapped count as the process's memory.
        try:
            with safe_open(self.path, framework='np') as file:
                array = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f'{self.path} was changed while it was read: {first_line(error)}') from error
        if array.shape != self.shape or array.dtype.name not in FLOATS.values():
            raise UserError(f'{self.path} was changed while it was read: {self.name} is {array.shape} {array.dtype}')
        return np.asarray(_exact_float32(array, self.name, self.path), dtype)


Tensors = Mapping[str, np.ndarray | StoredTensor]
"""Name → tensor of one of `FLOATS`; what both have is `shape`, and `np.asarray` gives the numbers."""

FLOATS = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'F64': 'float64'}
"""Types of weights by their names in safetensors; float64 is read only where float32 holds the same values."""

WEIGHTS_FILES = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'model.pth')
"""What a folder's weights may be called, the first that is there counts."""
HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')
RAW_ENTRIES = ('model', 'state_dict')
EMA_ENTRIES = ('model_ema', 'state_dict_ema')
"""What training programs call the weights, and their moving average, in a PyTorch file."""
BESIDE_WEIGHTS = (
    'argparse.Namespace',
    'types.SimpleNamespace',
    *(f'{module}.{kind}Path' for module in ('pathlib', 'pathlib._local') for kind in ('Posix', 'Windows')),
    'numpy.dtype',
    'numpy.ndarray',
    *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('scalar', '_reconstruct')),
)
"""Classes and functions of arguments, paths and metrics that training programs keep in the file of the weights."""


def locate(where: str, revision: str | None = None) -> Path:
    """The file or folder at a path, or the local copy of a repository on the Hugging Face hub.

    The hub's cache, token and offline mode are those of `huggingface_hub` (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).

    Args:
        where: a path, 'owner/name' or 'hf_hub:owner/name'.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there is neither such a path nor such a repository, or the hub cannot be reached.
    """
    try:
        path = local_path(where)
        if path.exists():
            return path
    except OSError as error:
        raise UserError(f'{where[:80]} is no path: {first_line(error)}') from error
    hub_id = re.sub('^hf[_-]hub:', '', where)
    if not HUB_ID.fullmatch(hub_id):
        raise UserError(f'{where} is no file or folder, and no hub id (owner/name)')
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        for weights in ('model*.safetensors*', 'pytorch_model*.bin'):
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=['*config.json', weights]))
            if any(folder.glob(weights)):
                return folder
    except LocalEntryNotFoundError as error:
        raise UserError(
            f'{where} is no path here, and the hub cannot be reached for it: {first_line(error)}'
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f'{where} is no path here, and the hub does not give it: {first_line(error)}') from error
    raise UserError(f'{hub_id} on the hub holds neither safetensors nor pytorch_model.bin')


def read_folder(folder: Path) -> Tensors:
    """The tensors of a folder, from one file or from several with an index.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).exists()), None)
    if path is None:
        raise UserError(f'{folder} holds no weights: none of {", ".join(WEIGHTS_FILES)}; give the path of the file')
    if path.suffix != '.json':
        return read_tensors(path)
    places = read_json(path).get('weight_map')
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f'{path} has no weight_map from tensors to files')
    files = sorted(set(places.values()))
    outside = [name for name in files if Path(name).name != name or not name.endswith('.safetensors')]
    if outside:
        raise UserError(f'{path} names files that are no safetensors of its folder: {outside[:3]}')
    tensors: dict[str, np.ndarray | StoredTensor] = {}
    found: dict[str, str] = {}
    for name in files:
        shard = read_tensors(folder / name)
        tensors |= shard
        found |= {tensor: name if tensor not in found else 'two files' for tensor in shard}
    if found != places:
        differ = [printable(tensor) for tensor in found.keys() | places if found.get(tensor) != places.get(tensor)]
        raise UserError(f'{path} and its files differ in {", ".join(sorted(differ)[:3])}')
    return tensors


def printable(name: str) -> str:
    """A name from a file as an error message may show it: on one line, and not too long of that."""
    return (name if name.isprintable() else repr(name))[:200]


def read_tensors(path: Path, entry: str | None = None) -> Tensors:
    """The floating-point tensors of a safetensors or PyTorch file.

    Integers without dimensions, as BatchNorm's `num_batches_tracked`, count steps: they are left out.

    Args:
        path: of the file; whether it is safetensors or PyTorch follows from its content.
        entry: of a PyTorch file that holds several state dicts: the name of one, or 'ema' for `EMA_ENTRIES`. None
            stands for `RAW_ENTRIES`, or for the only state dict that there is.

    Raises:
        UserError: it cannot be read, is cut short, would have to run code, or does not hold that entry.
    """
    if not path.is_file():
        raise UserError(f'there is no file {path}')
    try:
        with path.open('rb') as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
    if start[8:] == b'{' or path.suffix == '.safetensors':  # a header of JSON follows its length, 8 bytes
        if entry:
            raise UserError(f"{path} holds one set of weights: there is no '{entry}' to choose")
        return _read_safetensors(path)
    if start.startswith((b'PK', b'\x80')):  # a zip file; a pickle, which torch wrote before 1.6
        return _read_torch(path, entry)
    raise UserError(f'{path} is neither a safetensors file nor a PyTorch file')


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise UserError(f'there is no file {path}') from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged: {first_line(error)}') from error
    if not isinstance(value, dict):
        raise UserError(f'{path} holds no JSON object')
    return value


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework='np') as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            dtypes = {name: piece.get_dtype() for name, piece in slices.items()}
            tensors = {name: StoredTensor(path, name, tuple(piece.get_shape())) for name, piece in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f'{path} is no whole safetensors file: {first_line(error)}') from error
    counters = {name for name, x in tensors.items() if x.shape == () and dtypes[name][0] in 'IU'}
    tensors = {name: x for name, x in tensors.items() if name not in counters}
    others = [f'{printable(name)} is {dtypes[name]}' for name in tensors if dtypes[name] not in FLOATS]
    if others:
        raise UserError(f'{path} holds tensors that are not float weights: {"; ".join(others[:3])}')
    return tensors


class _Inert:
    """Stands for an object beside the weights: it takes the object's arguments and state, and does nothing."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_torch(path: Path, entry: str | None) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise UserError(f'{path} is a PyTorch file: pip install torch to read it') from error
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in BESIDE_WEIGHTS]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises what its zip and pickle readers raise
        raise UserError(_why_unreadable(path, error)) from error
    state_dict = _choose_entry(content, entry, path, torch.Tensor)
    counters = {name for name, x in state_dict.items() if x.ndim == 0 and not x.is_floating_point()}
    weights = {name: x.detach() for name, x in state_dict.items() if name not in counters}
    floats = [getattr(torch, name) for name in FLOATS.values()]
    odd = [
        printable(name)
        for name, x in weights.items()
        # A stride of zero claims more elements than the file backs.
        if x.layout != torch.strided or x.is_meta or x.dtype not in floats or x.nbytes > x.untyped_storage().nbytes()
    ]
    if odd:
        raise UserError(f'{path} holds tensors that are not plain float weights: {", ".join(odd[:3])}')
    return {
        name: _exact_float32(x.numpy(), name, path) if x.dtype == torch.float64 else x.float().numpy()
        for name, x in weights.items()
    }


def _why_unreadable(path: Path, error: Exception) -> str:
    """One line for what `torch.load` says on many."""
    if unknown := re.search(r'GLOBAL (\S+)', str(error)):
        return (
            f'{path} needs the code of {printable(unknown[1])}, and no code of a file is run: save the weights alone, '
            'torch.save(model.state_dict(), FILE)'
        )
    reason = re.search(r'WeightsUnpickler error:\s*(.*)', str(error))
    return f'{path} cannot be read as weights alone: {reason[1] if reason else first_line(error)}'


def _choose_entry(content: object, entry: str | None, path: Path, tensor: type) -> Mapping:
    """The state dict among what a PyTorch file holds; arguments as `read_tensors`."""
    if _is_state_dict(content, tensor):
        if entry:
            raise UserError(f"{path} holds one set of weights: there is no '{entry}' to choose")
        return content
    if not isinstance(content, Mapping):
        raise UserError(f'{path} holds no state dict, but a {type(content).__name__}')
    found = [name for name, value in content.items() if _is_state_dict(value, tensor)]
    listed = ', '.join(printable(str(name)) for name in found or content)[:500]
    if not found:
        raise UserError(f'{path} holds no state dict: its entries are {listed}')
    wanted = RAW_ENTRIES if entry is None else EMA_ENTRIES if entry == 'ema' else (entry,)
    chosen = [name for name in found if name in wanted] or (found if entry is None else [])
    if not chosen:
        raise UserError(f'{path} holds no {" or ".join(wanted)}: its state dicts are {listed}')
    if len(chosen) > 1:
        raise UserError(
            f"{path} holds the state dicts {listed}: choose one, as load_pretrained(FILE, entry='{chosen[0]}') does, "
            'or save it alone'
        )
    return content[chosen[0]]


def _is_state_dict(content: object, tensor: type) -> TypeGuard[Mapping]:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, tensor) for name, value in content.items())
    )


def _exact_float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """float64 as float32; other types as they are.

    Raises:
        UserError: a value is between those of float32, or beyond them.
    """
    if array.dtype != np.float64:
        return array
    with np.errstate(over='ignore'):
        single = array.astype(np.float32)
    if not np.array_equal(single, array, equal_nan=True):
        raise UserError(
            f'{path} holds float64 values that float32 does not hold exactly, as in {printable(name)}: save them as '
            'float32'
        )
    return single


def write_folder(
    folder: Path, tensors: dict[str, np.ndarray], files: Mapping[str, dict | bytes], *, torch: bool = False
) -> None:
    """Writes tensors as `model.safetensors`, or as `model.pth` if `torch`, and beside them JSON objects and bytes.

    Args:
        folder: new or empty.
        tensors: name → array.
        files: name → content.
        torch: a PyTorch file with the entry 'model'; it takes torch to write.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    folder = folder.resolve()  # '.' has no name
    partial = folder.with_name(f'{folder.name}.partial')  # takes the folder's name when all of it is there
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f'{folder} is not empty: give a new folder')
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {first_line(error)}') from error
    try:
        if torch:
            _write_torch(partial / 'model.pth', tensors)
        else:
            save_file(tensors, partial / 'model.safetensors', metadata={'format': 'pt'})
        for name, content in files.items():
            if isinstance(content, dict):
                content = f'{to_json(content, indent=2)}\n'.encode()
            (partial / name).write_bytes(content)
        if folder.exists():  # and stays the folder that it is, which may be somebody's current one
            for path in sorted(partial.iterdir()):
                path.replace(folder / path.name)
        else:
            partial.replace(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises the last
        raise UserError(f'{folder} cannot be written: {first_line(error)}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError as error:
        raise UserError('the original layout is a PyTorch file: pip install torch to write it') from error
    torch.save({'model': {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}}, path)
